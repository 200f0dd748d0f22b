"""The speed of this machine at the work of a probe, from a short trial with random weights of the model's width."""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerif.models.blocks import layer_map
from layerif.models.contexts import frozen
from layerif.models.loss import per_sample_loss
from layerif.models.pretrained import Pretrained, auto_class
from layerif.probe.grams.factors import capture_factors, inputs_read_together
from layerif.probe.grams.passes import Passes
from layerif.probe.measurements import Measurements
from layerif.probe.request import Planned

_MOMENT = 0.3  # seconds that a timed product has to take


@dataclass(frozen=True)
class Rates:
    """Rates that were measured on this machine.

    Attributes:
        block, head: seconds of a forward and backward, for one token.
        forward: the part of `block` that the forward takes.
        products: operations a second.
        weights: seconds for a weight, of work that does not grow with the samples.
        host, disk: bytes a second to main memory (infinite if the model is there) and to disk.
    """

    block: float
    head: float
    forward: float
    products: float
    weights: float
    host: float
    disk: float


class Trial:
    """One and two blocks of the model's width with random weights, and one batch of the samples."""

    def __init__(self, model: Pretrained, measurements: Measurements, planned: Planned) -> None:
        self.measurements, self.planned = measurements, planned
        self.batch: Mapping[str, Tensor] = planned.batch
        self.device = torch.device(measurements.device)
        self.models = [_random_model(model, num_blocks).to(self.device) for num_blocks in (1, 2)]

    def reads_with(self) -> dict[str, str]:
        """Gives the first matrix that reads the same input, for each matrix, as in the first block of the trial.

        The matrices of an adapter are taken to read apart.
        """
        layers = self.planned.layers
        if self.measurements.probe.parameters == "lora":
            return {param: param for param in layers.matrices}
        trial = layer_map(self.models[0], scope=self.planned.scope, skip_unsupported=True)
        start, found = len(trial.names[0]), {}
        known: dict[tuple[str, ...], dict[str, str]] = {}
        for name, params in layers.by_block.items():
            here = tuple(trial.names[0] + param[len(name) :] for param in params)
            if here not in known:  # blocks differ only where matrices are left out
                present = [param for param in here if param in trial.matrices]
                known[here] = inputs_read_together(self.models[0], present)
            found |= {
                param: name + known[here].get(each, each)[start:] for param, each in zip(params, here, strict=True)
            }
        return found

    def rates(self, taken: Passes, folder: Path) -> Rates:
        """Measures the rates of this machine; a file in `folder` times the disk."""
        num_tokens = self.batch["input_ids"].numel()
        both, forward = [], []
        for model in self.models:
            layers = layer_map(model, scope="all", skip_unsupported=True)
            with frozen(model):
                both.append(self._seconds(capture_factors, model, layers.matrices, self.batch, [""] * num_tokens))
                with torch.no_grad():
                    here = {name: tensor.to(self.device) for name, tensor in self.batch.items()}
                    forward.append(self._seconds(per_sample_loss, model, here))
        block = max(both[1] - both[0], 1e-9)
        return Rates(
            block=block / num_tokens,
            head=max(both[0] - block, 0) / num_tokens,
            forward=min(max(forward[1] - forward[0], 0), block) / num_tokens,
            products=self._product_rate(taken),
            weights=self._weight_rate(),
            host=_copy_rate(self.device),
            disk=_write_rate(folder),
        )

    def _product_rate(self, taken: Passes) -> float:
        """Times the products of one matrix, with as many samples as take a moment."""
        num_samples, total = 8, taken.workload.num_train + taken.workload.num_val
        while True:
            num_samples = min(num_samples, total)
            work, operations = self.planned.rehearsal(taken, num_samples, self.device)
            seconds = self._seconds(work)
            if seconds > _MOMENT or num_samples == total:
                return operations / seconds
            num_samples *= 2

    def _weight_rate(self) -> float:
        if self.planned.per_weight is None:
            return 0.0
        work, num_weights = self.planned.per_weight(self.device)
        return self._seconds(work) / num_weights

    def _seconds(self, work: Callable[..., Any], *args: Any) -> float:
        return seconds_of(work, *args, device=self.device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the operations a second of a device in products of two square matrices."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / seconds_of(torch.matmul, left, right, device=device)


def seconds_of(work: Callable[..., Any], *args: Any, device: torch.device) -> float:
    """Gives the median of three runs, after one to warm up."""
    measured = []
    for _ in range(4):
        start = time.perf_counter()
        work(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        measured.append(time.perf_counter() - start)
    return statistics.median(measured[1:])


def _random_model(given: Pretrained, num_blocks: int) -> Any:
    config = copy.deepcopy(given.skeleton().config)
    text = config.get_text_config()
    text.num_hidden_layers = num_blocks
    if text.to_dict().get("layer_types"):
        text.layer_types = text.layer_types[:num_blocks]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class(config).from_config(
            config,
            dtype=getattr(torch, given.dtype),
            attn_implementation=given.attention,
            trust_remote_code=given.trust_remote_code,
        )
    return model.eval()


def _copy_rate(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    values = torch.empty(1 << 26, device=device)
    there = torch.empty(values.shape, pin_memory=True)
    start = time.perf_counter()
    there.copy_(values)
    return values.nbytes / (time.perf_counter() - start)


def _write_rate(folder: Path) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    content = os.urandom(1 << 25)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(content)
        os.fsync(file.fileno())
        return len(content) / (time.perf_counter() - start)
