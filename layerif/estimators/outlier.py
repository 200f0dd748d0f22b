"""The outlier ratio of a block (OWL, Yin et al., ICML 2024): the share of its weights that stand far above the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from layerif.checks import check_fields
from layerif.estimators._base import layer_scores
from layerif.evidence import LayerActivations
from layerif.probe.activations import Activations
from layerif.scores import LayerScores


def outlier_ratio(metrics: Sequence[Callable[[], Tensor]], *, multiple: float) -> float:
    """Gives D, the percentage of entries above `multiple` times their mean, both over all matrices together.

    Args:
        metrics: each gives the Wanda metric of one matrix. It is called twice, so that no metric is kept.
        multiple: of the mean, above which an entry is an outlier.
    """
    sums = [(float(metric.double().sum()), metric.numel()) for metric in (make() for make in metrics)]
    numel = sum(count for _, count in sums)
    bound = multiple * math.fsum(total for total, _ in sums) / numel
    return 100 * sum(int((make() > bound).sum()) for make in metrics) / numel


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """Scores a block by its outlier ratio. A block with many outliers is important.

    OWL's sparsities are `allocator=sparsity allocator.rule=shifted allocator.epsilon=0.08 allocator.smoothing=false`:
    S minus a min-max in [0, 2ε] plus its mean.

    Attributes:
        multiple: M. An entry of the Wanda metric is an outlier above M times the mean of its block.
    """

    needs = Activations()

    multiple: Annotated[float, Gt(0), "OWL used 5 and 7"] = 5.0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        values = (
            outlier_ratio([partial(evidence.metric, param) for param in params], multiple=self.multiple)
            for params in evidence.layers.params
        )
        return layer_scores(self, evidence, values, "important", multiple=f"{self.multiple:g}")
