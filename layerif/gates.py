"""Learn one gate per block on what a trained adapter changes there, for `estimator=ila`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm

from layerif.blocks import blocks
from layerif.estimators.ila import gated
from layerif.layers import LayerMap
from layerif.loss import per_sample_loss
from layerif.modes import frozen

VERSION = 1  # part of every cache key: raise it when the meaning of a gate changes


def learn_gates(
    model: nn.Module,
    layers: LayerMap,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    num_steps: int,
    learning_rate: float,
    start: float,
    seed: int = 0,
) -> Tensor:
    """The scores s (L, float32) after `num_steps` of plain gradient descent on the mean loss.

    Every adapted linear of block l gives base + σ(s_l)·(adapted − base); nothing else is learned, dropout is off.
    model: with a PEFT adapter; batches: seen in an order of their own in every round, a function of the seed.
    Raises ValueError where the adapter changes nothing, and for a loss that is not finite.
    """
    device = next(model.parameters()).device
    scores_L = torch.full((len(layers.names),), start, device=device, requires_grad=True)
    # Plain descent: where every block's change helps, Adam would open all gates at one pace and tell none apart.
    optimizer = torch.optim.SGD([scores_L], lr=learning_rate)
    order = itertools.islice(_rounds(len(batches), seed), num_steps)
    with frozen(model), _hooked(model, layers, scores_L), torch.enable_grad():
        for step, number in enumerate(tqdm(order, total=num_steps, desc="gates", disable=None, leave=False)):
            loss = per_sample_loss(model, {name: value.to(device) for name, value in batches[number].items()}).mean()
            if not bool(loss.isfinite()):
                raise ValueError(f"the loss is {loss.item()} at step {step} of the gates; look at model.adapter")
            optimizer.zero_grad()
            if loss.requires_grad:  # or no block is adapted at all
                loss.backward()
            if scores_L.grad is None or (step == 0 and not bool(scores_L.grad.any())):
                raise ValueError(
                    "the adapter changes nothing in any block, so there is no change to gate; train it first, for "
                    "example with method=lora allocator=rank, and give its folder as model.adapter"
                )
            optimizer.step()
    return scores_L.detach().cpu()


def _rounds(count: int, seed: int) -> Iterator[int]:
    chosen, order = Random(f"{seed} gates"), list(range(count))
    while True:
        chosen.shuffle(order)
        yield from order


@contextmanager
def _hooked(model: nn.Module, layers: LayerMap, scores_L: Tensor) -> Iterator[None]:
    def hook(number: int) -> Any:
        def gate(module: BaseTunerLayer, args: tuple[Any, ...], kwargs: dict[str, Any], adapted: Tensor) -> Tensor:
            return gated(module.get_base_layer()(*args, **kwargs), adapted, scores_L[number])

        return gate

    found = blocks(model)
    handles = [
        module.register_forward_hook(hook(number), with_kwargs=True)
        for number, name in enumerate(layers.names)
        for module in found[name].modules()
        if isinstance(module, BaseTunerLayer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
