"""Contexts for the time of a measurement: evaluation mode, frozen weights, full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from layerif.compat import unpacked, without_quantised_inputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keeps the model in evaluation mode; afterwards every module is in the mode it was in.

    Quantised layers compute meanwhile as `layerif.models.quantised.prepare_quantised` says, so that no result depends
    on the batch.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with unpacked(modes), without_quantised_inputs(modes):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keeps the model in evaluation mode and its weights without gradients; both are put back afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_()


@contextmanager
def full_precision() -> Iterator[None]:
    """Keeps float32 products in float32, also where the surrounding program allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
