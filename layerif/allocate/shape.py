"""A fixed shape over depth, such as MoLA's. It looks at no scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from layerif.allocate.allocation import Allocation
from layerif.checks import Count, check_fields, check_value
from layerif.layers import LayerMap
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Gives a count to each group of layers (MoLA, Gao et al., 2024).

    Attributes:
        shape: a count for each group of consecutive layers, as digits (2468, 5555, 8642, 3578) or as a list. A list as
            long as the model is deep gives a count per layer.
        groups: the number of layers in each group; None: as equal as they can be and symmetric, the outer ones larger
            (8, 7, 7, 8 of 30 layers), but 7, 7, 8, 6 for 3578 on 28 layers, as published for Gemma-7B.
        budget: the sum that the counts must have; None allows any.
        kind: the meaning of a count.
    """

    spends: ClassVar[Literal["nothing"]] = "nothing"
    paths: ClassVar[tuple[str, ...]] = ()

    shape: int | str | Sequence[int]
    groups: Sequence[Count] | None = None
    budget: Count | None = None
    kind: Literal["experts", "rank"] = "experts"

    def __post_init__(self) -> None:
        check_fields(self, "allocator")
        if not self.counts:
            raise ValueError(f"allocator.shape={self.shape!r} is empty; give digits such as 2468, or a list of counts")
        check_value("allocator.shape", self.counts, Sequence[Count])
        if self.groups is not None and len(self.groups) != len(self.counts):
            raise ValueError(
                f"allocator.groups={list(self.groups)} must give each of the {len(self.counts)} counts of "
                f"allocator.shape={self.shape} its number of layers"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """The count of each group."""
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
            raise ValueError(
                f"allocator.groups={list(groups)} hold {sum(groups)} layers, the model has {depth}; give sizes that "
                "add up to these"
            )
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
