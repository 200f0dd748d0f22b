"""The weights of all matrices of a model as pruned to any level, each by its inputs in the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from layerif.allocate.allocation import Allocation
from layerif.compat import map_tensors
from layerif.layers import is_named
from layerif.models.blocks import device_of
from layerif.models.memory import free_bytes
from layerif.progress import progress
from layerif.pruning import Pruner
from layerif.pruning.mask import num_removed
from layerif.pruning.targets import matrices, targets
from layerif.pruning.walk import Walk


class Levels:
    """The weights of every matrix as pruned to any level, by the inputs that the matrix has in the dense model.

    The dense weights and the pruner's statistics of all matrices wait in main memory.

    Args:
        model: a causal language model, on the device that it works on.
        pruner: chooses the weights.
        windows: the calibration windows as token ids (B×T), which only a pruner that needs inputs reads.

    Raises:
        ValueError: the pruner fixes the level of every matrix, the statistics would take more than half of the free
            memory, or as for `layerif.pruning.walk.Walk`.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, windows: Sequence[Tensor]) -> None:
        if pruner.n is not None:
            raise ValueError(
                f"pruner.n={pruner.n} pruner.m={pruner.m} removes the same share from every matrix; use pruner.n=null, "
                "which gives every matrix an n of its own"
            )
        found = matrices(model)
        size = sum(linear.weight.nbytes for linear in found.values())
        check_main_memory(size, "the dense weights")
        self.pruner, self.windows, self.device = pruner, windows if pruner.needs_inputs else [], device_of(model)
        self.dense = {name: linear.weight.detach().to("cpu", copy=True) for name, linear in found.items()}
        self._leaders: dict[str, str] = {}
        self._shared: dict[str, Any] = {}
        if pruner.needs_inputs:
            self._observe(Walk(model, pruner, {}, windows, None, self.device))

    def _observe(self, walk: Walk) -> None:
        for index, block in enumerate(progress(walk.blocks, "statistics of the pruner")):
            leaders, shared = walk.observed(index)
            if index == 0:
                size = len(walk.blocks) * sum(_num_bytes(each) for each in shared.values())
                check_main_memory(size, f"the statistics of {type(self.pruner).__name__} for all matrices")
            self._leaders |= {f"{block}.{name}": f"{block}.{leader}" for name, leader in leaders.items()}
            self._shared |= {
                f"{block}.{name}": map_tensors(lambda tensor: tensor.to("cpu"), each) for name, each in shared.items()
            }

    def __call__(self, name: str, count: int) -> Tensor:
        """Returns the weight of a matrix, on the model's device, without `count` of its entries."""
        weight = self.dense[name].to(self.device)
        if count == 0:
            return weight
        shared = self._shared[self._leaders[name]] if self._leaders else None
        shared = map_tensors(lambda tensor: tensor.to(self.device), shared)
        if self.pruner.m is None:
            return self.pruner(weight, shared, count / weight.numel(), None)
        return self.pruner(weight, shared, None, self.pruner.m - count // self.grain(name))

    def grain(self, name: str) -> int:
        """Returns the number that the counts of a matrix are multiples of: one, or a weight of each of its groups."""
        return 1 if self.pruner.m is None else self.dense[name].numel() // self.pruner.m

    def counts(self, model: nn.Module, allocation: Allocation) -> dict[str, int]:
        """Returns the number of weights that every matrix loses by an allocation of sparsity, by block or matrix.

        Those that the pruner skips are not among them.
        """
        if allocation.kind != "sparsity":
            raise ValueError(f"an allocation of {allocation.kind} cannot be refined; give one of sparsity")
        found = {}
        for block, aims in targets(model, allocation.by_name(), self.pruner).items():
            for inside, aim in aims.items():
                name = f"{block}.{inside}"
                if is_named(name, self.pruner.skip):
                    continue
                numel = self.dense[name].numel()
                if aim.n is None:
                    assert aim.sparsity is not None
                    found[name] = num_removed(aim.sparsity, numel)
                else:
                    assert self.pruner.m is not None
                    found[name] = (self.pruner.m - aim.n) * self.grain(name)
        return found


def check_main_memory(size: int, what: str, advice: str = "use pruner=wanda without swaps, or a smaller model") -> None:
    """Refuses to keep `size` bytes in main memory if that is more than half of what is free."""
    free = free_bytes("cpu")
    if size > free / 2:
        raise ValueError(
            f"{what} take {size:,} bytes, and half of the free memory is {free // 2:,}; {advice}, or free some memory"
        )


def _num_bytes(tree: Any) -> int:
    sizes = []
    map_tensors(lambda tensor: sizes.append(tensor.nbytes) or tensor, tree)
    return sum(sizes)
