"""The gradients of single samples, projected to fewer numbers: an index that new samples can be compared with later.

Grams tie train and validation samples together when they are measured. Projected gradients of the train samples wait
for validation samples that nobody knows yet: their products with those are Grams, up to the error of the projection.

Letters in shape suffixes: S samples, T tokens, I inputs and O outputs of a linear layer, R numbers that are left of a
gradient, P parameters of a matrix.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from layerif.data.batches import batches
from layerif.evidence import LayerGradients
from layerif.files import Damaged, load_tensors
from layerif.layers import LayerMap
from layerif.models.blocks import shape_of
from layerif.models.contexts import full_precision
from layerif.models.loss import per_sample_loss
from layerif.probe.grams.factors import inputs_read_together
from layerif.probe.grams.gather import Found, Gathering, workload
from layerif.probe.grams.passes import Matrix, Passes
from layerif.probe.grams.processes import Shards
from layerif.probe.grams.projection import Projection
from layerif.probe.measurements import Load, Measurements, hash_of_samples
from layerif.probe.request import Part
from layerif.probe.store import MeasurementKind, layers_in
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)

_ITEMSIZE = 4  # bytes of a number in an index


def projection_size(model: nn.Module, layers: LayerMap, num_samples: int, gigabytes: float) -> int:
    """Gives the largest projection (dimensions of a side) whose gradients fit into so many gigabytes, at least 1.

    It is never more than the widest side, from which on gradients are exact.

    Args:
        model: holds the matrices.
        layers: the matrices.
        num_samples: S.
        gigabytes: for the gradients of all samples.
    """
    shapes = [shape_of(model, param) for param in layers.matrices]
    low, high = 1, max(max(shape) for shape in shapes)
    while low < high:
        middle = (low + high + 1) // 2
        numbers = sum(min(num_out, middle) * min(num_in, middle) for num_out, num_in in shapes)
        low, high = (middle, high) if num_samples * numbers * _ITEMSIZE <= gigabytes * 1e9 else (low, middle - 1)
    return low


def is_exact(model: nn.Module, layers: LayerMap, size: int) -> bool:
    """Tells if a projection to `size` dimensions leaves every gradient as it is."""
    return all(max(shape_of(model, param)) <= size for param in layers.matrices)


def projected_gradients(
    measurements: Measurements, part: Part, load: Load, *, size: int, seed: int
) -> tuple[LayerGradients, bool]:
    """Measures the projected gradients of the samples of a part, unless the store has them.

    Args:
        measurements: the model, the samples and the store.
        part: train or validation.
        load: gives the model, and is called only if something is measured.
        size: dimensions of the projection, for each side of a matrix.
        seed: of the projection; only gradients of the same size and seed have products.

    Returns:
        The gradients in float32, and whether the store had them.
    """
    description = _description(measurements, part, [size, seed])

    def measure(key: str) -> LayerGradients:
        return _measured(measurements, part, measurements.divided(load), Projection(size, seed), key)

    return measurements.by_all(GRADIENTS, description, measure)


def read_index(file: Path, measurements: Measurements) -> tuple[LayerGradients, int, int]:
    """Reads the projected gradients of the train samples from a file of some store.

    Args:
        file: the file.
        measurements: the model and the samples that the file must be of.

    Returns:
        The gradients, and the size and the seed of their projection.

    Raises:
        ValueError: the file is not an index, or one of another model or of other rows.
    """
    size, seed = check_index(file, measurements)
    try:
        tensors, header = load_tensors(file)
    except Damaged as error:
        raise ValueError(f"{file} is damaged: {error}; use another copy, or leave it out to measure again") from error
    return _unpack(tensors, header, file.stem), size, seed


def check_index(file: Path, measurements: Measurements) -> tuple[int, int]:
    """Refuses an index of another model, of other rows or of another measurement, by its header.

    Returns:
        The size and the seed of its projection.

    Raises:
        ValueError: says what differs.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            header: dict[str, Any] = opened.metadata() or {}
        description = json.loads(header["description"])
        size, seed = description["gradients_projected_to"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"method.index={str(file)!r} is not an index: {error}; give a file that method=rows with method.query left "
            "in the folder gradients of a store"
        ) from error
    wanted = _description(measurements, "train", [size, seed])
    for name, what in _DIFFERENCES.items():
        if description.get(name) != wanted[name]:
            raise ValueError(
                f"method.index={str(file)!r} is of {what}; leave it out, and an index of this model and these rows is "
                "taken from the store or made"
            )
    return size, seed


_DIFFERENCES = {
    "model": "another model",
    "samples": "other train rows, or of rows that the probe reads in another way",
    "scope": "another probe.scope",
    "parameters": "other probe.parameters",
    "skip_unsupported": "other matrices (probe.skip_unsupported)",
    "matrices": "other matrices, which another version of layerif took from this probe.scope",
    "loss": "another loss",
    "gradients": "another version of layerif",
}


def _description(measurements: Measurements, part: Part, projection: list[int]) -> dict[str, Any]:
    samples = measurements.samples()[part == "validation"]
    probe = measurements.probe
    return {
        "gradients": VERSIONS["gradients"],
        "loss": measurements.loss_name,
        "model": measurements.model.fingerprint(),
        "scope": probe.scope,
        "parameters": probe.parameters,
        "skip_unsupported": probe.skip_unsupported,
        "matrices": measurements.hash_of_matrices,
        "samples": hash_of_samples(samples),
        "gradients_projected_to": projection,
    }


def _measured(
    measurements: Measurements, part: Part, model: nn.Module, projection: Projection, key: str
) -> LayerGradients:
    probe, layers = measurements.probe, measurements.measured_layers(model)
    samples, names = measurements.samples()[part == "validation"], measurements.names(part)
    batched = list(batches(samples, probe.batch_size, measurements.pad_id))
    log.info("gradients of %d samples in %d layers", len(samples), len(layers.names))

    def lay_flat(passes: Passes, matrix: Matrix, input_STI: Tensor, delta_SOT: Tensor) -> Found:
        with full_precision():
            gradient_SR = torch.bmm(delta_SOT, input_STI).flatten(1)
        if not bool(gradient_SR.isfinite().all()):
            sample = names[int((~gradient_SR.isfinite()).any(dim=1).nonzero()[0])]
            raise ValueError(
                f"the gradient of {matrix.name} is not finite for {sample}; "
                "look at that row, or load the model in float32 (model.dtype=float32)"
            )
        return {"gradients": gradient_SR.float()}

    shards = Shards.current()
    gathering = Gathering(
        model,
        batched,
        names,
        projection,
        measurements.store.partial(key),
        shards,
        measurements.loss or per_sample_loss,
        kind="gradients",
    )
    found = gathering.each(
        layers.matrices,
        lay_flat,
        lambda todo: workload(model, todo, batched, [], inputs_read_together(model, todo), projection, shards.size),
        memory_gb=probe.memory_gb,
        offload=probe.offload,
    )
    numel = {param: math.prod(shape_of(model, param)) for param in layers.matrices}
    return LayerGradients(layers, {param: each["gradients"] for param, each in found.items()}, numel, key)


def _pack(found: LayerGradients) -> tuple[dict[str, Tensor], dict[str, str]]:
    return dict(found.gradients), {"layers": json.dumps(asdict(found.layers)), "numel": json.dumps(dict(found.numel))}


def _unpack(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> LayerGradients:
    return LayerGradients(layers_in(header), tensors, json.loads(header["numel"]), key)


GRADIENTS = MeasurementKind("gradients", "passes of projected gradients", _pack, _unpack)
