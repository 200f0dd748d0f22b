"""Allocators spend scores on experts, ranks or sparsity. Each one is one file, with one YAML in `conf/allocator`.

`to_experts`, `to_rank` and `to_sparsity` are the pure functions. An allocator is a dataclass of settings that is called
with scores and layers and returns an `Allocation`, which checks its own budget. `depth`, `shape` and `file` look at no
scores.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from layerif.allocate.allocation import Allocation
from layerif.allocate.experts import to_experts
from layerif.allocate.rank import to_rank
from layerif.allocate.sparsity import to_sparsity
from layerif.layers import LayerMap
from layerif.scores import LayerScores

__all__ = ["Allocation", "Allocator", "FixedAllocator", "to_experts", "to_rank", "to_sparsity"]


class Allocator(Protocol):
    """The interface of an allocator that spends scores."""

    needs_scores: ClassVar[Literal[True]]

    def __call__(self, scores: LayerScores, layers: LayerMap, /) -> Allocation:
        """Gives every unit its value.

        Args:
            scores: one score per layer, by name.
            layers: the layers that the allocation is spread over.
        """
        ...


class FixedAllocator(Protocol):
    """The interface of an allocator that looks at no scores, so that nothing is measured for it."""

    needs_scores: ClassVar[Literal[False]]

    @property
    def source(self) -> str:
        """The origin of the values, for the record."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """The files whose content the allocation depends on."""
        ...

    def __call__(self, scores: LayerScores, layers: LayerMap, /) -> Allocation: ...
