"""Layer-wise sparsity allocation (LSA, Yang et al., ICLR 2026): the error that a proxy mask makes in a block."""

from __future__ import annotations

import math
from dataclasses import dataclass

from layerif.checks import Share, check_fields
from layerif.estimators._base import layer_scores
from layerif.estimators.dlp import relative_importance
from layerif.evidence import LayerRemovals
from layerif.probe.removal import Removal
from layerif.pruning.wanda import wanda_mask
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Lsa:
    """Scores a block by I = 1 − E/ΣE; E is the squared output error of its matrices under Wanda's mask.

    LSA's sparsities are `allocator=sparsity allocator.rule=shifted allocator.epsilon=0.07 allocator.smoothing=false`.
    Its released code takes 0.04, 0.1 and 0.15 at 50, 60 and 70 %. The direction is the published one: the block of the
    largest error gets the most sparsity. `estimator=reversed estimator@estimator.of=lsa` turns it round.

    The published mask removes one weight after the other, always the one that adds least to the error. Wanda's mask
    stands in its place here, because it needs no second moments of the inputs.

    Attributes:
        proxy: the share of the weights that the mask removes.
    """

    proxy: Share = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    @property
    def needs(self) -> Removal:
        return Removal(self.proxy, wanda_mask)

    def score(self, evidence: LayerRemovals, /) -> LayerScores:
        errors = [math.fsum(evidence.errors[param] for param in params) for params in evidence.layers.params]
        values = relative_importance(errors, "squared output error")
        return layer_scores(self, evidence, values, "important", proxy=f"{self.proxy:g}")
