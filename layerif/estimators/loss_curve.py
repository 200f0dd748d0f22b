"""Loss curves: the Fisher matrix's prediction of what each sparsity of each matrix costs, under the pruner's own masks.

`layerif/probe/curves/prices.py` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Gt, Le, Lt

from layerif.allocate.curves import Curves
from layerif.checks import Seed, check_choice, check_fields
from layerif.estimators._base import CurveEstimator
from layerif.layers import Granularity
from layerif.probe.curves.measure import CurveForm
from layerif.probe.curves.request import TASK, WINDOWS, LossCurves
from layerif.pruning import Pruner, name_of_pruner, pruner_called
from layerif.pruning.calibration import Calibration
from layerif.pruning.swaps import MaskPruner
from layerif.pruning.wanda import Wanda

LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class LossCurve(CurveEstimator):
    """Prices every sparsity of every matrix (or block), in one gradient pass.

    Attributes:
        form: `exact` squares the effect of the whole change at each position; `diagonal` adds the squares of single
            weights' effects, which costs less.
        granularity: a curve per matrix, or per block.
        masks: the pruner whose masks are priced, before any swaps; None: `pruner`, with its swaps. Another pruner must
            not spend these curves, except that SparseGPT may spend Wanda's where they are named here.
        pruner: the pruner that the curves are for.
        mask_text: the windows that this pruner takes its statistics of; None: 16 windows of 256 tokens of the embedded
            documentation.
        loss_text: the text whose loss is watched: `windows` (those of `mask_text`), `task` (the probe's train rows), or
            a weight for each of them.
        levels: the sparsities that are priced, ascending; between them the curve is interpolated. None: 0.2 to 0.9 in
            steps of 0.1, or all n of m.
        tokens: the share of the positions that is looked at, chosen by `seed`; 1 takes all.
        seed: chooses the positions, and the windows where `mask_text` is None.
    """

    form: CurveForm = "exact"
    granularity: Granularity = "matrix"
    masks: Literal["magnitude", "wanda", "sparsegpt"] | None = None
    pruner: Pruner = field(default_factory=Wanda)
    mask_text: Calibration | None = None
    loss_text: str | Mapping[str, float] = WINDOWS
    levels: Sequence[Annotated[float, Gt(0), Lt(1)]] | None = None
    tokens: Annotated[float, Gt(0), Le(1), "1 takes all positions"] = 0.45
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")
        weights_of_texts(self.loss_text)
        check_levels(self.levels, self.masked_by)

    @property
    def masked_by(self) -> Pruner:
        """The pruner whose masks are priced."""
        if self.masks is None:
            return self.pruner
        if self.masks == name_of_pruner(self.pruner):
            return replace(self.pruner, swaps=False) if isinstance(self.pruner, MaskPruner) else self.pruner
        return pruner_called(self.masks, n=self.pruner.n, m=self.pruner.m, skip=self.pruner.skip)

    @property
    def needs(self) -> LossCurves:
        pruner = self.masked_by
        return LossCurves(
            changes=pruner,
            mask_text=self.mask_text or Calibration(seed=self.seed),
            loss_texts=weights_of_texts(self.loss_text),
            levels=tuple(self.levels or pruner.levels() or LEVELS),
            form=self.form,
            granularity=self.granularity,
            tokens=self.tokens,
            seed=self.seed,
        )

    @property
    def source(self) -> str:
        by = f"form={self.form}, granularity={self.granularity}, masks={self.masked_by.called}"
        return f"loss_curve({by}, loss_text={spelt_texts(self.loss_text)})"

    def curves(self, evidence: Curves, /) -> Curves:
        return evidence


def weights_of_texts(loss_text: str | Mapping[str, float]) -> dict[str, float]:
    """Gives the weight of each text whose loss is watched, in the order of their names.

    Raises:
        ValueError: names the text that is unknown or has no part in the mixture.
    """
    given = {loss_text: 1.0} if isinstance(loss_text, str) else loss_text
    for text, weight in given.items():
        check_choice("estimator.loss_text", text, (WINDOWS, TASK))
        if not isinstance(weight, int | float) or not 0 < weight <= 1:
            raise ValueError(f"estimator.loss_text.{text}={weight} is not allowed; allowed: above 0, and at most 1")
    total = math.fsum(given.values())
    if abs(total - 1) > 1e-9:
        raise ValueError(f"the weights of estimator.loss_text add up to {total:g}; give weights that add up to 1")
    return dict(sorted(given.items()))


def spelt_texts(loss_text: str | Mapping[str, float]) -> str:
    """Spells the texts whose loss is watched, with their weights."""
    weights = weights_of_texts(loss_text)
    return "+".join(f"{weight:g} {text}" if weight < 1 else text for text, weight in weights.items())


def check_levels(levels: Sequence[float] | None, pruner: Pruner) -> None:
    """Refuses levels that are too few for a curve, out of order, or not those that the pruner can reach."""
    if levels is None:
        return
    if len(levels) < 3 or list(levels) != sorted({*levels}):
        raise ValueError(
            f"estimator.levels={list(levels)} must be three or more different sparsities, ascending; or null"
        )
    if pruner.m is not None:
        possible = ", ".join(f"{level:g}" for level in pruner.levels())
        raise ValueError(
            f"estimator.levels={list(levels)} has no meaning with pruner.m={pruner.m}, whose levels are {possible}; "
            "use estimator.levels=null"
        )
