"""A fixed shape over depth, such as MoLA's; no scores are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from layerif.allocate._shares import check_whole
from layerif.allocate.allocation import Allocation
from layerif.checks import check_choice
from layerif.layers import LayerMap
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A fixed shape over depth (MoLA, Gao et al., 2024).

    shape: a count for each group of consecutive layers, as digits (2468, 5555, 8642, 3578) or a list; a list as long as
        the model is deep is a count per layer.
    groups: the number of layers of each group; None: as equal as they can be and symmetric, the outer ones larger (8,
        7, 7, 8 of 30 layers), but 7, 7, 8, 6 for 3578 on 28 layers, as published for Gemma-7B.
    budget: what the counts must add up to; None: whatever they do.
    """

    needs_scores: ClassVar[bool] = False

    shape: int | str | Sequence[int]
    groups: Sequence[int] | None = None
    budget: int | None = None
    kind: Literal["experts", "rank"] = "experts"

    def __post_init__(self) -> None:
        check_choice("allocator.kind", self.kind, ("experts", "rank"))
        if not self.counts:
            raise ValueError(f"allocator.shape={self.shape!r} is empty; give digits such as 2468, or a list of counts")
        for count in self.counts:
            check_whole("shape", count)
        if self.groups is not None and (len(self.groups) != len(self.counts) or min(self.groups) < 1):
            raise ValueError(
                f"allocator.groups={list(self.groups)} must give each of the {len(self.counts)} counts of "
                f"allocator.shape={self.shape} its number of layers, at least 1"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        if isinstance(self.shape, int | str):
            digits = str(self.shape)
            if not digits.isdigit():
                raise ValueError(f"allocator.shape={self.shape!r} must be digits such as 2468, or a list of counts")
            return tuple(map(int, digits))
        return tuple(self.shape)

    @property
    def source(self) -> str:
        return f"shape({'-'.join(map(str, self.counts))})"

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        groups = self._groups(len(layers.names))
        values = tuple(count for count, size in zip(self.counts, groups, strict=True) for _ in range(size))
        spent = sum(values)
        if self.budget not in (None, spent):
            raise ValueError(
                f"allocator.shape={self.shape} over groups of {', '.join(map(str, groups))} layers adds up to {spent}, "
                f"not to allocator.budget={self.budget}; change the shape, or allocator.groups"
            )
        return Allocation(layers.names, self.kind, values, spent)

    def _groups(self, depth: int) -> tuple[int, ...]:
        number = len(self.counts)
        if self.groups is not None:
            groups = tuple(self.groups)
        elif (self.counts, depth) == ((3, 5, 7, 8), 28):
            groups = (7, 7, 8, 6)
        else:
            groups = _symmetric_groups(depth, number)
        if sum(groups) != depth:
            raise ValueError(f"allocator.groups={list(groups)} hold {sum(groups)} layers, the model has {depth}")
        return groups


def _symmetric_groups(depth: int, number: int) -> tuple[int, ...]:
    if number == depth:
        return (1,) * depth
    size, left = divmod(depth, number)
    if size < 1 or (left % 2 and number % 2 == 0):
        raise ValueError(
            f"{depth} layers make no {number} symmetric groups for allocator.shape; give their sizes, for example "
            f"allocator.groups={[size + (index < left) for index in range(number)]}"
            if size
            else f"allocator.shape has {number} counts for {depth} layers; give at most one for each"
        )
    larger = set(range(left // 2)) | set(range(number - left // 2, number)) | ({number // 2} if left % 2 else set())
    return tuple(size + (index in larger) for index in range(number))
