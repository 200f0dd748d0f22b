"""The request for the curves of number formats, and the error that each format makes, which it leaves some out by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from layerif.allocate.curves import Curves
from layerif.formats import Format, check_rows, format_of, relative_error, reproduces, spelt_formats
from layerif.models.blocks import bare, weight_of
from layerif.probe.curves.request import LossCurves
from layerif.probe.measurements import Load, Measurements
from layerif.probe.store import MeasurementKind
from layerif.scores import AllocationKind
from layerif.versions import VERSIONS

FORMAT_ERRORS: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("format_errors", "errors of number formats")


@dataclass(frozen=True)
class Quantisation:
    """The change that each of some number formats makes in a weight; its levels are their bits."""

    formats: tuple[Format, ...]

    @property
    def kind(self) -> AllocationKind:
        return "bits"

    @property
    def skip(self) -> tuple[str, ...]:
        return ()

    @property
    def needs_inputs(self) -> bool:
        return False

    @property
    def called(self) -> str:
        return ", ".join(each.name for each in self.formats)

    def levels(self) -> tuple[float, ...]:
        return tuple(each.bits for each in self.formats)

    def changes_at(self, weight: Tensor, shared: Any, levels: Sequence[float], /) -> Iterator[Tensor]:
        for level in levels:
            found = format_of(level, self.formats)
            assert found is not None
            yield found(weight).sub_(weight)


@dataclass(frozen=True)
class BitsCurves(LossCurves):
    """A request for the curves of number formats, without those that give the model back as it was."""

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats that were asked for."""
        assert isinstance(self.changes, Quantisation)
        return self.changes.formats

    def check(self, measurements: Measurements) -> None:
        super().check(measurements)
        check_widths(measurements, self.formats)

    def take(self, measurements: Measurements, load: Load) -> tuple[Curves, bool]:
        changes = Quantisation(kept_formats(measurements, self.formats, load))
        return super(BitsCurves, replace(self, changes=changes, levels=changes.levels())).take(measurements, load)

    def notes(self, evidence: Curves) -> tuple[str, ...]:
        kept = [each for each in self.formats if each.bits in evidence.levels]
        return left_out(self.formats, kept)


def check_widths(measurements: Measurements, formats: Sequence[Format]) -> None:
    """Refuses a format whose blocks do not divide the rows of a matrix of the model, see `check_rows`."""
    skeleton: Any = getattr(measurements.model, "skeleton", measurements.model.load)
    model = bare(skeleton())
    params = measurements.layers().matrices
    check_rows(formats, {name.removesuffix(".weight"): weight_of(model, name).shape[1] for name in params})


def kept_formats(measurements: Measurements, formats: Sequence[Format], load: Load) -> tuple[Format, ...]:
    """Gives the formats that change a model: its weights may stand on the grid of one, which would then cost nothing.

    Args:
        measurements: the model, and the store that keeps the errors.
        formats: all that may be spent.
        load: gives the model, and is called only if the store does not know the errors.

    Raises:
        ValueError: none is left.
    """
    params = measurements.layers().matrices
    load = cache(load)

    def error(each: Format) -> float:
        """Gives the error of one format. The store keeps each apart, so that another choice of formats finds it."""

        def compute() -> dict[str, Tensor]:
            model = bare(measurements.whole(load))
            found = relative_error([weight_of(model, param) for param in params], each)
            return {"error": torch.tensor(found, dtype=torch.float64)}

        version = VERSIONS["format_errors"]
        tensors, _, _ = measurements.by_the_first(FORMAT_ERRORS, compute, format_errors=version, format=each.name)
        return tensors["error"].item()

    kept = tuple(each for each in formats if not reproduces(error(each)))
    if not kept:
        names = ", ".join(each.name for each in formats)
        raise ValueError(
            f"the weights stand on the grid of {names}, so that there is nothing to quantise; give other formats"
        )
    return kept


def left_out(formats: Sequence[Format], kept: Sequence[Format]) -> tuple[str, ...]:
    """Gives the note that names the formats left out; none where all were kept."""
    out = [each for each in formats if each not in kept]
    if not out:
        return ()
    verb = "reproduces" if len(out) == 1 else "reproduce"
    return (
        f"left out: {spelt_formats(out)} {verb} the weights of this model to 1e-4, because they were quantised to that "
        "grid before; figures of other formats are of a model that has gone through it",
    )
