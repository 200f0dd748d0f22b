"""The memory of a device."""

from __future__ import annotations

import psutil
import torch


def free_bytes(device: torch.device | str) -> int:
    """Returns the bytes that are free on a CUDA device, or else in main memory."""
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
