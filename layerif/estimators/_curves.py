"""The settings that curves by the Fisher matrix share; `layerif/probe/curves/prices.py` has the formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from annotated_types import Gt, Le

from layerif.allocate.curves import Curves
from layerif.checks import Seed, check_choice, check_fields
from layerif.estimators._base import CurveEstimator
from layerif.layers import MatrixOrBlock
from layerif.probe.curves.measure import Changes, CurveForm
from layerif.probe.curves.request import TASK, WINDOWS, LossCurves
from layerif.pruning.calibration import Calibration

Asked = TypeVar("Asked", bound=LossCurves)


@dataclass(frozen=True, kw_only=True)
class FisherCurve(CurveEstimator):
    """Prices changes of every matrix (or block), in one gradient pass. Subclasses say which changes.

    Attributes:
        form: `exact` squares the effect of the whole change at each position; `diagonal` adds the squares of single
            weights' effects, which costs less.
        granularity: a curve per matrix, or per block.
        calibration: the windows, of which a pruner takes its statistics; None: 16 windows of 256 tokens of the embedded
            documentation.
        loss_text: the text whose loss is watched: `windows` (those of `calibration`), `task` (the probe's train rows),
            or a weight for each of them.
        tokens: the share of the positions that is looked at, chosen by `seed`; 1 takes all.
        seed: chooses the positions, and the windows where `calibration` is None.
    """

    form: CurveForm = "exact"
    granularity: MatrixOrBlock = "matrix"
    calibration: Calibration | None = None
    loss_text: str | Mapping[str, float] = WINDOWS
    tokens: Annotated[float, Gt(0), Le(1), "1 takes all positions"] = 0.45
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")
        weights_of_texts(self.loss_text)

    def asked(self, kind: type[Asked], changes: Changes, levels: Sequence[float]) -> Asked:
        """Makes the request for the curves of these changes at these levels."""
        return kind(
            changes=changes,
            calibration=self.calibration or Calibration(seed=self.seed),
            loss_texts=weights_of_texts(self.loss_text),
            levels=tuple(levels),
            form=self.form,
            granularity=self.granularity,
            tokens=self.tokens,
            seed=self.seed,
        )

    def sourced(self, name: str, changes: str) -> str:
        """Spells the origin of the curves: the estimator's name, and what makes the changes."""
        weights = weights_of_texts(self.loss_text)
        texts = "+".join(f"{weight:g} {text}" if weight < 1 else text for text, weight in weights.items())
        by = f"form={self.form}, granularity={self.granularity}, {changes}"
        return f"{name}({by}, loss_text={texts})"

    def curves(self, evidence: Curves, /) -> Curves:
        return evidence


def weights_of_texts(loss_text: str | Mapping[str, Any]) -> dict[str, float]:
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
