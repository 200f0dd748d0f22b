"""Allocators spend scores, or curves, on experts, ranks, sparsity, bits, blocks to keep or layers to train.

Each one has one YAML in `conf/allocator`. `to_experts`, `to_rank`, `to_sparsity`, `to_bits`, `to_blocks`, `to_layers`
and `knapsack` are the pure functions. An allocator is a dataclass of settings that is called with scores and layers, or
with curves, and returns an `Allocation`, which checks its own budget. `blocks` takes either, and `depth`, `position`,
`shape` and `file` look at neither.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from layerif.allocate.allocation import Allocation
from layerif.allocate.bits import to_bits
from layerif.allocate.blocks import to_blocks
from layerif.allocate.curves import Curves, knapsack
from layerif.allocate.experts import to_experts
from layerif.allocate.layers import to_layers
from layerif.allocate.rank import to_rank
from layerif.allocate.spans import Spans
from layerif.allocate.sparsity import to_sparsity
from layerif.layers import LayerMap
from layerif.scores import AllocationKind, LayerScores

__all__ = [
    "Allocation",
    "Allocator",
    "CurveAllocator",
    "Curves",
    "EitherAllocator",
    "FixedAllocator",
    "Spans",
    "knapsack",
    "to_bits",
    "to_blocks",
    "to_experts",
    "to_layers",
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


class EitherAllocator(Protocol):
    """The interface of an allocator that spends scores or curves of its kind, whichever the estimator gives."""

    spends: ClassVar[Literal["either"]]
    kind: ClassVar[AllocationKind]

    def __call__(self, given: LayerScores | Curves | Spans, layers: LayerMap, /) -> Allocation:
        """Gives every unit its value."""
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
