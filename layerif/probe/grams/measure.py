"""The measurement of Grams: every sample runs forward and backward, then one matrix after the other is multiplied.

Letters in shape suffixes: T tokens, I inputs and O outputs of a linear layer, S all samples (N train, then M
validation).
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from layerif.evidence import GRAM_TENSORS, LayerGrams, MatrixGram
from layerif.files import Damaged, load_tensors, save_tensors
from layerif.layers import LayerMap
from layerif.models.blocks import bare, device_of
from layerif.models.contexts import frozen
from layerif.models.loss import Loss, per_sample_loss
from layerif.models.memory import free_bytes
from layerif.probe.grams import products
from layerif.probe.grams.factors import Side, capture_factors, inputs_read_together
from layerif.probe.grams.passes import Choice, Matrix, Offload, Passes, Workload, passes
from layerif.probe.grams.processes import Shards, is_spread
from layerif.probe.grams.projection import Projection
from layerif.probe.grams.waiting import InMemory, OnDisk, Waiting
from layerif.progress import progress

log = logging.getLogger(__name__)

IndexedBatch = tuple[Sequence[int], Mapping[str, Tensor]]


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
    if offload == "disk" and partial is None:
        raise ValueError("probe.offload=disk needs a folder for the factors: measure(…, partial=folder)")

    shards = Shards.current()
    measurement = _Measurement(model, batches, num_train, num_samples, names, projection, partial, shards, loss)
    grams = measurement.finished()
    todo = [param for param in layers.matrices if param not in grams]
    if grams:
        log.info("%d of %d matrices were measured before the interruption", len(grams), len(grams) + len(todo))
    if todo:
        load = workload(model, todo, train, validation, inputs_read_together(model, todo), projection, shards.size)
        device = device_of(model)
        memory, host = map(min, zip(*shards.share(budget(device, memory_gb, shards.size)), strict=True))
        chosen = passes(
            load, memory, form=form, offload=offload, tile_bytes=wanted_tile_bytes(device), host_memory=host
        )
        if len(chosen.groups) > 1 or chosen.offload != "none":
            where = {"none": "the device", "cpu": "main memory", "disk": "files"}[chosen.offload]
            size = load.kept_bytes(load.matrices) / 1e9
            log.info("%.2f GB of factors: %d passes, kept in %s", size, len(chosen.groups), where)
        for number, group in enumerate(chosen.groups, 1):
            grams |= measurement.run(chosen, group, f"gradients {number}/{len(chosen.groups)}")
    return LayerGrams(layers, {param: grams[param] for param in layers.matrices}, fingerprint)


def workload(
    model: nn.Module,
    params: Sequence[str],
    train: Sequence[IndexedBatch],
    validation: Sequence[IndexedBatch],
    reads_with: Mapping[str, str],
    projection: Projection | None = None,
    num_processes: int = 1,
) -> Workload:
    """Gives the sizes of a measurement. The model may be on the meta device, and the content of batches is not read.

    Args:
        model: holds the matrices.
        params: the names of the matrices.
        train: batches with the positions of their samples.
        validation: the same of the validation samples.
        reads_with: for each matrix the first that reads the same input, see `factors.inputs_read_together`.
        projection: makes the gradients smaller first.
        num_processes: the processes that share the samples.
    """
    width = projection.width if projection else lambda features: features
    matrices = []
    for param in params:
        num_out, num_in = bare(model).get_parameter(param).shape
        matrices.append(Matrix(param, width(num_out), width(num_in), reads_with[param]))
    dtype = bare(model).get_parameter(params[0]).dtype
    work = torch.promote_types(dtype, torch.float32)
    batches = [batch["input_ids"] for _, batch in (*train, *validation)]
    return Workload(
        tuple(matrices),
        num_train=sum(len(indices) for indices, _ in train),
        num_val=sum(len(indices) for indices, _ in validation),
        num_tokens=sum(ids.numel() for ids in batches),
        longest=max(ids.shape[1] for ids in batches),
        kept_itemsize=(work if projection else dtype).itemsize,
        work_itemsize=work.itemsize,
        num_processes=num_processes,
    )


def budget(
    device: torch.device, memory_gb: float | None, num_processes: int = 1, model: float = 0
) -> tuple[float, float]:
    """Gives the bytes that a probe may hold.

    Args:
        device: the device of the model.
        memory_gb: the wish of the user, None for a part of what is free.
        num_processes: the processes that share main memory.
        model: bytes of a model that is still to be loaded.

    Returns:
        The bytes on the device, and those of main memory for factors that are moved there; 0 if that is the device.
    """
    is_cuda = device.type == "cuda"
    host = (free_bytes("cpu") - (0 if is_cuda else model)) / 2 / num_processes
    if not is_cuda:
        return (host if memory_gb is None else memory_gb * 1e9), 0.0
    # A GPU is not shared, and the autograd graph of a batch needs far less than the rest.
    free = (free_bytes(device) - model) * 0.85
    return (free if memory_gb is None else memory_gb * 1e9), host


def wanted_tile_bytes(device: torch.device) -> float:
    """Gives the bytes of a tile that stays inside a processor's cache, or keeps a GPU busy."""
    return 1e9 if device.type == "cuda" else 1.6e7


@dataclass(frozen=True)
class _Measurement:
    """Runs one pass after the other. It holds the arguments of `measure`, with train and validation in one row."""

    model: nn.Module
    batches: Sequence[IndexedBatch]
    num_train: int
    num_samples: int
    names: Sequence[str]
    projection: Projection | None
    partial: Path | None
    shards: Shards
    loss: Loss

    def run(self, passes: Passes, group: Sequence[Matrix], description: str) -> dict[str, MatrixGram]:
        """Takes one pass and gives its Grams."""
        params = [matrix.name for matrix in group]
        waiting: Waiting = InMemory(passes.offload == "cpu")
        if passes.offload == "disk":
            assert self.partial is not None
            waiting = OnDisk(self.partial)
        with self.shards.failing_together():
            self._capture(params, waiting, description)
        mine: dict[str, MatrixGram] = {}
        # As many matrices at a time as there are processes, so that all of them multiply at once.
        rounds = [group[start : start + self.shards.size] for start in range(0, len(group), self.shards.size)]
        for together in progress(rounds, "Gram matrices"):
            mine |= self._multiply(passes, together, waiting)
        with self.shards.failing_together():
            for param, gram in mine.items():
                self._require_finite(param, gram)
        shared = {param: gram for part in self.shards.share(mine) for param, gram in part.items()}
        grams = {param: shared[param] for param in params}
        if self.partial is not None and self.shards.rank == 0 and len(passes.groups) > 1:
            _save(grams, self.partial)
        return grams

    def _capture(self, params: Sequence[str], waiting: Waiting, description: str) -> None:
        mine = enumerate(self.shards.of(self.batches))
        missing = [(number, *batch) for number, batch in mine if not waiting.has(number, params, batch[1])]
        in_step = is_spread(self.model)
        # A process of a spread model that has nothing to do runs a batch nevertheless: the others wait for its weights.
        num_rounds = max(self.shards.share(len(missing))) if in_step else len(missing)
        failure: ValueError | None = None
        with frozen(self.model):
            for position in progress(range(num_rounds), description):
                is_mine = position < len(missing)
                number, indices, batch = missing[position] if is_mine else (-1, *self.batches[0])
                try:
                    project = self.projection or _as_it_is
                    names = [self.names[index] for index in indices]
                    factors = capture_factors(
                        self.model, params, batch, names, project, in_step=in_step, loss=self.loss
                    )
                except ValueError as error:
                    if not in_step:
                        raise
                    failure = failure or error
                    continue
                if is_mine:
                    waiting.add(number, factors)
        if failure is not None:
            raise failure

    def _multiply(self, passes: Passes, matrices: Sequence[Matrix], waiting: Waiting) -> dict[str, MatrixGram]:
        """Multiplies the matrix that this process owns: the one at its rank, if there is one."""
        input_STI = self._laid_out(passes, "in", [(matrix.num_in, matrix.name) for matrix in matrices], waiting)
        delta_SOT = self._laid_out(passes, "out", [(matrix.num_out, matrix.name) for matrix in matrices], waiting)
        if input_STI is None or delta_SOT is None:
            return {}
        param = matrices[self.shards.rank].name
        gram_SN, square_M = products.gram(
            passes.forms[param], input_STI, delta_SOT, self.num_train, passes.tile_bytes[param]
        )
        gram_SN = gram_SN.cpu()
        return {
            param: MatrixGram(
                train_train=gram_SN[: self.num_train].clone(),
                val_train=gram_SN[self.num_train :].clone(),
                val_norms=square_M.cpu().sqrt(),
                numel=bare(self.model).get_parameter(param).numel(),
            )
        }

    def _laid_out(
        self, passes: Passes, side: Side, widths: Sequence[tuple[int, str]], waiting: Waiting
    ) -> Tensor | None:
        weight = bare(self.model).get_parameter(widths[0][1])
        work = torch.promote_types(weight.dtype, torch.float32)
        return self.shards.lay_out(
            [(width, (values for _, values in waiting.take(param, side))) for width, param in widths],
            [indices for indices, _ in self.batches],
            longest=passes.workload.longest,
            sent_as=work if self.projection else weight.dtype,
            dtype=work,
            device=weight.device,
            swap=side == "out",
        )

    def _require_finite(self, param: str, gram: MatrixGram) -> None:
        square_S = torch.cat([gram.train_train.diagonal(), gram.val_norms])
        if not bool(square_S.isfinite().all()):
            sample = self.names[int((~square_S.isfinite()).nonzero()[0])]
            raise ValueError(
                f"the gradient of {param} is not finite for {sample}; "
                "look at that row, or load the model in float32 (model.dtype=float32)"
            )

    def finished(self) -> dict[str, MatrixGram]:
        """Reads the Grams that an interrupted measurement left, the same in every process."""
        found: dict[str, MatrixGram] = {}
        if self.partial is not None and self.shards.rank == 0:
            for file in sorted(self.partial.glob("grams-*.safetensors")):
                try:
                    tensors, _ = load_tensors(file)
                except Damaged as error:
                    warnings.warn(f"{file} is damaged and is measured again: {error}", stacklevel=3)
                    continue
                for param in {name.rpartition("/")[0] for name in tensors}:
                    numel = bare(self.model).get_parameter(param).numel()
                    found[param] = gram_in(tensors, param, numel)
        return self.shards.share(found)[0]


def tensors_of(grams: Mapping[str, MatrixGram]) -> dict[str, Tensor]:
    """Names the tensors of Grams as a file holds them: `<parameter>/train_train`."""
    return {f"{param}/{name}": getattr(gram, name) for param, gram in grams.items() for name in GRAM_TENSORS}


def gram_in(tensors: Mapping[str, Tensor], param: str, numel: int) -> MatrixGram:
    """Gives the Gram of one matrix out of what `tensors_of` returned."""
    return MatrixGram(*(tensors[f"{param}/{name}"] for name in GRAM_TENSORS), numel=numel)


def _save(grams: Mapping[str, MatrixGram], folder: Path) -> None:
    tensors = tensors_of(grams)
    name = hashlib.sha256(json.dumps(sorted(tensors)).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    advice = "free some space and give the command again, or set store=/another/folder"
    save_tensors(tensors, folder / f"grams-{name}.safetensors", advice=advice)


def _as_it_is(values: Tensor, side: str) -> Tensor:
    return values
