"""Loss curves: the Fisher matrix's prediction of what each sparsity of each matrix costs, under the pruner's own masks.

`layerif/probe/curves/prices.py` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Gt, Lt

from layerif.estimators._curves import FisherCurve
from layerif.probe.curves.request import LossCurves
from layerif.pruning import Pruner, name_of_pruner, pruner_called
from layerif.pruning.swaps import MaskPruner
from layerif.pruning.wanda import Wanda

LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class LossCurve(FisherCurve):
    """Prices every sparsity of every matrix (or block), in one gradient pass.

    Attributes:
        masks: the pruner whose masks are priced, before any swaps; None: `pruner`, with its swaps. Another pruner must
            not spend these curves, except that SparseGPT may spend Wanda's where they are named here.
        pruner: the pruner that the curves are for.
        levels: the sparsities that are priced, ascending; between them the curve is interpolated. None: 0.2 to 0.9 in
            steps of 0.1, or all n of m.
    """

    masks: Literal["magnitude", "wanda", "sparsegpt"] | None = None
    pruner: Pruner = field(default_factory=Wanda)
    levels: Sequence[Annotated[float, Gt(0), Lt(1)]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
        return self.asked(LossCurves, pruner, self.levels or pruner.levels() or LEVELS)

    @property
    def source(self) -> str:
        return self.sourced("loss_curve", f"masks={self.masked_by.called}")


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
