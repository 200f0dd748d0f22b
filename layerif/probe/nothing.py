"""The request of an estimator that measures nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.layers import LayerMap
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import Request


@dataclass(frozen=True)
class Nothing(Request):
    """A request for the names of the model's layers alone.

    Attributes:
        files: the files that the scores are read from.
    """

    keeps_matrices: ClassVar[bool] = True
    is_measured: ClassVar[bool] = False

    files: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        return self.files

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerMap, bool]:
        return measurements.layers(), False
