"""The request for loss curves, and the form in which the store keeps them."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, get_args

import torch
from torch import Tensor, nn

from layerif.allocate.curves import Curves
from layerif.checks import how_many
from layerif.data.batches import batches
from layerif.layers import MatrixOrBlock
from layerif.models.blocks import context_length, weight_of
from layerif.models.loss import per_sample_loss
from layerif.probe.curves.measure import (
    Changes,
    CurveForm,
    CurveWorkload,
    curve_tile_bytes,
    curve_workload,
    grams_held,
    masks_of,
    measure_loss_curves,
)
from layerif.probe.curves.prices import diagonal_costs, effects
from layerif.probe.curves.text import LossText, batch_of
from layerif.probe.grams.gather import workload
from layerif.probe.grams.passes import Matrix, Passes
from layerif.probe.measurements import Load, Measurements, hash_of, hash_of_samples
from layerif.probe.request import Part, Planned, Request
from layerif.probe.store import MeasurementKind
from layerif.scores import AllocationKind
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)

WINDOWS, TASK = "windows", "task"
_CORNER = 1024  # rows and columns of the matrix that a plan times the changes on
_CHANGED_BY = {"sparsity": "pruner", "bits": "formats"}  # the part of a source that says what makes the changes
FEW_WINDOWS = 4  # below this the curves of a trial ranked noticeably worse


class Windows(Protocol):
    """Chosen windows of a text, see `layerif.pruning.calibration.Calibration`."""

    def batches(self, tokenizer: Any, max_positions: int | None = None) -> list[Tensor]:
        """Returns the windows as token ids (B×T each)."""
        ...


@dataclass(frozen=True)
class LossCurves(Request):
    """A request for the loss curves of all matrices that something changes. All processes measure them together.

    Attributes:
        changes: the pruner or the number formats whose changes are priced.
        calibration: the calibration windows, which a pruner takes its statistics of.
        loss_texts: the weight of each text whose loss is watched: `windows` are those of `calibration`, `task` the
            train rows that the probe chooses.
        levels: the sparsities above 0, or the bits, at which the loss is priced.
        form, granularity, tokens: see `measure_loss_curves`.
        seed: chooses the positions.
    """

    needs_dense_weights: ClassVar[bool] = True
    takes_loss: ClassVar[bool] = True

    changes: Changes
    calibration: Windows
    loss_texts: Mapping[str, float]
    levels: Sequence[float]
    form: CurveForm = "exact"
    granularity: MatrixOrBlock = "matrix"
    tokens: float = 1.0
    seed: int = 0

    @property
    def parts(self) -> tuple[Part, ...]:  # type: ignore[override]
        """The rows of the task that are looked at."""
        return ("train",) if TASK in self.loss_texts else ()

    @property
    def is_stepped(self) -> bool:
        """Tells if only the levels themselves can be had: n of m, or number formats."""
        return bool(self.changes.levels())

    @property
    def kind(self) -> AllocationKind:
        """The meaning of a level."""
        return self.changes.kind

    @property
    def reads_windows(self) -> bool:  # type: ignore[override]
        """Tells if the windows choose the weights or are a text whose loss is watched."""
        return self.changes.needs_inputs or WINDOWS in self.loss_texts

    def check(self, measurements: Measurements) -> None:
        if measurements.model.adapter:
            raise ValueError(
                "curves cannot price the weights under an adapter; merge it into a folder of its own "
                "(PEFT's merge_and_unload)"
            )
        num_windows = sum(map(len, self.windows(measurements)))
        if num_windows < FEW_WINDOWS and WINDOWS in self.loss_texts:
            warnings.warn(
                f"{how_many(num_windows, 'calibration window')} of loss curves rank the matrices poorly; 8 rank nearly "
                "as well as 16",
                RuntimeWarning,
                stacklevel=2,
            )

    def windows(self, measurements: Measurements) -> list[Tensor]:
        """Cuts the windows of the calibration text (B×T each)."""
        return self.calibration.batches(measurements.tokenizer, max_positions(measurements))

    def loss_text(self, measurements: Measurements) -> LossText:
        """Gives the samples whose loss is watched, with their weights."""
        found: list[Any] = []
        weights: list[Tensor] = []
        names: list[str] = []
        for text, weight in self.loss_texts.items():
            start = len(names)
            if text == WINDOWS:
                windows = self.windows(measurements)
                for batch_BT in windows:
                    indices = list(range(len(names), len(names) + len(batch_BT)))
                    found.append((indices, batch_of(batch_BT)))
                    names += [f"calibration window {index - start}" for index in indices]
            else:
                samples = measurements.samples()[0]
                chosen = batches(samples, measurements.probe.batch_size, measurements.pad_id)
                found += [([start + index for index in indices], batch) for indices, batch in chosen]
                names += measurements.names("train")
            number = len(names) - start
            weights.append(torch.full((number,), weight / number, dtype=torch.float64))
        return LossText(found, torch.cat(weights), names)

    def source(self, measurements: Measurements) -> dict[str, str]:
        """Says what the curves belong to, so that they are not spent elsewhere."""
        texts = ", ".join(f"{weight:g} {text}" if weight < 1 else text for text, weight in self.loss_texts.items())
        return source_of(measurements, self.changes, self.windows(measurements), texts)

    def planned(self, measurements: Measurements, skeleton: nn.Module) -> Planned:
        layers = measurements.layers().without(self.changes.skip)
        windows, loss_text = self.windows(measurements), self.loss_text(measurements)
        longest = max(batch["input_ids"].shape[1] for _, batch in loss_text.batches)
        places_V, _, is_second_V = loss_text.positions(longest, self.tokens, self.seed)
        grams = grams_held(masks_of(self.changes), self._observes_apart)
        kind = partial(curve_workload, places_V, is_second_V, len(self.levels), self.form, grams)
        num_processes, device = measurements.num_processes, torch.device(measurements.device)

        def operations(load: Any, matrix: Matrix) -> dict[str, float]:
            return {form: load.price_operations(matrix, form) for form in get_args(CurveForm)}

        return Planned(
            about=f"{len(layers.matrices)} matrices, changed by {self.changes.called} at {len(self.levels)} levels; "
            f"{len(loss_text.names)} samples, {len(places_V):,} positions looked at",
            layers=layers,
            scope="all",
            batch=loss_text.batches[0][1],
            workload=lambda reads_with: workload(
                skeleton, layers.matrices, loss_text.batches, (), reads_with, num_processes=num_processes, kind=kind
            ),
            form="materialised",
            tile_bytes=curve_tile_bytes(skeleton, layers.matrices, device),
            title="prices of all levels, by shape (outputs × inputs)",
            operations=operations,
            chosen=lambda load, matrix: self.form,
            rehearsal=self._rehearsal,
            per_weight=partial(self._changes_of_a_corner, skeleton, layers.matrices),
            forward_tokens=sum(each.numel() for each in windows) if self._observes_apart else 0,
        )

    def _rehearsal(self, passes: Passes, num_samples: int, device: torch.device) -> tuple[Callable[[], Any], float]:
        """Gives the price of one level of the largest matrix."""
        load = passes.workload
        assert isinstance(load, CurveWorkload)
        matrix = max(load.matrices, key=lambda matrix: matrix.num_out * matrix.num_in)
        num_positions = max(2, load.num_positions * num_samples // (load.num_train + load.num_val))
        input_VI = torch.randn(num_positions, matrix.num_in, device=device)
        delta_VO = torch.randn(num_positions, matrix.num_out, device=device)
        change_OI = torch.randn(matrix.num_out, matrix.num_in, device=device)
        operations = 2.0 * num_positions * matrix.num_out * matrix.num_in
        if self.form == "exact":
            rows = load.rows(matrix, passes.tile_bytes[matrix.name])
            return lambda: effects(input_VI, delta_VO, [change_OI], rows), operations
        weights_V = torch.ones(num_positions, dtype=torch.float64, device=device)
        is_second_V = torch.arange(num_positions, device=device) % 2 > 0
        return lambda: diagonal_costs(input_VI, delta_VO, weights_V, is_second_V, [change_OI.clone()]), operations

    def _changes_of_a_corner(
        self, skeleton: nn.Module, params: Sequence[str], device: torch.device
    ) -> tuple[Callable[[], Any], int]:
        """Gives the changes of all levels in a corner of the largest matrix, which is all of a small one."""
        num_out, num_in = max((weight_of(skeleton, param).shape for param in params), key=lambda shape: shape.numel())
        corner_OI = torch.randn(min(num_out, _CORNER), min(num_in, _CORNER), device=device)
        input_TI = torch.randn(2 * corner_OI.shape[1], corner_OI.shape[1], device=device)

        def choose() -> None:
            masks = masks_of(self.changes)
            shared = None if masks is None else masks.prepare(masks.observe(None, input_TI), 1, name="a trial")
            for _ in self.changes.changes_at(corner_OI, shared, self.levels):
                pass

        return choose, corner_OI.numel()

    @property
    def _observes_apart(self) -> bool:
        """Tells if the windows of a pruner are not the samples whose loss is watched."""
        return self.changes.needs_inputs and set(self.loss_texts) != {WINDOWS}

    def take(self, measurements: Measurements, load: Load) -> tuple[Curves, bool]:
        layers = measurements.layers().without(self.changes.skip)
        description = {
            "model": measurements.model.fingerprint(),
            "loss_curves": VERSIONS["loss_curves"],
            "loss": measurements.loss_name,
            "matrices": list(layers.matrices),
            _CHANGED_BY[self.kind]: self.changes.called,
            "levels": list(self.levels),
            "windows": hash_of_windows(self.windows(measurements)) if self.reads_windows else None,
            "loss_text": {
                text: [weight, hash_of_samples(measurements.samples()[0]) if text == TASK else None]
                for text, weight in self.loss_texts.items()
            },
            "form": self.form,
            "granularity": self.granularity,
            "tokens": [self.tokens, self.seed] if self.tokens < 1 else None,
        }
        source = self.source(measurements)

        def measured(key: str) -> Curves:
            probe = measurements.probe
            model = measurements.divided(load)
            log.info("loss curves: %d matrices, %s", len(layers.matrices), source["loss_text"])
            return measure_loss_curves(
                model,
                layers.matrices,
                self.changes,
                self.loss_text(measurements),
                self.levels,
                mask_windows=None if set(self.loss_texts) == {WINDOWS} else self.windows(measurements),
                form=self.form,
                granularity=self.granularity,
                tokens=self.tokens,
                seed=self.seed,
                memory_gb=probe.memory_gb,
                offload=probe.offload,
                partial=measurements.store.partial(key),
                loss=measurements.loss or per_sample_loss,
                is_stepped=self.is_stepped,
                source=source,
                fingerprint=key,
            )

        curves, reused = measurements.by_all(LOSS_CURVES, description, measured)
        if reused:
            log.info("loss curves from the store: %s… were measured before", curves.fingerprint[:12])
        return curves, reused


def source_of(
    measurements: Measurements, changes: Changes, windows: Sequence[Tensor], loss_text: str
) -> dict[str, str]:
    """Says what curves belong to: the model, what changes it, the windows that this reads, and the text of the loss."""
    return {
        "model": model_hash(measurements.model),
        _CHANGED_BY[changes.kind]: changes.called,
        "calibration": hash_of_windows(windows) if changes.needs_inputs else "none",
        "loss_text": loss_text,
    }


def model_hash(model: Any) -> str:
    """Hashes a model's weights; what is in memory and what is in a folder are hashed in two ways."""
    kind = "folder" if hasattr(model, "skeleton") else "memory"
    return f"{kind} {hash_of(model.fingerprint())}"


def hash_of_windows(windows: Sequence[Tensor]) -> str:
    """Hashes the token ids of windows, whatever their batches."""
    return hash_of([ids for batch in windows for ids in batch.tolist()])


def max_positions(measurements: Measurements) -> int | None:
    """Gives the most tokens that the model reads, without its weights; None where it has no limit."""
    skeleton: Any = getattr(measurements.model, "skeleton", measurements.model.load)
    return context_length(skeleton())


def _pack(curves: Curves) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {"sizes": curves.sizes.contiguous()}
    assert curves.by_half is not None
    tensors["by_half"] = curves.by_half.contiguous()
    header: dict[str, Any] = {
        "units": list(curves.units),
        "levels": list(curves.levels),
        "kind": curves.kind,
        "sense": curves.sense,
        "unit": curves.unit,
        "source": dict(curves.source),
        "is_stepped": curves.is_stepped,
    }
    return tensors, {"curves": json.dumps(header)}


def _unpack(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> Curves:
    about = json.loads(header["curves"])
    return Curves(
        units=tuple(about.pop("units")),
        levels=tuple(about.pop("levels")),
        costs=tensors["by_half"].sum(0),
        sizes=tensors["sizes"],
        by_half=tensors["by_half"],
        fingerprint=key,
        **about,
    )


LOSS_CURVES: MeasurementKind[Curves] = MeasurementKind("loss_curves", "curve passes", _pack, _unpack)
