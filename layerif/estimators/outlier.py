"""Outlier ratio of a block (OWL, Yin et al., ICML 2024): how many of its weights stand far above the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from layerif.evidence import LayerActivations
from layerif.scores import LayerScores


def outlier_ratio(metrics: Sequence[Callable[[], Tensor]], *, multiple: float) -> float:
    """D = 100 · the fraction of entries above `multiple` times their mean, both over all matrices together: percent.

    metrics: each gives the Wanda metric of one matrix; made twice rather than kept.
    """
    sums = [(float(metric.double().sum()), metric.numel()) for metric in (make() for make in metrics)]
    numel = sum(count for _, count in sums)
    bound = multiple * math.fsum(total for total, _ in sums) / numel
    return 100 * sum(int((make() > bound).sum()) for make in metrics) / numel


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """multiple: M, how many times the mean of the block's Wanda metric makes an outlier (OWL: 5, or 7).

    A block with many outliers is important. OWL's sparsities are `allocator=sparsity allocator.rule=shifted
    allocator.epsilon=0.08 allocator.smoothing=false`: S minus a min-max in [0, 2ε] plus its mean.
    """

    needs: ClassVar[str] = "activations"

    multiple: float = 5.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.multiple) and self.multiple > 0):
            raise ValueError(f"estimator.multiple={self.multiple} must be finite and > 0; OWL used 5 and 7")

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        values = tuple(
            outlier_ratio([partial(evidence.metric, param) for param in params], multiple=self.multiple)
            for params in evidence.layers.params
        )
        source = f"outlier(multiple={self.multiple:g})"
        return LayerScores(evidence.layers.names, values, "important", source, evidence.fingerprint)
