"""SPIDER as a score: the share of a layer's weights that the task needs more than the pretrained model does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from layerif.estimators._base import layer_scores
from layerif.evidence import LayerMasks
from layerif.probe.update_masks import UpdateMasks
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Spider:
    """Scores a block by the mean of SPIDER's mask over its weights, with the mean gradient of the probed train samples.

    The mask is that of `method.protect=spider`, see `layerif.probe.update_masks`; there the gradients of the steps are
    summed up.
    """

    needs = UpdateMasks()

    def score(self, evidence: LayerMasks, /) -> LayerScores:
        values = [
            math.fsum(evidence.sums[param] for param in params) / numel
            for params, numel in zip(evidence.layers.params, evidence.layers.numel, strict=True)
        ]
        return layer_scores(self, evidence, values, "undertrained")
