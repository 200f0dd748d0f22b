"""Gates that are learned on the change that a trained adapter makes in each block: the evidence of `estimator=ila`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from random import Random
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from layerif.data.batches import Encoded, Encodings, batches
from layerif.evidence import LayerGates
from layerif.layers import LayerMap
from layerif.models.blocks import blocks, device_of
from layerif.models.contexts import frozen
from layerif.models.hooks import hooked
from layerif.models.loss import per_sample_loss
from layerif.probe.measurements import Load, Measurements, hash_of_samples
from layerif.probe.request import Part, Request
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

GATES: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("gates", "gates")


@dataclass(frozen=True)
class Gates(Request):
    """A request for a gate per block, learned on the train samples with the adapter of the model frozen.

    Attributes:
        num_steps, samples_per_step, learning_rate, start: see `learn_gates`.
    """

    parts: ClassVar[tuple[Part, ...]] = ("train",)

    num_steps: int
    samples_per_step: int
    learning_rate: float
    start: float

    def check(self, measurements: Measurements) -> None:
        if measurements.model.adapter is None:
            raise ValueError(
                "estimator=ila weighs what a fine-tune changed and needs its adapter; train one (for example "
                "method=lora allocator=rank) and give its folder with model.adapter=/run/adapter method=none"
            )

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerGates, bool]:
        layers, train = measurements.layers(), measurements.samples()[0]
        settings = {**asdict(self), "seed": measurements.seed}
        cost = {"batch_size": measurements.probe.batch_size, "pad_id": measurements.pad_id}
        tensors, key, reused = measurements.by_the_first(
            GATES,
            lambda: {"scores": learn_gates(measurements.whole(load), layers, train, **settings, **cost)},
            gates=VERSIONS["gates"],
            loss=VERSIONS["loss"],
            train=hash_of_samples(train),
            **settings,
        )
        return LayerGates(layers, tensors["scores"], key), reused


def gated(base: Tensor, adapted: Tensor, score: Tensor) -> Tensor:
    """Gives base + σ(s)·(adapted − base), the output of a linear layer whose change Δθ counts by σ(s)."""
    return base + score.sigmoid().to(base.dtype) * (adapted - base)


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
    """Learns the scores s of the gates by plain gradient descent on the mean loss.

    Every adapted linear layer of block l gives base + σ(s_l)·(adapted − base). Nothing else is learned, and dropout is
    off.

    Args:
        model: has a PEFT adapter; it is left as it was.
        layers: the blocks.
        samples: taken in a new order in every round; the orders are a function of the seed.
        num_steps: steps of gradient descent.
        samples_per_step: samples behind the gradient of one step.
        learning_rate: of the descent.
        start: the first value of every s.
        batch_size: the samples that the model sees at once; it changes the memory alone.
        pad_id: the token that fills shorter samples.
        seed: of the orders.

    Returns:
        The scores (L, float32).

    Raises:
        ValueError: for an adapter that changes no layer of the blocks or changes nothing, and for a loss that is not
            finite.
    """
    device = device_of(model)
    scores_L = torch.full((len(layers.names),), start, device=device, requires_grad=True)
    # Plain descent: where every block's change helps, Adam would open all gates at one pace and tell none apart.
    optimizer = torch.optim.SGD([scores_L], lr=learning_rate)
    per_step = min(samples_per_step, len(samples))
    drawn = _rounds(len(samples), seed)
    with frozen(model), hooked(_gates(model, layers, scores_L), with_kwargs=True), torch.enable_grad():
        for step in progress(range(num_steps), "gates"):
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
    generator, order = Random(f"{seed} gates"), list(range(count))
    while True:
        generator.shuffle(order)
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
