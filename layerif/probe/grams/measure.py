"""The measurement of Grams: every sample runs forward and backward, then one matrix after the other is multiplied.

Letters in shape suffixes: T tokens, I inputs and O outputs of a linear layer, S all samples (N train, then M
validation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from layerif.evidence import GRAM_TENSORS, LayerGrams, MatrixGram
from layerif.layers import LayerMap
from layerif.models.blocks import shape_of
from layerif.models.loss import Loss, per_sample_loss
from layerif.probe.grams import products
from layerif.probe.grams.factors import inputs_read_together
from layerif.probe.grams.gather import Found, Gathering, IndexedBatch, workload
from layerif.probe.grams.passes import Choice, Matrix, Offload, Passes
from layerif.probe.grams.processes import Shards
from layerif.probe.grams.projection import Projection


def measure(
    model: nn.Module,
    layers: LayerMap,
    train: Sequence[IndexedBatch],
    validation: Sequence[IndexedBatch],
    *,
    form: Choice = "auto",
    memory_gb: float | None = None,
    offload: Offload = "auto",
    projection: Projection | None = None,
    partial: Path | None = None,
    fingerprint: str = "",
    names: Sequence[str] | None = None,
    loss: Loss = per_sample_loss,
) -> LayerGrams:
    """Measures the Grams of the per-sample gradients of every matrix in `layers`.

    Gradients of half-precision models are multiplied in float32. With several processes (torch.distributed) all call
    this with the same arguments, and each gets all Grams.

    Args:
        model: a causal language model; it is left as it was.
        layers: the blocks and matrices to measure.
        train: batches with the position of each of their samples. The rows of a Gram follow the positions, under any
            batching.
        validation: the same of the validation samples.
        form: of the computation, see `Probe`.
        memory_gb: see `Probe`.
        offload: see `Probe`.
        projection: makes the gradients smaller first; None measures them exactly.
        partial: a folder for the results of an interrupted measurement, which the next one takes up: the Grams of
            finished passes, and with offload=disk the factors of finished batches. It must belong to this measurement
            alone.
        fingerprint: of the measurement.
        names: of the samples, train then validation, for messages.
        loss: gives the loss of each sample (B), whose gradients are measured.

    Raises:
        ValueError: names block and sample for a loss or gradient that is not finite, and the least that would do for a
            memory budget that is too small.
    """
    num_train = sum(len(indices) for indices, _ in train)
    batches = [*train, *([[num_train + index for index in indices], batch] for indices, batch in validation)]
    num_samples = sum(len(indices) for indices, _ in batches)
    if names is None:
        names = [f"{'train' if index < num_train else 'validation'} sample {index}" for index in range(num_samples)]
    shards = Shards.current()

    def multiply(passes: Passes, matrix: Matrix, input_STI: Tensor, delta_SOT: Tensor) -> Found:
        form, tile = passes.forms[matrix.name], passes.tile_bytes[matrix.name]
        gram_SN, square_M = products.gram(form, input_STI, delta_SOT, num_train, tile)
        square_S = torch.cat([gram_SN[:num_train].diagonal(), square_M])
        if not bool(square_S.isfinite().all()):
            sample = names[int((~square_S.isfinite()).nonzero()[0])]
            raise ValueError(
                f"the gradient of {matrix.name} is not finite for {sample}; "
                "look at that row, or load the model in float32 (model.dtype=float32)"
            )
        gram_SN = gram_SN.cpu()
        found = gram_SN[:num_train].clone(), gram_SN[num_train:].clone(), square_M.cpu().sqrt()
        return dict(zip(GRAM_TENSORS, found, strict=True))

    gathering = Gathering(model, batches, names, projection, partial, shards, loss)
    found = gathering.each(
        layers.matrices,
        multiply,
        lambda todo: workload(
            model, todo, train, validation, inputs_read_together(model, todo), projection, shards.size
        ),
        form=form,
        memory_gb=memory_gb,
        offload=offload,
    )
    numel = {param: math.prod(shape_of(model, param)) for param in layers.matrices}
    grams = {param: MatrixGram(**tensors, numel=numel[param]) for param, tensors in found.items()}
    return LayerGrams(layers, grams, fingerprint)


def tensors_of(grams: Mapping[str, MatrixGram]) -> dict[str, Tensor]:
    """Names the tensors of Grams as a file holds them: `<parameter>/train_train`."""
    return {f"{param}/{name}": getattr(gram, name) for param, gram in grams.items() for name in GRAM_TENSORS}


def gram_in(tensors: Mapping[str, Tensor], param: str, numel: int) -> MatrixGram:
    """Gives the Gram of one matrix out of what `tensors_of` returned."""
    return MatrixGram(*(tensors[f"{param}/{name}"] for name in GRAM_TENSORS), numel=numel)
