"""Gains: what the leading directions of every matrix's mean train gradient do to the loss of the validation samples.

Letters in shape suffixes: S samples (N train, then M validation), T tokens, V the positions that are not padding, I
inputs and O outputs of a linear layer, R directions.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial as partial_of
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerif.allocate.gains import MOST_RANK
from layerif.data.batches import batches
from layerif.evidence import LayerGains, MatrixGains
from layerif.layers import LayerMap
from layerif.models.blocks import device_of, dtype_of, shape_of
from layerif.models.contexts import full_precision
from layerif.models.loss import Loss, per_sample_loss
from layerif.probe.curves.request import model_hash
from layerif.probe.directions import leading_directions, mean_gradient, projections, squared_norms
from layerif.probe.grams.factors import inputs_read_together
from layerif.probe.grams.gather import Found, Gathering, IndexedBatch, wanted_tile_bytes, workload
from layerif.probe.grams.passes import Matrix, Offload, Passes, Workload
from layerif.probe.grams.processes import Shards
from layerif.probe.measurements import Load, Measurements, hash_of_samples
from layerif.probe.request import Part, Planned, Request
from layerif.probe.store import MeasurementKind, layers_in
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)

# A matrix in up to six forms: mean gradient, the same in float64, and its decomposition.
_COPIES = 6
_TENSORS = ("strengths", "products", "curvatures", "mean_square", "rights")


@dataclass(frozen=True)
class Gains(Request):
    """A request for the directions of all matrices that adapters are put on. All processes measure them together.

    Attributes:
        target_modules: names of the linear layers, as PEFT takes them; None: all of the blocks.
        r_max: the directions of a matrix; None: as many as its rank, and 128 at most.
        seed: of the search for directions.
    """

    parts: ClassVar[tuple[Part, ...]] = ("train", "validation")
    takes_loss: ClassVar[bool] = True

    target_modules: tuple[str, ...] | None = None
    r_max: int | None = None
    seed: int = 0

    def layers(self, layers: LayerMap) -> LayerMap:
        """Gives the matrices that are measured.

        Raises:
            ValueError: a target is not a linear layer of the blocks, or `r_max` is above the rank of a matrix.
        """
        found = layers.only(self.target_modules, setting="method.target_modules").without_experts
        assert found.matrix_shapes is not None
        for param, shape in zip(found.matrices, found.matrix_shapes, strict=True):
            if self.r_max is not None and self.r_max > min(shape):
                raise ValueError(
                    f"estimator.r_max={self.r_max} is above the rank of {param.removesuffix('.weight')}, which has "
                    f"{shape[1]} inputs and {shape[0]} outputs; use at most {min(shape)}, or null"
                )
        return found

    def check(self, measurements: Measurements) -> None:
        if measurements.model.adapter:
            raise ValueError(
                "gains are those of the weights under a new adapter, and this model has one; merge it into a folder of "
                "its own (PEFT's merge_and_unload)"
            )
        self.layers(measurements.layers())

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerGains, bool]:
        layers = self.layers(measurements.layers())
        train, validation = measurements.samples()
        rows = {"train": hash_of_samples(train), "validation": hash_of_samples(validation)}
        description = {
            "model": measurements.model.fingerprint(),
            "gains": VERSIONS["gains"],
            "loss": measurements.loss_name,
            "matrices": list(layers.matrices),
            **rows,
            "directions": [self.r_max, self.seed],
        }
        source = {"model": model_hash(measurements.model), **rows}

        def measured(key: str) -> LayerGains:
            probe = measurements.probe
            model = measurements.divided(load)
            log.info("gains: %d + %d samples, %d matrices", len(train), len(validation), len(layers.matrices))
            return measure_gains(
                model,
                layers,
                *(list(batches(part, probe.batch_size, measurements.pad_id)) for part in (train, validation)),
                r_max=self.r_max,
                seed=self.seed,
                memory_gb=probe.memory_gb,
                offload=probe.offload,
                partial=measurements.store.partial(key),
                names=[name for part in self.parts for name in measurements.names(part)],
                loss=measurements.loss or per_sample_loss,
                source=source,
                fingerprint=key,
            )

        gains, reused = measurements.by_all(GAINS, description, measured)
        if reused:
            log.info("gains from the store: %s… were measured before", gains.fingerprint[:12])
        return gains, reused

    def planned(self, measurements: Measurements, skeleton: nn.Module) -> Planned:
        layers = self.layers(measurements.layers())
        train, validation = (
            list(batches(part, measurements.probe.batch_size, measurements.pad_id)) for part in measurements.samples()
        )
        samples = " + ".join(str(len(part)) for part in measurements.samples())
        kind = partial_of(GainWorkload, most_rank=self.r_max or MOST_RANK)
        num_processes, device = measurements.num_processes, torch.device(measurements.device)
        assert layers.matrix_shapes is not None
        largest = max(layers.matrix_shapes, key=lambda shape: shape[0] * shape[1])

        def decompose(device: torch.device) -> tuple[Callable[[], Any], int]:
            gradient_OI = torch.randn(largest, device=device)
            number = min(*largest, self.r_max or MOST_RANK)
            return lambda: leading_directions(gradient_OI, number), gradient_OI.numel()

        most = self.r_max or MOST_RANK
        return Planned(
            about=f"{len(layers.matrices)} matrices, up to {most} directions each; {samples} samples",
            layers=layers,
            scope="all",
            batch=train[0][1],
            workload=lambda reads_with: workload(
                skeleton, layers.matrices, train, validation, reads_with, num_processes=num_processes, kind=kind
            ),
            form="materialised",
            tile_bytes=_tile_bytes(skeleton, layers.matrices, device),
            title="mean gradients and their directions, by shape (outputs × inputs)",
            operations=lambda load, matrix: {"directions": load.operations(matrix, "materialised")},
            chosen=lambda load, matrix: "directions",
            rehearsal=_rehearsal,
            per_weight=decompose,
        )


def measure_gains(
    model: nn.Module,
    layers: LayerMap,
    train: Sequence[IndexedBatch],
    validation: Sequence[IndexedBatch],
    *,
    r_max: int | None = None,
    seed: int = 0,
    memory_gb: float | None = None,
    offload: Offload = "auto",
    partial: Path | None = None,
    names: Sequence[str] | None = None,
    loss: Loss = per_sample_loss,
    source: Mapping[str, str] | None = None,
    fingerprint: str = "none",
) -> LayerGains:
    """Measures the leading directions of every matrix's mean train gradient, and what they do to the samples.

    With several processes (torch.distributed) all call this with the same arguments, and each gets all results.

    Args:
        model: a causal language model; it is left as it was.
        layers: the blocks and matrices to measure, with shapes.
        train: batches with the position of each of their samples.
        validation: the same of the validation samples.
        r_max: see `Gains`.
        seed: see `Gains`.
        memory_gb: see `Probe`.
        offload: see `Probe`.
        partial: a folder for the results of an interrupted measurement; it must belong to this measurement alone.
        names: of the samples, train then validation, for messages.
        loss: gives the loss of each sample (B).
        source: see `LayerGains`.
        fingerprint: of the measurement.

    Raises:
        ValueError: names block and sample for a loss or gradient that is not finite, and the least that would do for a
            memory budget that is too small.
    """
    num_train, num_val = (sum(len(indices) for indices, _ in part) for part in (train, validation))
    together = [*train, *([[num_train + index for index in indices], batch] for indices, batch in validation)]
    names = names or [f"{'train' if s < num_train else 'validation'} sample {s}" for s in range(num_train + num_val)]
    shards = Shards.current()
    places_V = _places(together)
    is_second_M = torch.arange(num_val) % 2 > 0

    def directions(passes: Passes, matrix: Matrix, input_STI: Tensor, delta_STO: Tensor) -> Found:
        load = passes.workload
        assert isinstance(load, GainWorkload)
        tile, where_V = passes.tile_bytes[matrix.name], places_V.to(input_STI.device)
        rows, of_train_V = load.rows(matrix, tile), where_V[where_V < num_train * input_STI.shape[1]]
        train_input, train_delta = input_STI[:num_train], delta_STO[:num_train]
        with full_precision(), torch.no_grad():
            square_N = squared_norms(train_input, train_delta, tile)
            if not bool(square_N.isfinite().all()):
                sample = names[int((~square_N.isfinite()).nonzero()[0])]
                raise ValueError(
                    f"the gradient of {matrix.name} is not finite for {sample}; "
                    "look at that row, or load the model in float32 (model.dtype=float32)"
                )
            mean_OI = mean_gradient(train_input, train_delta, of_train_V, rows)
            left_OR, strengths_R, right_RI = leading_directions(mean_OI, load.rank(matrix), seed)
            found_SR = projections(input_STI, delta_STO, left_OR, right_RI, where_V, rows).cpu()
        validated_MR = found_SR[num_train:]
        by_half = [validated_MR[half].sum(0) / num_val for half in (~is_second_M, is_second_M)]
        return {
            "strengths": strengths_R.double(),
            "products": torch.stack(by_half),
            "curvatures": found_SR[:num_train].square().mean(0),
            "mean_square": square_N.mean() / mean_OI.numel(),
            "rights": right_RI.half(),
        }

    gathering = Gathering(
        model,
        together,
        names,
        partial=partial,
        shards=shards,
        loss=loss,
        kind="gains",
        by_token=True,
        advice="name other layers in method.target_modules",
    )
    found = gathering.each(
        layers.matrices,
        directions,
        lambda todo: workload(
            model,
            todo,
            train,
            validation,
            inputs_read_together(model, todo),
            num_processes=shards.size,
            kind=partial_of(GainWorkload, most_rank=r_max or MOST_RANK),
        ),
        form="materialised",
        memory_gb=memory_gb,
        offload=offload,
        tile_bytes=_tile_bytes(model, layers.matrices, device_of(model)),
    )
    return LayerGains(layers, {param: _gains(each) for param, each in found.items()}, source or {}, fingerprint)


@dataclass(frozen=True)
class GainWorkload(Workload):
    """The sizes of a measurement of gains, which holds a mean gradient and its directions, and no sample's gradient.

    Attributes:
        most_rank: the directions of a matrix whose rank is not lower.
    """

    most_rank: int = MOST_RANK

    def rank(self, matrix: Matrix) -> int:
        """Gives the number of directions of a matrix."""
        return min(self.most_rank, matrix.num_out, matrix.num_in)

    def operations(self, matrix: Matrix, form: Any) -> float:
        """Counts the operations of the mean gradient and of the projections, padding included."""
        of_gradient = 2.0 * self.num_train * self.longest * matrix.num_out * matrix.num_in
        num_positions = (self.num_train + self.num_val) * self.longest
        return of_gradient + 2.0 * num_positions * (matrix.num_out + matrix.num_in) * self.rank(matrix)

    def least_tile_bytes(self, matrix: Matrix, form: Any) -> float:
        return self._fixed_bytes(matrix) + max(self._row_bytes(matrix), 2.0 * self.longest**2 * self.work_itemsize)

    def rows(self, matrix: Matrix, tile_bytes: float) -> int:
        """Counts the positions that are multiplied together in a tile."""
        return max(1, int((tile_bytes - self._fixed_bytes(matrix)) / self._row_bytes(matrix)))

    def _fixed_bytes(self, matrix: Matrix) -> float:
        return float(_COPIES * matrix.num_out * matrix.num_in * self.work_itemsize)

    def _row_bytes(self, matrix: Matrix) -> float:
        """The bytes of a position: its copied factors, and its projections with their float64 product."""
        return float((matrix.num_out + matrix.num_in + 4 * self.rank(matrix)) * self.work_itemsize)


def _tile_bytes(model: nn.Module, params: Sequence[str], device: torch.device) -> float:
    """Gives the wanted bytes of a tile: the copies of the largest matrix, and a tile of positions."""
    sizes = [(math.prod(shape_of(model, param)), dtype_of(model, param).itemsize) for param in params]
    return wanted_tile_bytes(device) + max(float(_COPIES * numel * max(itemsize, 4)) for numel, itemsize in sizes)


def _places(together: Sequence[IndexedBatch]) -> Tensor:
    """Gives the positions that are not padding, among those of all samples laid out at the longest one's length."""
    longest = max(batch["input_ids"].shape[1] for _, batch in together)
    num_samples = sum(len(indices) for indices, _ in together)
    is_real_ST = torch.zeros(num_samples, longest, dtype=torch.bool)
    for indices, batch in together:
        mask_BT = batch["attention_mask"].bool().cpu()
        is_real_ST[list(indices), : mask_BT.shape[1]] = mask_BT
    return is_real_ST.flatten().nonzero()[:, 0]


def _rehearsal(passes: Passes, num_samples: int, device: torch.device) -> tuple[Callable[[], Any], float]:
    """Gives the products of the largest matrix."""
    load = passes.workload
    assert isinstance(load, GainWorkload)
    matrix = max(load.matrices, key=lambda matrix: matrix.num_out * matrix.num_in)
    input_STI = torch.randn(num_samples, load.longest, matrix.num_in, device=device)
    delta_STO = torch.randn(num_samples, load.longest, matrix.num_out, device=device)
    left_OR = torch.randn(matrix.num_out, load.rank(matrix), device=device)
    right_RI = torch.randn(load.rank(matrix), matrix.num_in, device=device)
    places_V = torch.arange(num_samples * load.longest, device=device)
    rows = load.rows(matrix, passes.tile_bytes[matrix.name])
    sides, product = matrix.num_out + matrix.num_in, matrix.num_out * matrix.num_in

    def work() -> None:
        mean_gradient(input_STI, delta_STO, places_V, rows)
        projections(input_STI, delta_STO, left_OR, right_RI, places_V, rows)

    return work, 2.0 * len(places_V) * (product + sides * load.rank(matrix))


def _gains(found: Mapping[str, Tensor]) -> MatrixGains:
    return MatrixGains(**{**found, "mean_square": float(found["mean_square"])})  # type: ignore[arg-type]


def _pack(gains: LayerGains) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {
        f"{param}/{name}": torch.as_tensor(getattr(each, name), dtype=None if name != "mean_square" else torch.float64)
        for param, each in gains.gains.items()
        for name in _TENSORS
    }
    return (
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {"layers": json.dumps(asdict(gains.layers)), "source": json.dumps(dict(gains.source))},
    )


def _unpack(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> LayerGains:
    layers = layers_in(header)
    gains = {param: _gains({name: tensors[f"{param}/{name}"] for name in _TENSORS}) for param in layers.matrices}
    return LayerGains(layers, gains, json.loads(header["source"]), key)


GAINS: MeasurementKind[LayerGains] = MeasurementKind("gains", "gain passes", _pack, _unpack)
