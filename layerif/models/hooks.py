"""Forward hooks on the modules of a model; they are always removed again, even after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerif.models.blocks import blocks
from layerif.models.loss import per_sample_loss
from layerif.models.stored import Apart, Stored


@contextmanager
def hooked(
    hooks: Iterable[tuple[nn.Module | Stored, Callable[..., Any]]], *, before: bool = False, with_kwargs: bool = False
) -> Iterator[None]:
    """Keeps hooks on modules while the context is open.

    A matrix of fused experts is called with the tokens that are sent to the expert (R×I) and with their places among
    all tokens of the batch (R), and not at all where there are none.

    Args:
        hooks: pairs of a module or stored matrix and the function that torch calls at its forward.
        before: call the functions before the module's forward (`hook(module, inputs)`) instead of after it
            (`hook(module, inputs, output)`); what a function returns replaces inputs or output, as in torch.
        with_kwargs: pass the forward's keyword arguments as well, after `inputs`.
    """
    handles, apart = [], Apart()
    try:
        for place, hook in hooks:
            module = apart.module_of(place) if isinstance(place, Stored) else place
            register: Any = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(hook, with_kwargs=with_kwargs))
        with apart.running():
            yield
    finally:
        for handle in handles:
            handle.remove()


def first_non_finite_block(model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    """Names the first block whose output on `batch` is not finite, or `the head` where every block's is."""
    spoilt: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not bool(hidden.isfinite().all()):
                spoilt.append(name)

        return hook

    with hooked([(block, note(name)) for name, block in blocks(model).items()]), torch.no_grad():
        per_sample_loss(model, batch)
    return f"block {spoilt[0]}" if spoilt else "the head"
