"""The request for Grams at several checkpoints of one training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from layerif.evidence import CheckpointGrams
from layerif.probe.grams.request import Grams
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import Part, Planned, Request


@dataclass(frozen=True)
class CheckpointPasses(Request):
    """A request for the Grams of the samples at every checkpoint.

    Attributes:
        folders: adapters or whole models, in the order of training. A checkpoint of another model is refused before
            any is measured.
    """

    keeps_matrices: ClassVar[bool] = True
    parts: ClassVar[tuple[Part, ...]] = ("train", "validation")
    takes_loss: ClassVar[bool] = True

    folders: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return self.folders

    def check(self, measurements: Measurements) -> None:
        for folder in self.folders:
            measurements.model.at(folder)

    def take(self, measurements: Measurements, load: Load) -> tuple[CheckpointGrams, bool]:
        models = [measurements.model.at(folder) for folder in self.folders]
        taken = [
            Grams().take(replace(measurements, model=at), lambda at=at: at.load().to(measurements.device))  # type: ignore[arg-type]
            for at in models
        ]
        return CheckpointGrams(tuple(grams for grams, _ in taken)), all(reused for _, reused in taken)

    def planned(self, measurements: Measurements, skeleton: nn.Module) -> Planned | None:
        return replace(Grams().planned(measurements, skeleton), num_models=len(self.folders))

    def approximations(self, measurements: Measurements) -> list[str]:
        return Grams().approximations(measurements)
