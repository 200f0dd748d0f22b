"""Blocks to keep, or layers to train, by their position alone: the controls of every choice by measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerif.allocate._shares import Keep, number_to_keep
from layerif.allocate.allocation import Allocation
from layerif.checks import check_fields
from layerif.layers import LayerMap
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Position:
    """Keeps blocks, or trains layers, by their position alone. It looks at no scores.

    Attributes:
        kind: `blocks`, of which not all may be kept, or `layers`.
        keep: a whole number of them, or a share; 1.0 is all.
        rule: keeps the `first` ones, the `last` ones, or all `but_spaced` ones: of k that go, the i-th (counted from 0)
            is number ⌊(2i+1)·L/2k⌋ of L.
    """

    spends: ClassVar[Literal["nothing"]] = "nothing"
    paths: ClassVar[tuple[str, ...]] = ()

    kind: Literal["blocks", "layers"] = "layers"
    keep: Keep = 0.5
    rule: Literal["first", "last", "but_spaced"] = "last"

    def __post_init__(self) -> None:
        check_fields(self, "allocator")

    @property
    def source(self) -> str:
        return f"position({self.rule})"

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        depth, is_blocks = len(layers.names), self.kind == "blocks"
        number = number_to_keep(self.keep, depth, unit=self.kind[:-1], all_allowed=not is_blocks)
        gone = depth - number
        if self.rule == "first":
            kept = set(range(number))
        elif self.rule == "last":
            kept = set(range(gone, depth))
        else:
            kept = set(range(depth)) - {(2 * index + 1) * depth // (2 * gone) for index in range(gone)}
        return Allocation(layers.names, self.kind, tuple(int(l in kept) for l in range(depth)), number)
