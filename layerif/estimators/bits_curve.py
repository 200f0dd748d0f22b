"""Curves of bits: the Fisher matrix's prediction of what each number format costs in each matrix.

`layerif/probe/curves/prices.py` has the formulas, with Δ = (W quantised and read back) − W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerif.estimators._curves import FisherCurve
from layerif.formats import formats_called
from layerif.probe.curves.formats import BitsCurves, Quantisation
from layerif.scores import AllocationKind


@dataclass(frozen=True, kw_only=True)
class BitsCurve(FisherCurve):
    """Prices every number format of every matrix (or block), in one gradient pass.

    Attributes:
        formats: `gguf` (those that the package `gguf` writes), `all` (with ours of round-to-nearest), or their names.
    """

    kind: ClassVar[AllocationKind] = "bits"

    formats: str | Sequence[str] = "gguf"

    def __post_init__(self) -> None:
        super().__post_init__()
        formats_called(self.formats, "estimator.formats")

    @property
    def needs(self) -> BitsCurves:
        changes = Quantisation(formats_called(self.formats))
        return self.asked(BitsCurves, changes, changes.levels())

    @property
    def source(self) -> str:
        return self.sourced("bits_curve", f"formats={self.needs.changes.called}")
