"""Dynamic layerwise pruning (DLP): a block with a small typical Wanda metric is important."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from layerif.checks import check_fields
from layerif.estimators._base import layer_scores
from layerif.evidence import LayerActivations
from layerif.probe.activations import Activations
from layerif.scores import LayerScores

Centre = Literal["mean", "median"]


def relative_importance(sizes: Sequence[float], what: str = "Wanda metric") -> list[float]:
    """Gives 1 − s_l/Σs of every block: numbers in [0, 1] that sum to L − 1.

    Args:
        sizes: s, one per block; a block of a small one is important.
        what: a name of s, for the message.

    Raises:
        ValueError: where all sizes are zero.
    """
    total = math.fsum(sizes)
    if total == 0:
        raise ValueError(f"all blocks have a {what} of zero: weights or activations are zero; check the model")
    return [1 - size / total for size in sizes]


@dataclass(frozen=True, kw_only=True)
class Dlp:
    """Scores a block by 1 − s/Σs, which is high for an important block.

    DLP's sparsities are `allocator=sparsity allocator.rule=shifted allocator.epsilon=0.15 allocator.smoothing=false`.

    Attributes:
        centre: a block's s is the mean or the median of the Wanda metric over all entries of its matrices.
    """

    needs = Activations()

    centre: Centre = "mean"

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        values = relative_importance([self._centre(evidence, params) for params in evidence.layers.params])
        return layer_scores(self, evidence, values, "important")

    def _centre(self, evidence: LayerActivations, params: Sequence[str]) -> float:
        if self.centre == "median":
            return float(torch.cat([evidence.metric(param).flatten() for param in params]).median())
        metrics = (evidence.metric(param) for param in params)
        sums = [(float(metric.double().sum()), metric.numel()) for metric in metrics]
        return math.fsum(total for total, _ in sums) / sum(numel for _, numel in sums)
