"""Seconds a block and peak memory of each pruner, against pruning matrix by matrix in the plainest way.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python experiments/benchmark_pruning/run.py [cpu|cuda]

cpu: blocks of SmolLM2-135M on 16 windows of 256 tokens. cuda: a block with the shape of Mistral-7B, random bfloat16
weights, 128 windows of 2048 tokens, and from it the 32 blocks of a whole model. Both ways take turns in one process;
seconds are medians. Nothing else should run on the machine.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from layerif.blocks import blocks, linears
from layerif.data.text import Calibration
from layerif.models import Embedded
from layerif.prune import Pruner
from layerif.prune.magnitude import Magnitude
from layerif.prune.sparsegpt import SparseGPT
from layerif.prune.targets import targets
from layerif.prune.walk import HiddenStates, Walk, capture
from layerif.prune.wanda import Wanda

PRUNERS: tuple[Pruner, ...] = (Magnitude(), Wanda(), SparseGPT(), SparseGPT(n=2, m=4))
ROUNDS = 5
SPARSITY = 0.5


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {device}\n")
    if device == "cuda":
        on_gpu()
    else:
        on_cpu()


def on_cpu() -> None:
    embedded = Embedded(cache="outputs/store/models")
    model: Any = embedded.load()
    batches = Calibration().batches(embedded.tokenizer())
    name = list(blocks(model))[15]
    block = blocks(model)[name]
    dense = {key: value.clone() for key, value in block.state_dict().items()}
    hidden, calls = capture(model, batches)
    print("one block of SmolLM2-135M, 16 windows of 256 tokens, statistics, pruning and the pruned block's outputs")
    print("pruner           ours s   plain s   plain/ours   ours GB   plain GB   weights that differ")
    for pruner in PRUNERS:
        times: dict[str, list[float]] = defaultdict(list)
        memory: dict[str, float] = {}
        weights: dict[str, dict[str, Tensor]] = {}
        for _ in range(ROUNDS):
            for way in ("ours", "plain"):
                block.load_state_dict(dense)
                seconds, memory[way] = _measured(_work(way, pruner, model, name, block, batches, hidden, calls))
                times[way].append(seconds)
                weights[way] = {key: module.weight.clone() for key, module in linears(block)}
        ours, plain = (statistics.median(times[way]) for way in ("ours", "plain"))
        different = sum(int(((weights["ours"][k] == 0) != (weights["plain"][k] == 0)).sum()) for k in weights["ours"])
        share = different / sum(weight.numel() for weight in weights["ours"].values())
        label = type(pruner).__name__ + (f" {pruner.n}:{pruner.m}" if pruner.n else "")
        print(
            f"{label:<15}{ours:>8.2f}{plain:>10.2f}{plain / ours:>13.2f}"
            f"{memory['ours']:>10.2f}{memory['plain']:>11.2f}{share:>22.1e}"
        )
    block.load_state_dict(dense)


def on_gpu() -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(num_hidden_layers=2)  # the family's own sizes: 4096, 14336, 32 and 8 heads
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.cpu().eval()
    generator = torch.Generator().manual_seed(0)
    batches = list(torch.randint(config.vocab_size, (128, 2048), generator=generator).split(4))
    print("one block of Mistral-7B's shape, 128 windows of 2048 tokens, random bfloat16 weights")
    print(f"{torch.cuda.get_device_name()}")
    print("pruner           offload   s a block   s for 32 blocks   peak GB")
    for pruner in PRUNERS:
        for offload in ("device", "cpu"):
            times = []
            torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                allocation = dict.fromkeys(blocks(model), SPARSITY)
                with tempfile.TemporaryDirectory() as folder:
                    walk = Walk(
                        model, pruner, targets(model, allocation, pruner), batches, Path(folder), "cuda", offload
                    )
                    with torch.no_grad():
                        if pruner.needs_inputs:
                            walk._capture()
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    walk(0)  # with the forward of the pruned block, which the next one needs
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                    del walk
            seconds, peak = statistics.median(times), torch.cuda.max_memory_allocated() / 1e9
            label = type(pruner).__name__ + (f" {pruner.n}:{pruner.m}" if pruner.n else "")
            print(f"{label:<15}{offload:>9}{seconds:>12.2f}{32 * seconds:>18.0f}{peak:>10.1f}")
            torch.cuda.empty_cache()


def _work(
    way: str, pruner: Pruner, model: Any, name: str, block: Any, batches: Any, hidden: Any, calls: Any
) -> Callable:
    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            walk = Walk(
                model, pruner, targets(model, dict.fromkeys(blocks(model), SPARSITY), pruner), batches, Path(folder)
            )
            walk._hidden, walk._calls = HiddenStates(hidden, "cpu"), calls
            walk._prune(name, block)
            if pruner.needs_inputs:
                walk._forward(name, block)

    def plain() -> None:
        with torch.no_grad():
            plain_block(pruner, block, [(h, *call) for h, call in zip(hidden, calls[name], strict=True)])

    return ours if way == "ours" else plain


def plain_block(pruner: Pruner, block: nn.Module, inputs: list[tuple[Tensor, tuple, dict]]) -> None:
    """As it is usually written: every matrix has its own statistic, sorts whole rows, and inverts H step by step."""
    statistics_of: dict[str, Tensor] = {}
    modules = dict(linears(block))

    def hook(name: str):
        def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            for sample in given[0]:  # one window at a time
                added = 2 * sample.t() @ sample if isinstance(pruner, SparseGPT) else sample.square().sum(0)
                statistics_of[name] = statistics_of.get(name, 0) + added / 16

        return keep

    if pruner.needs_inputs:
        handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
        for hidden, args, kwargs in inputs:
            block(hidden, *args, **kwargs)
        for handle in handles:
            handle.remove()
    for name, module in modules.items():
        weight = module.weight.data
        if isinstance(pruner, SparseGPT):
            module.weight.data = plain_sparsegpt(weight, statistics_of[name], pruner)
        elif isinstance(pruner, Wanda):
            order = (weight.abs() * statistics_of[name].sqrt()).sort(dim=1, stable=True).indices
            module.weight.data = weight.scatter(1, order[:, : int(weight.shape[1] * SPARSITY)], 0.0)
        else:
            threshold = weight.abs().flatten().sort().values[int(weight.numel() * SPARSITY)]
            module.weight.data = weight.masked_fill(weight.abs() < threshold, 0)
    if pruner.needs_inputs:
        for hidden, args, kwargs in inputs:
            block(hidden, *args, **kwargs)


def plain_sparsegpt(weight: Tensor, hessian: Tensor, pruner: SparseGPT) -> Tensor:
    weight, num_inputs = weight.clone(), weight.shape[1]
    hessian = hessian + pruner.damping * hessian.diagonal().mean() * torch.eye(num_inputs)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, num_inputs, pruner.block_size):
        end = min(start + pruner.block_size, num_inputs)
        slab, small = weight[:, start:end].clone(), factor[start:end, start:end]
        kept, errors = torch.zeros_like(slab), torch.zeros_like(slab)
        if pruner.n is None:
            cost = slab.square() / small.diagonal().square()
            mask = cost <= cost.flatten().sort().values[int(cost.numel() * SPARSITY) - 1]
        else:
            mask = torch.zeros_like(slab, dtype=torch.bool)
        for column in range(end - start):
            if pruner.n is not None and pruner.m is not None and column % pruner.m == 0:
                group = slice(column, column + pruner.m)
                cost = slab[:, group].square() / small.diagonal()[group].square()
                mask.scatter_(1, column + cost.topk(pruner.m - pruner.n, dim=1, largest=False).indices, True)
            values = slab[:, column]
            kept[:, column] = values.masked_fill(mask[:, column], 0)
            error = (values - kept[:, column]) / small[column, column]
            slab[:, column:] -= error[:, None] @ small[column, column:][None]
            errors[:, column] = error
        weight[:, start:end] = kept
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def _measured(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and gigabytes of main memory above where it started."""
    process, done = psutil.Process(), threading.Event()
    start_bytes = process.memory_info().rss
    peak = [start_bytes]

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return seconds, (peak[0] - start_bytes) / 1e9


if __name__ == "__main__":
    main()
