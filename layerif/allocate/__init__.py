"""Allocators spend scores, or curves, on experts, ranks or sparsity. Each one has one YAML in `conf/allocator`.

`to_experts`, `to_rank`, `to_sparsity` and `knapsack` are the pure functions. An allocator is a dataclass of settings
that is called with scores and layers, or with curves, and returns an `Allocation`, which checks its own budget.
`depth`, `shape` and `file` look at neither.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from layerif.allocate.allocation import Allocation
from layerif.allocate.curves import Curves, knapsack
from layerif.allocate.experts import to_experts
from layerif.allocate.rank import to_rank
from layerif.allocate.sparsity import to_sparsity
from layerif.layers import LayerMap
from layerif.scores import LayerScores

__all__ = [
    "Allocation",
    "Allocator",
    "CurveAllocator",
    "Curves",
    "FixedAllocator",
    "knapsack",
    "to_experts",
    "to_rank",
    "to_sparsity",
]


class Allocator(Protocol):
    """The interface of an allocator that spends scores."""

    spends: ClassVar[Literal["scores"]]

    def __call__(self, scores: LayerScores, layers: LayerMap, /) -> Allocation:
        """Gives every unit its value.

        Args:
            scores: one score per layer, by name.
            layers: the layers that the allocation is spread over.
        """
        ...


class CurveAllocator(Protocol):
    """The interface of an allocator that spends curves."""

    spends: ClassVar[Literal["curves"]]

    def __call__(self, curves: Curves, /) -> Allocation:
        """Gives every unit of the curves its value."""
        ...


class FixedAllocator(Protocol):
    """The interface of an allocator that looks at neither, so that nothing is measured for it."""

    spends: ClassVar[Literal["nothing"]]

    @property
    def source(self) -> str:
        """The origin of the values, for the record."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """The files whose content the allocation depends on."""
        ...

    def __call__(self, scores: LayerScores, layers: LayerMap, /) -> Allocation: ...
