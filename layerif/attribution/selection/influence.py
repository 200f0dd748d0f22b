"""`selection=influence`: the train rows that help the validation rows most, by any estimator on Grams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch

from layerif.attribution.selection import Pool, RankedSelection
from layerif.checks import check_fields
from layerif.estimators._base import GramEstimator, name_of, warn_of_zero_gradients
from layerif.evidence import LayerGrams, MatrixGram
from layerif.probe.grams.request import Grams
from layerif.probe.measurements import Load


@dataclass(frozen=True, kw_only=True)
class InfluentialRows(RankedSelection):
    """Takes the train rows that lower the loss of the validation rows most, before fine-tuning.

    The value of a row is −I, its influence summed over the measured matrices and averaged over the probe's validation
    rows. All train rows are measured, as `probe` says but for `probe.num_train`.

    Attributes:
        estimator: on Grams. With `cosine` and `whole_model` it is LESS (Xia et al., 2024) without Adam's moments and
            without checkpoints of a warm-up.
        whole_model: take one Gram of all measured matrices together instead of one for each.
        reversed: take the least helpful rows, as a control.
    """

    estimator: Any
    whole_model: bool = False
    reversed: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "selection")
        if not isinstance(self.estimator, GramEstimator) or self.estimator.needs != Grams():
            raise ValueError(
                f"selection.estimator={name_of(self.estimator)} gives no influence of rows from Grams; use datainf, "
                "exact, lissa, grad_dot or cosine"
            )
        if self.estimator.aggregation != "all":
            raise ValueError(
                f"selection.estimator.aggregation={self.estimator.aggregation} adds rows up to a score of a layer, "
                "and a selection keeps them apart; use all"
            )

    def check(self, pool: Pool) -> None:
        super().check(pool)
        Grams().check(pool.measurements)

    def values(self, pool: Pool, load: Load) -> list[float]:
        measured = pool.measurements
        every = replace(measured, probe=replace(measured.probe, num_train=len(pool.rows)))
        grams, _ = Grams().take(every, load)
        return helpfulness(grams, self.estimator, whole_model=self.whole_model)

    def priority(self, value: float) -> float:
        return -value if self.reversed else value


def helpfulness(grams: LayerGrams, estimator: GramEstimator, *, whole_model: bool) -> list[float]:
    """Gives −I of each train row, summed over matrices and averaged over validation rows.

    Args:
        grams: of the train and validation rows.
        estimator: gives the influence I of each Gram.
        whole_model: take one Gram of all matrices together.
    """
    warn_of_zero_gradients(grams.grams)
    given: Mapping[str, MatrixGram] = estimator.solvable(grams).grams
    if whole_model:
        given = {"the model": reduce(add, grams.in_float64.grams.values())}
    total = torch.stack([influence_MN.mean(dim=0) for influence_MN in estimator.influences(given).values()])
    return (-total.sum(dim=0)).tolist()
