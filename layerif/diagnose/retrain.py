"""Train a plain LoRA adapter again and again, alike in all but the rows that are left out.

What must not differ between two trainings does not: the adapter starts from the same weights, every step sees the same
rows in the same order, and there is no dropout. A row left out keeps its place in its batches and weighs zero there;
the others weigh what they did, which is the weight that influence takes away.
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
from layerif.models.loss import per_sample_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW without weight decay at a constant learning rate, `steps` batches of `batch_size` rows, LoRA of rank `r`
    with α = 2r.
    """

    steps: int
    batch_size: int
    learning_rate: float
    r: int


class Retrainer:
    """An adapter of one seed on `base`, trained from the same start at every call.

    targets: names of the linear layers that get one, as in the bare model.
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
        """The model with its adapter trained without the rows `left_out`."""
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
            optimizer.step()  # without a gradient it does nothing
        return self.model

    def detach(self) -> None:
        """Take the adapter off the base again."""
        self.model.unload()


def schedule(num_rows: int, recipe: Recipe, *, seed: int) -> list[list[int]]:
    """The rows of every step: each epoch in a new order, every batch full."""
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
    """The loss of every sample (nats per token), in their order."""
    device = next(model.parameters()).device
    found = [0.0] * len(encodings)
    with torch.no_grad():
        for indices, batch in batches(encodings, batch_size, pad_id):
            loss_B = per_sample_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
            for index, loss in zip(indices, loss_B.tolist(), strict=True):
                found[index] = loss
    return found
