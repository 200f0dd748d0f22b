"""Measures the seconds and the peak memory of pruning a block, against pruning matrix by matrix in the plainest way.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python experiments/benchmark_pruning/run.py [cpu|cuda]

On a CPU it prunes a block of SmolLM2-135M with 16 windows of 256 tokens. Both ways take turns in one process, and
seconds are medians. For the memory, each way runs in a process of its own, and only its addition to the model and the
block's inputs counts. Then the command line does the whole run (scores, 30 blocks, saving, evaluation).

On CUDA it prunes a block with the shape of Mistral-7B and random bfloat16 weights, with 128 windows of 2048 tokens, and
extrapolates to the 32 blocks of the model. Nothing else should run on the machine.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from layerif.models.blocks import blocks, linears
from layerif.models.embedded import EmbeddedModel
from layerif.pruning import Pruner
from layerif.pruning.calibration import Calibration
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.sparsegpt import SparseGPT
from layerif.pruning.targets import targets
from layerif.pruning.walk import HiddenStates, Walk, capture_inputs
from layerif.pruning.wanda import Wanda
from layerif.record.record import RunRecord

PRUNERS: tuple[Pruner, ...] = (Magnitude(), Wanda(), SparseGPT(), SparseGPT(n=2, m=4))
WAYS = ("ours", "plain")
ROUNDS = 5
MODELS = "outputs/store/models"
SPARSITY = 0.5


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {device}\n")
    if device == "cuda":
        on_gpu()
    else:
        on_cpu()


def on_cpu() -> None:
    bench = Bench()
    print("one block of SmolLM2-135M, 16 windows of 256 tokens, statistics, pruning and the pruned block's outputs")
    print("pruner           ours s   plain s   plain/ours   ours MB   plain MB   weights that differ")
    for pruner in PRUNERS:
        times: dict[str, list[float]] = defaultdict(list)
        zeros: dict[str, dict[str, Tensor]] = {}
        for _ in range(ROUNDS):
            for way in WAYS:
                bench.block.load_state_dict(bench.dense)
                start = time.perf_counter()
                bench.work(way, pruner)
                times[way].append(time.perf_counter() - start)
                zeros[way] = {key: module.weight == 0 for key, module in linears(bench.block)}
        ours, plain = (statistics.median(times[way]) for way in WAYS)
        memory = [_alone(_peak_megabytes, way, pruner) for way in WAYS]
        different = sum(int((zeros["ours"][key] != zeros["plain"][key]).sum()) for key in zeros["ours"])
        share = different / sum(mask.numel() for mask in zeros["ours"].values())
        print(
            f"{_label(pruner):<15}{ours:>8.2f}{plain:>10.2f}{plain / ours:>13.2f}"
            f"{memory[0]:>10.0f}{memory[1]:>11.0f}{share:>22.1e}",
            flush=True,
        )
    del bench
    print("\nthe whole run: layerif method=prune allocator=sparsity, its defaults and an empty store")
    print("pruner            seconds   scores   prune and save   evaluate   peak GB of the process")
    for name in ("magnitude", "wanda", "sparsegpt"):
        seconds, record = _whole_run(name)
        parts = [record.seconds[part] for part in ("evidence", "prune", "evaluate")]
        print(f"{name:<15}{seconds:>10.0f}{parts[0]:>9.0f}{parts[1]:>17.0f}{parts[2]:>11.0f}{record.memory_gb:>25.1f}")


class Bench:
    """The block in the middle of SmolLM2-135M with its inputs."""

    def __init__(self) -> None:
        embedded = EmbeddedModel(cache=MODELS)
        self.model: Any = embedded.load()
        self.batches = Calibration().batches(embedded.tokenizer())
        self.name = list(blocks(self.model))[15]
        self.block = blocks(self.model)[self.name]
        self.dense = {key: value.clone() for key, value in self.block.state_dict().items()}
        with torch.no_grad():
            self.hidden, self.calls = capture_inputs(self.model, self.batches)

    def work(self, way: str, pruner: Pruner) -> None:
        with torch.no_grad():
            if way == "plain":
                calls = self.calls[self.name]
                plain_block(pruner, self.block, [(h, *call) for h, call in zip(self.hidden, calls, strict=True)])
                return
            wanted = targets(self.model, dict.fromkeys(blocks(self.model), SPARSITY), pruner)
            with tempfile.TemporaryDirectory() as folder:
                walk = Walk(self.model, pruner, wanted, self.batches, Path(folder))
                walk._hidden, walk._calls = HiddenStates(self.hidden, "cpu"), self.calls
                walk._prune(self.name, self.block)
                if pruner.needs_inputs:
                    walk._forward(self.name, self.block)


def on_gpu() -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(num_hidden_layers=2)  # its default sizes are Mistral-7B's: 4096, 14336, 32 and 8 heads
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
                    walk(0)  # includes the forward of the pruned block, which the next block needs
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
                    del walk
            seconds, peak = statistics.median(times), torch.cuda.max_memory_allocated() / 1e9
            print(f"{_label(pruner):<15}{offload:>9}{seconds:>12.2f}{32 * seconds:>18.0f}{peak:>10.1f}")
            torch.cuda.empty_cache()


def plain_block(pruner: Pruner, block: nn.Module, inputs: list[tuple[Tensor, tuple, dict]]) -> None:
    """Prunes a block as it is usually written.

    Every matrix has its own statistic, whole rows are sorted, and H is inverted step by step.
    """
    statistics_of: dict[str, Tensor] = {}
    modules: dict[str, Any] = dict(linears(block))

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


def _peak_megabytes(way: str, pruner: Pruner) -> float:
    """Returns the peak of main memory above that before the work, in a process that does nothing else."""
    bench, process, done = Bench(), psutil.Process(), threading.Event()
    _give_back_free_memory()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    bench.work(way, pruner)
    done.set()
    watcher.join()
    return (peak - before) / 1e6


def _give_back_free_memory() -> None:
    """Returns free memory to the system, because memory that loading left free would hide the need of the work."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _alone(function: Callable[..., float], *arguments: Any) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _whole_run(pruner: str) -> tuple[float, RunRecord]:
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"pruner={pruner}", f"store={folder}/store", f"model.cache={MODELS}", f"hydra.run.dir={folder}/run"]
        command = [sys.executable, "-m", "layerif", "method=prune", "allocator=sparsity", *settings]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(done.stderr)
        return seconds, RunRecord.read(Path(folder) / "run")


def _label(pruner: Pruner) -> str:
    return type(pruner).__name__ + (f" {pruner.n}:{pruner.m}" if pruner.n else "")


if __name__ == "__main__":
    main()
