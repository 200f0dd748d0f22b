"""The memory of a device: what is free, and the most that is taken over some time."""

from __future__ import annotations

from typing import Literal

import psutil
import torch


def free_bytes(device: torch.device | str) -> int:
    """Returns the bytes that are free on a CUDA device, or else in main memory."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


class PeakMemory:
    """The most memory that is taken from now on.

    On a CUDA device that is the most its tensors take, at any moment. Elsewhere it is the main memory of the process at
    those moments at which `look` is called; memory that was freed before and that the process keeps counts there.

    Args:
        device: the model's.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device, self._most = torch.device(device), 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.look()

    @property
    def of(self) -> Literal["cuda", "process"]:
        """Tells which memory is meant."""
        return "cuda" if self.device.type == "cuda" else "process"

    def look(self) -> None:
        """Looks at the memory that is taken now."""
        if self.of == "process":
            self._most = max(self._most, psutil.Process().memory_info().rss)

    @property
    def bytes(self) -> int:
        """The most so far."""
        return torch.cuda.max_memory_allocated(self.device) if self.of == "cuda" else self._most

    @property
    def gigabytes(self) -> float:
        """The most so far, in 10⁹ bytes."""
        return self.bytes / 1e9
