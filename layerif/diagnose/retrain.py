"""Repeated training of a plain LoRA adapter, where only the rows that are left out differ.

Every training starts from the same weights, takes the same rows in the same order, and uses no dropout. A row that is
left out keeps its place in its batches, with weight zero. The other rows keep their weights, so that a retraining takes
away just the weight that influence predicts the effect of.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from layerif.data.batches import Encodings, batches, collate
from layerif.models.blocks import device_of
from layerif.models.loss import per_sample_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The training of an adapter: LoRA with α = 2r, by AdamW without weight decay at a constant learning rate.

    Attributes:
        steps: the number of batches.
        batch_size: the number of rows in a batch.
        learning_rate: AdamW's.
        r: the rank of the adapter.
    """

    steps: int
    batch_size: int
    learning_rate: float
    r: int


class Retrainer:
    """Trains the adapter of one seed on `base`, from the same start at every call.

    Args:
        base: the bare model, which holds the adapter until `detach`.
        targets: the linear layers that are adapted, by their names in the bare model.
        train: the training rows.
        pad_id: the token that fills up short rows.
        recipe: the training.
        seed: draws the start of the adapter and the order of the rows.
    """

    def __init__(
        self, base: nn.Module, targets: Sequence[str], train: Encodings, pad_id: int, recipe: Recipe, seed: int
    ) -> None:
        config = LoraConfig(
            r=recipe.r,
            lora_alpha=2 * recipe.r,
            lora_dropout=0.0,
            target_modules=list(targets),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = get_peft_model(base, config).eval()  # type: ignore[arg-type]
        self.train, self.pad_id, self.recipe = train, pad_id, recipe
        self.order = schedule(len(train), recipe, seed=seed)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.start = [parameter.detach().clone() for parameter in self.trained]

    def __call__(self, left_out: Collection[int] = ()) -> nn.Module:
        """Trains the adapter without the rows `left_out`, and returns the model with it.

        Raises:
            ValueError: the training loss is not finite.
        """
        with torch.no_grad():
            for parameter, start in zip(self.trained, self.start, strict=True):
                parameter.copy_(start)
        optimizer = torch.optim.AdamW(self.trained, lr=self.recipe.learning_rate, weight_decay=0.0)
        device = self.trained[0].device
        for step, rows in enumerate(self.order):
            kept = [self.train[row] for row in rows if row not in left_out]
            optimizer.zero_grad()
            if kept:
                batch = {name: tensor.to(device) for name, tensor in collate(kept, self.pad_id).items()}
                loss = per_sample_loss(self.model, batch).sum() / len(rows)
                if not bool(loss.isfinite()):
                    raise ValueError(
                        f"the training loss is {loss.item()} at step {step} of {len(self.order)}; lower "
                        "method.learning_rate, or load the model in float32 (model.dtype=float32)"
                    )
                loss.backward()
            optimizer.step()  # does nothing where all rows of the batch are left out
        return self.model

    def detach(self) -> None:
        """Takes the adapter off the base model."""
        self.model.unload()


def schedule(num_rows: int, recipe: Recipe, *, seed: int) -> list[list[int]]:
    """Returns the rows of every step. Each epoch has an order of its own, and every batch is full."""
    chosen, size = Random(f"{seed} order"), min(recipe.batch_size, num_rows)
    steps: list[list[int]] = []
    waiting: list[int] = []
    while len(steps) < recipe.steps:
        if len(waiting) < size:
            waiting += chosen.sample(range(num_rows), num_rows)
        steps.append(waiting[:size])
        waiting = waiting[size:]
    return steps


def losses(model: nn.Module, encodings: Encodings, batch_size: int, pad_id: int) -> list[float]:
    """Returns the loss of every sample in nats per token, in the order of the samples."""
    device = device_of(model)
    found = [0.0] * len(encodings)
    with torch.no_grad():
        for indices, batch in batches(encodings, batch_size, pad_id):
            loss_B = per_sample_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
            for index, loss in zip(indices, loss_B.tolist(), strict=True):
                found[index] = loss
    return found
