"""Hooks on the modules of a model, taken off again whatever happens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from layerif.models.blocks import blocks
from layerif.models.loss import per_sample_loss


def first_non_finite_block(model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    """The first block whose output on `batch` is not finite, or what follows the blocks."""
    spoilt: list[str] = []

    def note(name: str):
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not bool(hidden.isfinite().all()):
                spoilt.append(name)

        return hook

    handles = [block.register_forward_hook(note(name)) for name, block in blocks(model).items()]
    try:
        with torch.no_grad():
            per_sample_loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return f"block {spoilt[0]}" if spoilt else "the head"
