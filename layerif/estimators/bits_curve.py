"""Curves of bits: the Fisher matrix's prediction of what each number format costs in each matrix.

`layerif/probe/curves/prices.py` has the formulas, with Δ = (W quantised and read back) − W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from annotated_types import Gt, Le
from torch import Tensor

from layerif.allocate.curves import Curves
from layerif.checks import Seed, check_fields
from layerif.estimators._base import CurveEstimator
from layerif.estimators.loss_curve import spelt_texts, weights_of_texts
from layerif.formats import Format, check_rows, format_of, formats_called, relative_errors, reproduces, spelt_formats
from layerif.layers import Granularity
from layerif.models.blocks import bare
from layerif.probe.curves.measure import CurveForm
from layerif.probe.curves.request import WINDOWS, LossCurves
from layerif.probe.measurements import Load, Measurements
from layerif.probe.store import MeasurementKind
from layerif.pruning.calibration import Calibration
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
    check_rows(formats, {name.removesuffix(".weight"): model.get_parameter(name).shape[1] for name in params})


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

    def compute() -> dict[str, Tensor]:
        model = bare(measurements.whole(load))
        return {"errors": relative_errors([model.get_parameter(param) for param in params], formats)}

    names = [each.name for each in formats]
    tensors, _, _ = measurements.by_the_first(
        FORMAT_ERRORS, compute, format_errors=VERSIONS["format_errors"], formats=names
    )
    errors = tensors["errors"].tolist()
    kept = tuple(each for each, error in zip(formats, errors, strict=True) if not reproduces(error))
    if not kept:
        raise ValueError(
            f"the weights stand on the grid of {', '.join(names)}, so that there is nothing to quantise; give other "
            "formats in method.formats"
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


@dataclass(frozen=True, kw_only=True)
class BitsCurve(CurveEstimator):
    """Prices every number format of every matrix (or block), in one gradient pass.

    Attributes:
        formats: `gguf` (those that the package `gguf` writes), `all` (with ours of round-to-nearest), or their names.
        form: `exact` squares the effect of the whole change at each position; `diagonal` adds the squares of single
            weights' effects, which costs less.
        granularity: a curve per matrix, or per block.
        calibration: the windows; None: 16 windows of 256 tokens of the embedded documentation.
        loss_text: the text whose loss is watched: `windows` (those of `calibration`), `task` (the probe's train rows),
            or a weight for each of them.
        tokens: the share of the positions that is looked at, chosen by `seed`; 1 takes all.
        seed: chooses the positions, and the windows where `calibration` is None.
    """

    kind: ClassVar[AllocationKind] = "bits"

    formats: str | Sequence[str] = "gguf"
    form: CurveForm = "exact"
    granularity: Granularity = "matrix"
    calibration: Calibration | None = None
    loss_text: str | Mapping[str, float] = WINDOWS
    tokens: Annotated[float, Gt(0), Le(1), "1 takes all positions"] = 0.45
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")
        weights_of_texts(self.loss_text)
        formats_called(self.formats)

    @property
    def needs(self) -> BitsCurves:
        changes = Quantisation(formats_called(self.formats))
        return BitsCurves(
            changes=changes,
            mask_text=self.calibration or Calibration(seed=self.seed),
            loss_texts=weights_of_texts(self.loss_text),
            levels=changes.levels(),
            form=self.form,
            granularity=self.granularity,
            tokens=self.tokens,
            seed=self.seed,
        )

    @property
    def source(self) -> str:
        by = f"form={self.form}, granularity={self.granularity}, formats={self.needs.changes.called}"
        return f"bits_curve({by}, loss_text={spelt_texts(self.loss_text)})"

    def curves(self, evidence: Curves, /) -> Curves:
        return evidence
