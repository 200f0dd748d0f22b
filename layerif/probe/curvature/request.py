"""The request for curvature, and the form in which the store keeps it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerif.data.batches import batches
from layerif.evidence import DAMPINGS, LayerCurvature
from layerif.models.loss import per_sample_loss
from layerif.probe.curvature.bases import Spectrum, moments
from layerif.probe.curvature.measure import (
    MEAN_SQUARE,
    CurvatureWorkload,
    Queries,
    curvature_in,
    influences,
    measure_curvature,
    query_weights,
)
from layerif.probe.grams.gather import wanted_tile_bytes, workload
from layerif.probe.grams.passes import Matrix, Passes
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import Part, Planned, Request
from layerif.probe.store import MeasurementKind, Unstored, layers_in
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curvature(Request):
    """A request for influence under the curvature of every matrix. All processes measure it together.

    Attributes:
        spectra: the approximations of the curvature.
        queries: see `measure_curvature`. The store does not keep the influence on `each` of them, which is large.
        dampings: see `measure_curvature`; the store keeps all of `DAMPINGS` alone.
    """

    parts: ClassVar[tuple[Part, ...]] = ("train", "validation")
    takes_loss: ClassVar[bool] = True
    keeps_matrices: ClassVar[bool] = True

    spectra: tuple[Spectrum, ...] = ("kfac", "ekfac")
    queries: Queries = "halves"
    dampings: tuple[float, ...] = DAMPINGS

    def check(self, measurements: Measurements) -> None:
        measurements.check_adapter_of_lora()
        if measurements.probe.projection is not None:
            raise ValueError(
                f"probe.projection={measurements.probe.projection} leaves no curvature: {' and '.join(self.spectra)} "
                "work on whole gradients; leave it null, or take an estimator on Grams, such as exact"
            )

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerCurvature, bool]:
        if self.queries == "each" or self.dampings != DAMPINGS:
            measurements = replace(measurements, store=Unstored())
        description = measurements.description(
            curvature=VERSIONS["curvature"],
            spectra=list(self.spectra),
            queries=self.queries,
            dampings=list(self.dampings),
        )

        def measured(key: str) -> LayerCurvature:
            probe = measurements.probe
            model = measurements.divided(load)
            layers = measurements.measured_layers(model)
            train, validation = measurements.samples()
            log.info("curvature: %d + %d samples in %d layers", len(train), len(validation), len(layers.names))
            return measure_curvature(
                model,
                layers,
                list(batches(train, probe.batch_size, measurements.pad_id)),
                list(batches(validation, probe.batch_size, measurements.pad_id)),
                spectra=self.spectra,
                queries=self.queries,
                dampings=self.dampings,
                memory_gb=probe.memory_gb,
                offload=probe.offload,
                partial=measurements.store.partial(key),
                fingerprint=key,
                names=[name for part in self.parts for name in measurements.names(part)],
                loss=measurements.loss or per_sample_loss,
            )

        found, reused = measurements.by_all(CURVATURE, description, measured)
        if reused:
            log.info("scores from the store: %s… was measured before, no gradient pass", found.fingerprint[:12])
        return found, reused

    def planned(self, measurements: Measurements, skeleton: nn.Module) -> Planned:
        probe = measurements.probe
        layers = measurements.measured_layers(skeleton)
        train, validation = (
            list(batches(part, probe.batch_size, measurements.pad_id)) for part in measurements.samples()
        )
        num_train, num_val = map(len, measurements.samples())
        num_queries = len(query_weights(self.queries, num_val))
        kind = partial(
            CurvatureWorkload, num_queries=num_queries, num_dampings=len(self.dampings), spectra=self.spectra
        )
        return Planned(
            about=f"{len(layers.matrices)} matrices ({probe.parameters}, {probe.scope}); {num_train} + {num_val} "
            "samples",
            layers=layers,
            scope=probe.scope,
            batch=train[0][1],
            workload=lambda reads_with: workload(
                skeleton,
                layers.matrices,
                train,
                validation,
                reads_with,
                num_processes=measurements.num_processes,
                kind=kind,
            ),
            form="materialised",
            tile_bytes=wanted_tile_bytes(torch.device(measurements.device)),
            title=f"curvature ({', '.join(self.spectra)}), by shape (outputs × inputs)",
            operations=lambda load, matrix: {"curvature": load.operations(matrix, "materialised")},
            chosen=lambda load, matrix: "curvature",
            rehearsal=self._rehearsal,
        )

    def _rehearsal(self, passes: Passes, num_samples: int, device: torch.device) -> tuple[Callable[[], Any], float]:
        """Gives the work on the matrix that costs most."""
        load = passes.workload
        assert isinstance(load, CurvatureWorkload)
        matrix: Matrix = max(load.matrices, key=lambda matrix: load.operations(matrix, "materialised"))
        num_val = min(load.num_val, max(1, num_samples * load.num_val // (load.num_train + load.num_val)))
        part = replace(load, num_train=num_samples - num_val, num_val=num_val)
        queries_QM = query_weights(self.queries, num_val)
        input_STI = torch.randn(num_samples, load.longest, matrix.num_in, device=device)
        delta_SOT = torch.randn(num_samples, matrix.num_out, load.longest, device=device)
        tile = passes.tile_bytes[matrix.name]

        def work() -> None:
            chunk, with_shampoo = part.chunk(matrix, tile), "shampoo" in self.spectra
            seen = moments(
                input_STI[: part.num_train], delta_SOT[: part.num_train], with_shampoo=with_shampoo, chunk=chunk
            )
            num_rows = part.slab_rows(matrix, tile)
            influences(
                input_STI, delta_SOT, seen, self.spectra, queries_QM, self.dampings, num_rows=num_rows, chunk=chunk
            )

        part = replace(part, num_queries=len(queries_QM))
        return work, part.operations(matrix, "materialised")


def _pack(measured: LayerCurvature) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {
        f"{param}/{name}": influence.contiguous()
        for param, matrix in measured.matrices.items()
        for name, influence in matrix.influences.items()
    }
    for param, matrix in measured.matrices.items():
        tensors[f"{param}/{MEAN_SQUARE}"] = torch.tensor(matrix.mean_square, dtype=torch.float64)
    return tensors, {"layers": json.dumps(asdict(measured.layers))}


def _unpack(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> LayerCurvature:
    by_matrix: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        param, _, part = name.rpartition("/")
        by_matrix.setdefault(param, {})[part] = tensor
    layers = layers_in(header)
    return LayerCurvature(layers, {param: curvature_in(by_matrix[param]) for param in layers.matrices}, key)


CURVATURE = MeasurementKind("curvature", "curvature passes", _pack, _unpack)
