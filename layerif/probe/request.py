"""The form in which an estimator asks for its evidence.

Each kind of evidence is one file in this room. It holds the measurement, as a function of a model and samples, and a
request: a small frozen dataclass that derives from `Request`. An estimator names its request as `needs`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from layerif.probe.measurements import Load, Measurements

Part = Literal["train", "validation"]


class NotCompared(Exception):
    """Says why evidence that is not exact is not compared with exact evidence."""


class Request(ABC):
    """A request for one kind of evidence.

    Attributes:
        parts: the parts of the task that the evidence is measured on. Evidence of both parts keeps the samples apart
            and has `halves`; evidence of `train` alone cannot be taken apart again.
        is_measured: False where the evidence costs nothing.
        takes_loss: True where the evidence is measured with `Measurements.loss`.
    """

    parts: ClassVar[tuple[Part, ...]] = ()
    is_measured: ClassVar[bool] = True
    takes_loss: ClassVar[bool] = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The files and folders whose content the evidence depends on, besides the model and the rows."""
        return ()

    def check(self, measurements: Measurements) -> None:  # noqa: B027 - most kinds have nothing to refuse
        """Refuses what cannot be measured, before any work.

        Raises:
            ValueError: says which setting is missing or does not fit.
        """

    @abstractmethod
    def take(self, measurements: Measurements, load: Load) -> tuple[Any, bool]:
        """Measures the evidence, or reads it from the store.

        Args:
            measurements: the model, the samples and the store.
            load: gives the model on its device. It is called only if something is measured.

        Returns:
            The evidence, and whether the store had all of it.
        """

    def approximations(self, measurements: Measurements) -> list[str]:
        """Names what makes the evidence differ from exact evidence in float32; empty where nothing does."""
        return [measurements.model.dtype] if self.parts and measurements.is_half_precision else []

    def with_exact(self, measurements: Measurements, evidence: Any) -> tuple[Any, Any]:
        """Measures some of the samples exactly.

        Returns:
            The evidence of these samples out of `evidence`, and the exact evidence of the same samples.

        Raises:
            NotCompared: says why this is not possible.
        """
        raise NotCompared("only Grams of one model are")

    def notes(self, evidence: Any) -> tuple[str, ...]:
        """Gives the notes on this evidence for the record."""
        return ()
