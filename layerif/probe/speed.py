"""The speed of this machine at the work of a probe, from a short trial with random weights of the model's width."""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.models.contexts import frozen
from layerif.models.loss import per_sample_loss
from layerif.models.pretrained import Pretrained
from layerif.probe.grams.factors import capture_factors, inputs_read_together
from layerif.probe.grams.passes import Passes, Workload
from layerif.probe.grams.products import gram
from layerif.probe.measurements import Measurements

_MOMENT = 0.3  # seconds that a timed product has to take


@dataclass(frozen=True)
class Rates:
    """Rates that were measured on this machine.

    Attributes:
        block, head: seconds of a forward and backward, for one token.
        forward: the part of `block` that the forward takes.
        products: operations a second.
        host, disk: bytes a second to main memory (infinite if the model is there) and to disk.
    """

    block: float
    head: float
    forward: float
    products: float
    host: float
    disk: float


class Trial:
    """One and two blocks of the model's width with random weights, and one batch of the samples."""

    def __init__(self, model: Pretrained, measurements: Measurements, batch: Mapping[str, Tensor]) -> None:
        self.measurements, self.batch = measurements, batch
        self.device = torch.device(measurements.device)
        self.models = [_random_model(model, num_blocks).to(self.device) for num_blocks in (1, 2)]

    def reads_with(self, layers: LayerMap) -> dict[str, str]:
        """Gives the first matrix that reads the same input, for each matrix, as in the first block of the trial.

        The matrices of an adapter are taken to read apart.
        """
        if self.measurements.probe.parameters == "lora":
            return {param: param for param in layers.matrices}
        trial = layer_map(self.models[0], scope=self.measurements.probe.scope, skip_unsupported=True)
        within = inputs_read_together(self.models[0], trial.params[0])
        start = len(trial.names[0])
        found = {}
        for param, name in layers.block_of.items():
            here = trial.names[0] + param[len(name) :]
            found[param] = name + within.get(here, here)[start:]
        return found

    def rates(self, load: Workload, taken: Passes, folder: Path) -> Rates:
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
            products=self._product_rate(load, taken),
            host=_copy_rate(self.device),
            disk=_write_rate(folder),
        )

    def _product_rate(self, load: Workload, taken: Passes) -> float:
        """Times the products of the matrix that costs most, with as many samples as take a moment."""
        matrix = max(load.matrices, key=lambda matrix: load.operations(matrix, taken.forms[matrix.name]))
        form, num_samples = taken.forms[matrix.name], 8
        total = load.num_train + load.num_val
        while True:
            num_samples = min(num_samples, total)
            num_val = min(load.num_val, max(1, num_samples * load.num_val // total))
            part = replace(load, num_train=num_samples - num_val, num_val=num_val)
            input_STI = torch.randn(num_samples, load.longest, matrix.num_in, device=self.device)
            delta_SOT = torch.randn(num_samples, matrix.num_out, load.longest, device=self.device)
            seconds = self._seconds(gram, form, input_STI, delta_SOT, part.num_train, taken.tile_bytes[matrix.name])
            if seconds > _MOMENT or num_samples == total:
                return part.operations(matrix, form) / seconds
            num_samples *= 2

    def _seconds(self, work: Callable[..., Any], *args: Any) -> float:
        """Gives the median of three runs, after one to warm up."""
        measured = []
        for _ in range(4):
            start = time.perf_counter()
            work(*args)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            measured.append(time.perf_counter() - start)
        return statistics.median(measured[1:])


def _random_model(given: Pretrained, num_blocks: int) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(given.skeleton().config)
    config.num_hidden_layers = num_blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_blocks]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, given.dtype), attn_implementation=given.attention
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
