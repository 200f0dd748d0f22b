"""Learn one gate per block on what a trained adapter changes there, for `estimator=ila`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm

from layerif.data.batches import Encoded, Encodings, batches
from layerif.estimators.ila import gated
from layerif.layers import LayerMap
from layerif.models.blocks import blocks
from layerif.models.contexts import frozen
from layerif.models.hooks import hooked
from layerif.models.loss import per_sample_loss


def learn_gates(
    model: nn.Module,
    layers: LayerMap,
    samples: Sequence[Encoded],
    *,
    num_steps: int,
    samples_per_step: int,
    learning_rate: float,
    start: float,
    batch_size: int = 8,
    pad_id: int = 0,
    seed: int = 0,
) -> Tensor:
    """The scores s (L, float32) after `num_steps` of plain gradient descent on the mean loss of `samples_per_step`.

    Every adapted linear of block l gives base + σ(s_l)·(adapted − base); nothing else is learned, dropout is off.
    model: with a PEFT adapter; samples: taken in an order of their own in every round, a function of the seed.
    batch_size: samples the model sees at once, a matter of memory alone.
    Raises ValueError for an adapter of no layer in the blocks, or one that changes nothing, and for a loss that is not
    finite.
    """
    device = next(model.parameters()).device
    scores_L = torch.full((len(layers.names),), start, device=device, requires_grad=True)
    # Plain descent: where every block's change helps, Adam would open all gates at one pace and tell none apart.
    optimizer = torch.optim.SGD([scores_L], lr=learning_rate)
    per_step = min(samples_per_step, len(samples))
    drawn = _rounds(len(samples), seed)
    with frozen(model), hooked(_gates(model, layers, scores_L), with_kwargs=True), torch.enable_grad():
        for step in tqdm(range(num_steps), desc="gates", disable=None, leave=False):
            chosen = Encodings(samples[index] for index in islice(drawn, per_step))
            optimizer.zero_grad()
            for _, batch in batches(chosen, batch_size, pad_id):
                losses = per_sample_loss(model, {name: value.to(device) for name, value in batch.items()})
                if not bool(losses.isfinite().all()):
                    raise ValueError(f"the loss is not finite at step {step} of the gates; look at model.adapter")
                (losses.sum() / per_step).backward()
            if step == 0 and not bool(scores_L.grad.any()):  # type: ignore[union-attr]
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


def _gates(model: nn.Module, layers: LayerMap, scores_L: Tensor) -> list[tuple[nn.Module, Any]]:
    """Pairs of an adapted linear layer with the forward hook that gates it."""

    def hook(number: int) -> Any:
        def gate(module: BaseTunerLayer, args: tuple[Any, ...], kwargs: dict[str, Any], adapted: Tensor) -> Tensor:
            return gated(module.get_base_layer()(*args, **kwargs), adapted, scores_L[number])

        return gate

    found = blocks(model)
    adapted = [
        (number, module)
        for number, name in enumerate(layers.names)
        for module in found[name].modules()
        if isinstance(module, BaseTunerLayer)
    ]
    if not adapted:
        raise ValueError(
            "model.adapter changes no layer of any block, so there is nothing to gate; give one that does, for example "
            "of method=lora allocator=rank"
        )
    return [(module, hook(number)) for number, module in adapted]
