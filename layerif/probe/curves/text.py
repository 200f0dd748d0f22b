"""The samples whose loss is watched, and the positions of them that are looked at.

Letters in shape suffixes: S samples, T tokens, V the positions that are looked at, B samples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerif.data.rows import IGNORED
from layerif.models.blocks import device_of
from layerif.models.contexts import evaluating
from layerif.models.loss import Loss, per_sample_loss
from layerif.probe.grams.gather import IndexedBatch
from layerif.progress import progress


@dataclass(frozen=True)
class LossText:
    """The samples whose loss is watched.

    Attributes:
        batches: with the position of each sample.
        weights: p of each sample (S); they sum to 1.
        names: of the samples, for messages.
    """

    batches: Sequence[IndexedBatch]
    weights: Tensor
    names: Sequence[str]

    def counted(self) -> Tensor:
        """Counts the tokens of each sample that its loss is a mean of (S)."""
        counted_S = torch.zeros(len(self.weights), dtype=torch.float64)
        for indices, batch in self.batches:
            counted_S[list(indices)] = _targets(batch).sum(1).double()
        return counted_S

    def positions(self, longest: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses the positions that are looked at, a share of each sample's.

        Args:
            longest: T, the positions of a sample that is laid out.
            share: the share of a sample's positions; 1 takes all.
            seed: chooses them.

        Returns:
            The places of the chosen positions among all S·T (V), the weight of each, ½ p_i T_i over the share that was
            really taken (V), and whether its sample is in the second half of the samples (V).
        """
        counted_S, lengths_S = self.counted(), torch.zeros(len(self.weights), dtype=torch.long)
        places = {}
        for indices, batch in self.batches:
            for row, index in enumerate(indices):
                where = batch["attention_mask"][row].bool().nonzero()[:, 0]
                lengths_S[index] = len(where)
                places[index] = where
        chosen, weights, is_second = [], [], []
        for index in range(len(self.weights)):
            where = places[index]
            number = max(1, math.floor(share * len(where) + 0.5))
            if number < len(where):
                # By the sample's place alone, so that batching and other samples change nothing.
                generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
                where = where[torch.randperm(len(where), generator=generator)[:number].sort().values]
            chosen.append(index * longest + where)
            each = 0.5 * float(self.weights[index] * counted_S[index]) * int(lengths_S[index]) / len(where)
            weights.append(torch.full((len(where),), each, dtype=torch.float64))
            is_second.append(torch.full((len(where),), bool(index % 2)))
        return torch.cat(chosen), torch.cat(weights), torch.cat(is_second)


def windows_text(windows: Sequence[Tensor]) -> LossText:
    """Gives windows of token ids (B×T each) as samples of equal weight."""
    batches, number = [], 0
    for ids_BT in windows:
        batches.append((list(range(number, number + len(ids_BT))), batch_of(ids_BT)))
        number += len(ids_BT)
    names = [f"calibration window {index}" for index in range(number)]
    return LossText(batches, torch.full((number,), 1 / number, dtype=torch.float64), names)


def batch_of(ids_BT: Tensor) -> dict[str, Tensor]:
    """Gives whole windows as a batch of which every token counts."""
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT.clone()}


def mean_loss(model: nn.Module, loss_text: LossText, loss: Loss = per_sample_loss) -> float:
    """Measures the loss that curves predict the change of: Σ_i p_i L_i, in nats."""
    device, total = device_of(model), 0.0
    with evaluating(model), torch.no_grad():
        for indices, batch in progress(loss_text.batches, "loss"):
            losses_B = loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
            total += float((losses_B.double().cpu() * loss_text.weights[list(indices)]).sum())
    return total


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Marks the positions whose next token counts in the loss (B×T), as `per_sample_loss` does."""
    labels = batch["labels"].roll(-1, dims=1)
    labels[:, -1] = IGNORED
    return (labels != IGNORED) & batch["attention_mask"].bool()
