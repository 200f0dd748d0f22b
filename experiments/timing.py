"""Wall-clock seconds of a piece of work, the machine that it ran on, and a check for figures that cannot be right."""

from __future__ import annotations

import math
import platform
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from layerif.evidence import LayerGrams, MatrixGram

T = TypeVar("T")


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Returns the seconds that the work takes."""
    return timed(work, device)[1]


def timed(work: Callable[[], T], device: str = "cpu") -> tuple[T, float]:
    """Returns the result and the seconds; on a GPU these end when its queue is empty."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def fresh(grams: LayerGrams) -> LayerGrams:
    """Returns the same Grams in tensors of their own, which remember nothing that an estimator derived before."""
    copies = {
        name: MatrixGram(gram.train_train.clone(), gram.val_train.clone(), gram.val_norms.clone(), gram.numel)
        for name, gram in grams.grams.items()
    }
    return LayerGrams(grams.layers, copies, grams.fingerprint)


def reading(tensors: Iterable[torch.Tensor]) -> float:
    """Returns the seconds that one read of all tensors takes, as the best of five sums over them in one piece."""
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    return min(seconds(whole.sum) for _ in range(5))


def resident_mb() -> float:
    """Returns the megabytes of main memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def reset_peak() -> None:
    """Lets the kernel count the peak anew from here."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Returns the most megabytes of main memory that this process held since `reset_peak`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6


def check_plausible(name: str, measured: float, least: float = 0.0) -> None:
    """Stops the benchmark where a figure cannot be right.

    Args:
        name: the work that was timed.
        measured: its seconds, or a ratio.
        least: a bound that the work must exceed, such as the seconds of reading its inputs once (`reading`).
    """
    if not least < measured < math.inf:
        raise SystemExit(
            f"{name}: {measured:.3g} cannot be right, because it must be above {least:.3g}; "
            "the benchmark timed something else, such as a remembered result"
        )


def machine() -> str:
    """Returns the processor, the GPU where there is one, and the versions and threads that were used."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu}{gpu}, Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
