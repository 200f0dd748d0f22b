"""The predicted rise of the loss if a block is left out, from one gradient pass (`layerif/probe/skips.py`)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

from layerif.allocate.curves import Curves
from layerif.allocate.spans import block_curves, equal_costs
from layerif.checks import Seed, check_fields, listed
from layerif.estimators._base import CurveEstimator, described
from layerif.evidence import LayerSkips
from layerif.layers import Droppable, LayerMap
from layerif.probe.skips import Skips
from layerif.pruning.calibration import Calibration
from layerif.scores import AllocationKind


@dataclass(frozen=True, kw_only=True)
class SkipCurve(CurveEstimator):
    """Prices leaving out a block, its attention, its MLP or one of its experts, by z = −γᵀr at every token.

    r is what the unit adds to the hidden state, and γ the gradient of the window's mean loss there.

    Attributes:
        order: `first` is the mean over windows of Σ z, which may be below zero; `second` is that of ½·T·Σ z², with T
            the counted tokens of the window, the empirical Fisher's form with tokens taken as independent; `both` is
            their sum.
        unit: `block`, `sublayer` or `expert`; None: `block`.
        calibration: the windows whose loss is watched; None: 16 windows of 256 tokens of the embedded documentation.
        seed: chooses the windows where `calibration` is None.
    """

    kind: ClassVar[AllocationKind] = "blocks"

    order: Literal["second", "first", "both"] = "second"
    unit: Droppable | None = None
    calibration: Calibration | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    @property
    def needs(self) -> Skips:
        return Skips(self.calibration or Calibration(seed=self.seed), self.unit or "block")

    @property
    def source(self) -> str:
        return described(self, unit=self.unit or "block", calibration=(self.calibration or Calibration()).text)

    def equal(self, layers: LayerMap) -> Curves:
        return equal_costs(layers, self.unit or "block")

    def curves(self, evidence: LayerSkips, /) -> Curves:
        if evidence.unit == "expert":
            _warn_of_unreached(evidence)
        by_half = {"first": evidence.first, "second": evidence.second, "both": evidence.first + evidence.second}
        return block_curves(
            evidence.units,
            by_half[self.order],
            evidence.numel,
            evidence.unit,
            source=evidence.source,
            fingerprint=evidence.fingerprint,
        )


def _warn_of_unreached(evidence: LayerSkips) -> None:
    """Names the experts whose price is 0 because nothing was seen of them: they would be the first to be left out."""
    unreached = [name for name, sum_2 in zip(evidence.units, evidence.second.T, strict=True) if not bool(sum_2.any())]
    if unreached:
        warnings.warn(
            f"no calibration token reaches {listed(unreached, 4)} ({len(unreached)} of {len(evidence.units)} experts), "
            "or they add nothing to any, so that their price is 0; give more text (estimator.calibration)",
            RuntimeWarning,
            stacklevel=3,
        )
