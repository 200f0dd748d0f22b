"""The request for Grams, and the form in which the store keeps them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerif.data.batches import batches
from layerif.evidence import LayerGrams
from layerif.models.loss import per_sample_loss
from layerif.probe.grams.gather import wanted_tile_bytes, workload
from layerif.probe.grams.measure import gram_in, measure, tensors_of
from layerif.probe.grams.passes import Passes
from layerif.probe.grams.products import FORMS, gram
from layerif.probe.grams.projection import Projection
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import NotCompared, Part, Planned, Request
from layerif.probe.store import MeasurementKind, layers_in
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grams(Request):
    """A request for the Grams of the samples' gradients. All processes measure them together."""

    keeps_matrices: ClassVar[bool] = True
    parts: ClassVar[tuple[Part, ...]] = ("train", "validation")
    takes_loss: ClassVar[bool] = True

    def check(self, measurements: Measurements) -> None:
        measurements.check_adapter_of_lora()

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerGrams, bool]:
        probe = measurements.probe
        projection = [probe.projection, probe.projection_seed] if probe.projection else None
        description = measurements.description(probe=VERSIONS["probe"], projection=projection)
        grams, reused = measurements.by_all(GRAMS, description, lambda key: _measured(measurements, load, key))
        if reused:
            log.info("scores from the store: %s… was measured before, no gradient pass", grams.fingerprint[:12])
        return grams, reused

    def planned(self, measurements: Measurements, skeleton: nn.Module) -> Planned:
        probe, num_processes = measurements.probe, measurements.num_processes
        layers = measurements.measured_layers(skeleton)
        train, validation = (
            list(batches(part, probe.batch_size, measurements.pad_id)) for part in measurements.samples()
        )
        projection = Projection(probe.projection, probe.projection_seed) if probe.projection else None
        samples = " + ".join(str(len(part)) for part in measurements.samples())
        return Planned(
            about=f"{len(layers.matrices)} matrices ({probe.parameters}, {probe.scope}); {samples} samples",
            layers=layers,
            scope=probe.scope,
            batch=train[0][1],
            workload=lambda reads_with: workload(
                skeleton, layers.matrices, train, validation, reads_with, projection, num_processes
            ),
            form=probe.form,
            tile_bytes=wanted_tile_bytes(torch.device(measurements.device)),
            title="inner products, by shape (outputs × inputs)",
            operations=lambda load, matrix: {form: load.operations(matrix, form) for form in FORMS},
            chosen=lambda load, matrix: load.form(matrix, probe.form),
            rehearsal=_rehearsal,
        )

    def approximations(self, measurements: Measurements) -> list[str]:
        size = measurements.probe.projection
        return [
            *super().approximations(measurements),
            *([] if size is None else [f"a projection to {size} dimensions"]),
        ]

    def with_exact(self, measurements: Measurements, evidence: LayerGrams) -> tuple[LayerGrams, LayerGrams]:
        """Measures `probe.fidelity_samples` of the samples without projection and in float32."""
        model, probe = measurements.model, measurements.probe
        if not model.has_dense_weights:
            raise NotCompared("the weights as they were before they were quantised are not there")
        exact = replace(
            measurements,
            model=model.in_dtype("float64" if model.dtype == "float64" else "float32"),
            probe=replace(
                probe,
                projection=None,
                num_train=min(probe.num_train, probe.fidelity_samples),
                num_validation=min(probe.num_validation, probe.fidelity_samples // 2),
            ),
        )
        try:
            reference, _ = self.take(exact, lambda: exact.model.load().to(exact.device))  # type: ignore[arg-type]
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            raise NotCompared(
                "a second model, in float32, does not fit the memory; probe.fidelity_samples=0 does not try"
            ) from error
        rows = [torch.tensor([measurements.rows(part).index(row) for row in exact.rows(part)]) for part in self.parts]
        return evidence.select(*rows), reference


def _measured(measurements: Measurements, load: Load, key: str) -> LayerGrams:
    probe = measurements.probe
    model = measurements.divided(load)
    layers = measurements.measured_layers(model)
    train, validation = measurements.samples()
    log.info("gradient pass: %d + %d samples in %d layers", len(train), len(validation), len(layers.names))
    return measure(
        model,
        layers,
        list(batches(train, probe.batch_size, measurements.pad_id)),
        list(batches(validation, probe.batch_size, measurements.pad_id)),
        form=probe.form,
        memory_gb=probe.memory_gb,
        offload=probe.offload,
        projection=Projection(probe.projection, probe.projection_seed) if probe.projection else None,
        partial=measurements.store.partial(key),
        fingerprint=key,
        loss=measurements.loss or per_sample_loss,
        names=[name for part in Grams.parts for name in measurements.names(part)],
    )


def _rehearsal(passes: Passes, num_samples: int, device: torch.device) -> tuple[Callable[[], Any], float]:
    """Gives the products of the matrix that costs most."""
    load = passes.workload
    matrix = max(load.matrices, key=lambda matrix: load.operations(matrix, passes.forms[matrix.name]))
    form, tile = passes.forms[matrix.name], passes.tile_bytes[matrix.name]
    num_val = min(load.num_val, max(1, num_samples * load.num_val // (load.num_train + load.num_val)))
    part = replace(load, num_train=num_samples - num_val, num_val=num_val)
    input_STI = torch.randn(num_samples, load.longest, matrix.num_in, device=device)
    delta_SOT = torch.randn(num_samples, matrix.num_out, load.longest, device=device)
    return lambda: gram(form, input_STI, delta_SOT, part.num_train, tile), part.operations(matrix, form)


def _pack(grams: LayerGrams) -> tuple[dict[str, Tensor], dict[str, str]]:
    numel = {param: gram.numel for param, gram in grams.grams.items()}
    return tensors_of(grams.grams), {"layers": json.dumps(asdict(grams.layers)), "numel": json.dumps(numel)}


def _unpack(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> LayerGrams:
    grams = {param: gram_in(tensors, param, numel) for param, numel in json.loads(header["numel"]).items()}
    return LayerGrams(layers_in(header), grams, key)


GRAMS = MeasurementKind("grams", "gradient passes", _pack, _unpack)
