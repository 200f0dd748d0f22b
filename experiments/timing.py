"""Wall-clock seconds of a piece of work, and the machine it ran on: what every benchmark prints."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    return timed(work, device)[1]


def timed(work: Callable[[], T], device: str = "cpu") -> tuple[T, float]:
    """The result and the seconds; on a GPU those until its queue is empty."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu}{gpu}, Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
