"""Trials of pruning: the loss of a model as it would be after pruning. The model comes back as it was, to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from layerif.models.blocks import blocks, device_of
from layerif.models.contexts import evaluating, full_precision
from layerif.models.loss import summed_loss
from layerif.progress import progress
from layerif.pruning import Pruner
from layerif.pruning.targets import Target, matrices, targets
from layerif.pruning.walk import Walk


def least_loss(
    model: nn.Module, pruner: Pruner, candidates: Sequence[Mapping[str, float]], windows: Sequence[Tensor]
) -> tuple[int, list[float]]:
    """Prunes the model to each of several allocations in turn, and finds the one of least loss.

    It keeps a copy of the blocks' weights in main memory.

    Args:
        model: a causal language model, on the device that it works on.
        pruner: chooses the weights.
        candidates: allocations of sparsity, by block or matrix.
        windows: calibration windows as token ids (B×T). The pruner reads them, and the loss is measured on them.

    Returns:
        The position of the best candidate, the first among equals, and the mean token loss of each in nats (infinite
        where it is not a number).

    Raises:
        ValueError: there is no candidate, or none has a finite loss.
    """
    if not candidates:
        raise ValueError("trials need at least one candidate; give allocations of sparsity")
    aims = [targets(model, candidate, pruner) for candidate in candidates]  # refuses a wrong one before any work
    losses = []
    for aim in progress(aims, "trials"):
        with _restored(model):
            walk = Walk(model, pruner, aim, windows if pruner.needs_inputs else [], None, device_of(model))
            for index in range(len(walk.blocks)):
                walk(index)
            loss = mean_token_loss(model, windows)
            losses.append(loss if math.isfinite(loss) else math.inf)
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[best] == math.inf:
        raise ValueError(
            f"none of {len(losses)} candidates has a finite loss on the calibration windows; use a lower sparsity, or "
            "load the model in a wider dtype (model.dtype=float32)"
        )
    return best, losses


def loss_by_block(model: nn.Module, pruner: Pruner, levels: Sequence[float], windows: Sequence[Tensor]) -> Tensor:
    """Measures the rise of the loss where one block alone is pruned and all others are dense.

    The pruner's statistics come from dense inputs, those of one walk. The loss takes a forward of the whole model over
    the windows for each block and level.

    Args:
        model: a causal language model, on the device that it works on.
        pruner: chooses the weights.
        levels: sparsities of a block (K).
        windows: calibration windows as token ids (B×T). The pruner reads them, and the loss is measured on them.

    Returns:
        The rise of the mean token loss in nats, by block in the model's order and by level (L×K, float64).
    """
    names = list(blocks(model))
    # With a fixed n of m there is one sparsity only, which the others then have on paper.
    aims = {
        name: [
            targets(model, {**dict.fromkeys(names, 0.0 if pruner.n is None else level), name: level}, pruner)[name]
            for level in levels
        ]
        for name in names
    }
    with _restored(model):
        walk = _OneByOne(model, pruner, aims, windows)
        for index in progress(range(len(names)), "blocks"):
            walk(index)
    return torch.tensor(walk.rises, dtype=torch.float64).reshape(len(names), len(levels))


def mean_token_loss(model: nn.Module, windows: Sequence[Tensor]) -> float:
    """Computes the mean loss in nats over all tokens of the windows but each one's first.

    Args:
        model: a causal language model.
        windows: token ids (B×T).
    """
    device, total, num_tokens = device_of(model), 0.0, 0
    with evaluating(model), torch.inference_mode(), full_precision():
        for input_BT in windows:
            input_BT = input_BT.to(device)
            batch = {"input_ids": input_BT, "attention_mask": torch.ones_like(input_BT), "labels": input_BT}
            sums_B, counted_B = summed_loss(model, batch)
            total += float(sums_B.double().sum())
            num_tokens += int(counted_B.sum())
    return total / num_tokens


class _OneByOne(Walk):
    """A walk that leaves every block dense, after it has measured the loss with this block pruned to each level."""

    def __init__(
        self,
        model: nn.Module,
        pruner: Pruner,
        aims: Mapping[str, Sequence[Mapping[str, Target]]],
        windows: Sequence[Tensor],
    ) -> None:
        super().__init__(model, pruner, {}, windows if pruner.needs_inputs else [], None, device_of(model))
        self.aims, self.windows = aims, windows
        self.dense = mean_token_loss(model, windows)
        self.rises: list[list[float]] = []

    def _prune(self, block_name: str, block: nn.Module) -> None:
        pruned = list(self._pruned(block_name, block, self.aims[block_name]))
        dense = [module.weight.clone() for module, _ in pruned]
        found = []
        for level in range(len(self.aims[block_name])):
            for module, weights in pruned:
                module.weight.copy_(weights[level])
            found.append(mean_token_loss(self.model, self.windows) - self.dense)
        for (module, _), weight in zip(pruned, dense, strict=True):
            module.weight.copy_(weight)
        self.rises.append(found)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Gives the linear layers of the blocks their weights back, also after an error."""
    kept = {name: linear.weight.detach().to("cpu", copy=True) for name, linear in matrices(model).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, linear in matrices(model).items():
                linear.weight.copy_(kept[name])
