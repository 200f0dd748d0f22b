"""Passes over the samples that hand the factors of one matrix after another to a function.

The function may be any arithmetic on a matrix's factors: products for Grams, or the price of a change of the matrix.

Letters in shape suffixes: T tokens, I inputs and O outputs of a linear layer, S samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerif.files import Damaged, load_tensors, save_tensors
from layerif.models.blocks import device_of, dtype_of, linear_at, shape_of, weight_of
from layerif.models.contexts import frozen
from layerif.models.loss import Loss, per_sample_loss
from layerif.models.memory import free_bytes
from layerif.models.stored import tensor_of
from layerif.probe.grams.factors import ANOTHER_SCOPE, Side, capture_factors
from layerif.probe.grams.passes import TILE, Choice, Matrix, Offload, Passes, Workload, passes
from layerif.probe.grams.processes import Shards, is_spread
from layerif.probe.grams.projection import Projection
from layerif.probe.grams.waiting import InMemory, OnDisk, Waiting
from layerif.progress import progress

log = logging.getLogger(__name__)

IndexedBatch = tuple[Sequence[int], Mapping[str, Tensor]]
Found = dict[str, Tensor]  # the tensors that are kept of one matrix, by their names
# Takes the plan, a matrix, its inputs (S×T×I), its output gradients and, where asked for, its weight (O×I).
Work = Callable[..., Found]


@dataclass(frozen=True)
class Gathering:
    """Runs every sample forward and backward, in as many passes as memory asks for.

    With several processes (torch.distributed) all of them call `each` with the same arguments, and each gets all
    results.

    Attributes:
        model: a causal language model; it is left as it was.
        batches: with the position of each of their samples.
        names: of the samples, for messages.
        projection: makes the factors smaller first; None leaves them as they are.
        partial: a folder for the results of an interrupted measurement, which the next one takes up. It must belong to
            this measurement alone.
        shards: the processes that measure together.
        loss: gives the loss of each sample (B), whose gradients are measured.
        kind: the first part of the names of the files in `partial`.
        takes_weights: also hand over the weight of the matrix.
        by_token: output gradients are (S×T×O), and not (S×O×T) as products take them.
        advice: what to do about a layer that cannot be measured.
    """

    model: nn.Module
    batches: Sequence[IndexedBatch]
    names: Sequence[str]
    projection: Projection | None = None
    partial: Path | None = None
    shards: Shards = field(default_factory=Shards)
    loss: Loss = per_sample_loss
    kind: str = "grams"
    takes_weights: bool = False
    by_token: bool = False
    advice: str = ANOTHER_SCOPE

    def each(
        self,
        params: Sequence[str],
        work: Work,
        workload: Callable[[Sequence[str]], Workload],
        *,
        form: Choice = "auto",
        memory_gb: float | None = None,
        offload: Offload = "auto",
        tile_bytes: float | None = None,
        before_pass: Callable[[Sequence[str]], None] = lambda params: None,
    ) -> dict[str, Found]:
        """Hands the factors of every matrix to `work`, and gives what it returns, by matrix.

        Args:
            params: the names of the matrices.
            work: takes the plan, the matrix and its factors, see `Work`.
            workload: gives the sizes of a measurement of some of the matrices.
            form: of the computation, see `Probe`.
            memory_gb: see `Probe`.
            offload: see `Probe`.
            tile_bytes: the wanted size of a tile; None takes what suits the device.
            before_pass: called with the matrices of each pass before it begins.

        Raises:
            ValueError: names block and sample for a loss that is not finite, and the least that would do for a memory
                budget that is too small.
        """
        if offload == "disk" and self.partial is None:
            raise ValueError("probe.offload=disk needs a folder for the factors: measure(…, partial=folder)")
        found = self._finished()
        todo = [param for param in params if param not in found]
        if found:
            log.info("%d of %d matrices were measured before the interruption", len(found), len(found) + len(todo))
        if todo:
            load = workload(todo)
            device = device_of(self.model)
            memory, host = map(min, zip(*self.shards.share(budget(device, memory_gb, self.shards.size)), strict=True))
            wanted = wanted_tile_bytes(device) if tile_bytes is None else tile_bytes
            chosen = passes(load, memory, form=form, offload=offload, tile_bytes=wanted, host_memory=host)
            if len(chosen.groups) > 1 or chosen.offload != "none":
                where = {"none": "the device", "cpu": "main memory", "disk": "files"}[chosen.offload]
                size = load.kept_bytes(load.matrices) / 1e9
                log.info("%.2f GB of factors: %d passes, kept in %s", size, len(chosen.groups), where)
            for number, group in enumerate(chosen.groups, 1):
                before_pass([matrix.name for matrix in group])
                found |= self._run(chosen, group, work, f"gradients {number}/{len(chosen.groups)}")
        return {param: found[param] for param in params}

    def _run(self, passes: Passes, group: Sequence[Matrix], work: Work, description: str) -> dict[str, Found]:
        """Takes one pass."""
        params = [matrix.name for matrix in group]
        waiting: Waiting = InMemory(passes.offload == "cpu")
        if passes.offload == "disk":
            assert self.partial is not None
            waiting = OnDisk(self.partial)
        with self.shards.failing_together():
            self._capture(params, waiting, description)
        mine: dict[str, Found] = {}
        # As many matrices at a time as there are processes, so that all of them work at once.
        rounds = [group[start : start + self.shards.size] for start in range(0, len(group), self.shards.size)]
        failure: Exception | None = None
        for together in progress(rounds, "matrices"):
            input_STI = self._laid_out(passes, "in", [(matrix.num_in, matrix.name) for matrix in together], waiting)
            delta_SOT = self._laid_out(passes, "out", [(matrix.num_out, matrix.name) for matrix in together], waiting)
            # A spread weight is gathered by all processes at once.
            weights = [self._whole_weight(matrix.name) for matrix in together] if self.takes_weights else []
            if input_STI is None or delta_SOT is None or failure is not None:
                continue
            matrix, own = together[self.shards.rank], weights[self.shards.rank : self.shards.rank + 1]
            try:
                made = work(passes, matrix, input_STI, delta_SOT, *own)
                mine[matrix.name] = {name: tensor.cpu() for name, tensor in made.items()}
            except Exception as error:  # the other processes wait for this one to send its factors
                if self.shards.size == 1:
                    raise
                failure = error
        with self.shards.failing_together():
            if failure is not None:
                raise failure
        shared = {param: each for part in self.shards.share(mine) for param, each in part.items()}
        found = {param: shared[param] for param in params}
        if self.partial is not None and self.shards.rank == 0 and len(passes.groups) > 1:
            self._save(found, self.partial)
        return found

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
                        self.model, params, batch, names, project, in_step=in_step, loss=self.loss, advice=self.advice
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

    def _laid_out(
        self, passes: Passes, side: Side, widths: Sequence[tuple[int, str]], waiting: Waiting
    ) -> Tensor | None:
        dtype = dtype_of(self.model, widths[0][1])
        work = torch.promote_types(dtype, torch.float32)
        return self.shards.lay_out(
            [(width, (values for _, values in waiting.take(param, side))) for width, param in widths],
            [indices for indices, _ in self.batches],
            longest=passes.workload.longest,
            sent_as=work if self.projection else dtype,
            dtype=work,
            device=tensor_of(linear_at(self.model, widths[0][1])).device,
            swap=side == "out" and not self.by_token,
        )

    def _whole_weight(self, param: str) -> Tensor:
        weight: Any = weight_of(self.model, param).detach()
        return weight.full_tensor() if hasattr(weight, "full_tensor") else weight

    def _finished(self) -> dict[str, Found]:
        """Reads what an interrupted measurement left, the same in every process."""
        found: dict[str, Found] = {}
        if self.partial is not None and self.shards.rank == 0:
            for file in sorted(self.partial.glob(f"{self.kind}-*.safetensors")):
                try:
                    tensors, _ = load_tensors(file)
                except Damaged as error:
                    warnings.warn(f"{file} is damaged and is measured again: {error}", stacklevel=4)
                    continue
                for name, tensor in tensors.items():
                    param, _, part = name.rpartition("/")
                    found.setdefault(param, {})[part] = tensor
        return self.shards.share(found)[0]

    def _save(self, found: Mapping[str, Found], folder: Path) -> None:
        tensors = {f"{param}/{name}": tensor for param, each in found.items() for name, tensor in each.items()}
        name = hashlib.sha256(json.dumps(sorted(tensors)).encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        advice = "free some space and give the command again, or set store=/another/folder"
        save_tensors(tensors, folder / f"{self.kind}-{name}.safetensors", advice=advice)


def workload(
    model: nn.Module,
    params: Sequence[str],
    train: Sequence[IndexedBatch],
    validation: Sequence[IndexedBatch],
    reads_with: Mapping[str, str],
    projection: Projection | None = None,
    num_processes: int = 1,
    kind: Callable[..., Workload] = Workload,
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
        kind: makes the workload; what is done with the factors may need memory of its own.
    """
    width = projection.width if projection else lambda features: features
    matrices = []
    for param in params:
        num_out, num_in = shape_of(model, param)
        matrices.append(Matrix(param, width(num_out), width(num_in), reads_with[param]))
    dtype = dtype_of(model, params[0])
    work = torch.promote_types(dtype, torch.float32)
    batches = [batch["input_ids"] for _, batch in (*train, *validation)]
    return kind(
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
    return 1e9 if device.type == "cuda" else TILE


def _as_it_is(values: Tensor, side: str) -> Tensor:
    return values
