"""From a model and batches to Grams: every sample forward and backward, then one matrix after the other multiplied.

Letters in shape suffixes: T tokens, I inputs and O outputs of a linear layer, S all samples (N train, then M
validation).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from layerif.layers import LayerGrams, LayerMap, MatrixGram
from layerif.models import bare
from layerif.probe import products
from layerif.probe.factors import InMemory, OnDisk, Waiting, capture, inputs_read_together, only_activations
from layerif.probe.passes import Choice, Matrix, Offload, Passes, Workload, passes
from layerif.probe.projection import Projection
from layerif.probe.shards import Shards, is_spread

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
) -> LayerGrams:
    """Grams of the per-sample gradients of every matrix in `layers`.

    train, validation: batches with the position of each of their samples; the Grams' rows follow the positions,
    however the samples were batched. Gradients of half-precision models are multiplied in float32.
    form, memory_gb, offload: see `Probe`. partial: a folder for what an interrupted measurement leaves and the next one
    takes up: the Grams of finished passes, and with offload=disk the factors of finished batches; whoever gives it sees
    to it that it belongs to this measurement alone. names: of the samples, train then validation, for messages.
    With several processes (torch.distributed) all call this with the same arguments; each gets all Grams.
    Raises ValueError naming block and sample for a loss or gradient that is not finite, and for a memory budget that
    is too small, with the least that would do.
    """
    num_train = sum(len(indices) for indices, _ in train)
    batches = [*train, *([[num_train + index for index in indices], batch] for indices, batch in validation)]
    num_samples = sum(len(indices) for indices, _ in batches)
    if names is None:
        names = [f"{'train' if index < num_train else 'validation'} sample {index}" for index in range(num_samples)]
    if offload == "disk" and partial is None:
        raise ValueError("probe.offload=disk needs a folder for the factors: measure(…, partial=folder)")

    shards = Shards.current()
    reads_with = inputs_read_together(model, [param for block in layers.params for param in block])
    load = workload(model, layers, train, validation, reads_with, projection, shards.size)
    memory, host_memory = map(min, zip(*shards.share(budget(next(model.parameters()).device, memory_gb)), strict=True))
    tile_bytes = tile(next(model.parameters()).device)
    chosen = passes(load, memory, form=form, offload=offload, tile_bytes=tile_bytes, host_memory=host_memory)
    where = {"none": "the device", "cpu": "main memory", "disk": "files"}[chosen.offload]
    if len(chosen.groups) > 1 or chosen.offload != "none":
        size = f"{load.kept_bytes(load.matrices) / 1e9:.2f} GB of factors"
        log.info("%s: %d passes, kept in %s", size, len(chosen.groups), where)
    measurement = _Measurement(model, batches, num_train, num_samples, names, chosen, projection, partial, shards)
    grams: dict[str, MatrixGram] = {}
    for number, group in enumerate(chosen.groups, 1):
        grams |= measurement.run([matrix.name for matrix in group], f"gradients {number}/{len(chosen.groups)}")
    return LayerGrams(layers, grams, fingerprint)


def workload(
    model: nn.Module,
    layers: LayerMap,
    train: Sequence[IndexedBatch],
    validation: Sequence[IndexedBatch],
    reads_with: Mapping[str, str],
    projection: Projection | None = None,
    num_processes: int = 1,
) -> Workload:
    """The sizes of a measurement. The model may be on the meta device, the batches are not looked into.

    reads_with: for each matrix the first that reads the same input, see `factors.inputs_read_together`.
    """
    params = [param for block in layers.params for param in block]
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


def budget(device: torch.device, memory_gb: float | None) -> tuple[float, float]:
    """Bytes on the device, and of main memory where factors may be moved to; that is zero if it is the device."""
    host = psutil.virtual_memory().available / 2
    if device.type != "cuda":
        return (host if memory_gb is None else memory_gb * 1e9), 0.0
    # A GPU is nobody else's: what the autograd graph of a batch needs is far less than the rest.
    free = torch.cuda.mem_get_info(device)[0] * 0.85
    return (free if memory_gb is None else memory_gb * 1e9), host


def tile(device: torch.device) -> float:
    """Bytes of a tile that stays inside a processor's cache, or keeps a GPU busy."""
    return 1e9 if device.type == "cuda" else 1.6e7


@dataclass(frozen=True)
class _Measurement:
    """Runs one pass after the other; the arguments of `measure`, with train and validation in one row."""

    model: nn.Module
    batches: Sequence[IndexedBatch]
    num_train: int
    num_samples: int
    names: Sequence[str]
    passes: Passes
    projection: Projection | None
    partial: Path | None
    shards: Shards

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        return {matrix.name: matrix for group in self.passes.groups for matrix in group}

    def run(self, params: Sequence[str], description: str) -> dict[str, MatrixGram]:
        """The Grams of one pass, taken from `partial` if it was finished before."""
        if done := self.shards.share(self._finished(params))[0]:
            log.info("%s: finished before the interruption", description)
            return done
        waiting: Waiting = InMemory(self.passes.offload == "cpu")
        if self.passes.offload == "disk":
            assert self.partial is not None
            waiting = OnDisk(self.partial)
        with self.shards.failing_together():
            self._capture(params, waiting, description)
        mine: dict[str, MatrixGram] = {}
        # As many matrices at a time as there are processes, so that all of them multiply at once.
        rounds = [params[start : start + self.shards.size] for start in range(0, len(params), self.shards.size)]
        for together in tqdm(rounds, desc="Gram matrices", disable=None, leave=False):
            mine |= self._multiply(together, waiting)
        with self.shards.failing_together():
            for param, gram in mine.items():
                self._require_finite(param, gram)
        shared = {param: gram for part in self.shards.share(mine) for param, gram in part.items()}
        grams = {param: shared[param] for param in params}
        if self.partial is not None and self.shards.rank == 0 and len(self.passes.groups) > 1:
            self._keep(grams, self._file(params))
        return grams

    def _capture(self, params: Sequence[str], waiting: Waiting, description: str) -> None:
        mine = list(enumerate(self.shards.of(self.batches)))
        with only_activations(self.model):
            for number, (indices, batch) in tqdm(mine, desc=description, disable=None, leave=False):
                if not waiting.has(number, params, batch):
                    names = [self.names[index] for index in indices]
                    waiting.add(number, capture(self.model, params, batch, names, self.projection or _as_it_is))
            if is_spread(self.model) and len(mine) < len(self.shards.of(self.batches, 0)):
                capture(self.model, params, self.batches[0][1], self.names)  # the others wait for our share of weights

    def _multiply(self, params: Sequence[str], waiting: Waiting) -> dict[str, MatrixGram]:
        """The Gram of the matrix that this process owns: the one at its rank, if there is one."""
        taken = [list(waiting.take(param)) for param in params]
        inputs = [
            (self.matrices[param].num_in, [a for _, a, _ in parts]) for param, parts in zip(params, taken, strict=True)
        ]
        deltas = [
            (self.matrices[param].num_out, [d for _, _, d in parts]) for param, parts in zip(params, taken, strict=True)
        ]
        del taken
        input_STI = self._laid_out(inputs)
        delta_SOT = self._laid_out(deltas, swap=True)
        if input_STI is None or delta_SOT is None:
            return {}
        param = params[self.shards.rank]
        gram_SN, square_M = products.gram(
            self.passes.forms[param], input_STI, delta_SOT, self.num_train, self.passes.tile_bytes
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

    def _laid_out(self, factors: Sequence[tuple[int, Sequence[Tensor]]], *, swap: bool = False) -> Tensor | None:
        weight = bare(self.model).get_parameter(self.passes.groups[0][0].name)
        work = torch.promote_types(weight.dtype, torch.float32)
        return self.shards.lay_out(
            factors,
            [indices for indices, _ in self.batches],
            longest=self.passes.workload.longest,
            sent_as=work if self.projection else weight.dtype,
            dtype=work,
            device=weight.device,
            swap=swap,
        )

    def _require_finite(self, param: str, gram: MatrixGram) -> None:
        square_S = torch.cat([gram.train_train.diagonal(), gram.val_norms])
        if not bool(square_S.isfinite().all()):
            sample = self.names[int((~square_S.isfinite()).nonzero()[0])]
            raise ValueError(
                f"the gradient of {param} is not finite for {sample}; "
                "look at that row, or load the model in float32 (model.dtype=float32)"
            )

    def _file(self, params: Sequence[str]) -> Path:
        assert self.partial is not None
        name = hashlib.sha256(json.dumps(list(params)).encode()).hexdigest()[:32]
        return self.partial / f"grams-{name}.safetensors"

    def _finished(self, params: Sequence[str]) -> dict[str, MatrixGram] | None:
        if self.partial is None or self.shards.rank != 0 or not self._file(params).exists():
            return None
        try:
            tensors = load_file(self._file(params))
        except (SafetensorError, OSError) as error:
            log.warning("%s is not readable and is measured anew: %s", self._file(params), error)
            return None
        fields = [field.name for field in dataclasses.fields(MatrixGram) if field.name != "numel"]
        return {
            param: MatrixGram(
                **{field: tensors[f"{param}/{field}"] for field in fields},
                numel=bare(self.model).get_parameter(param).numel(),
            )
            for param in params
        }

    def _keep(self, grams: Mapping[str, MatrixGram], file: Path) -> None:
        tensors = {
            f"{param}/{field}": value
            for param, gram in grams.items()
            for field, value in vars(gram).items()
            if field != "numel"
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        save_file(tensors, unfinished)
        os.replace(unfinished, file)


def _as_it_is(values: Tensor, side: str) -> Tensor:
    return values
