"""Sparsity by depth alone: a straight line (ATP), and first blocks that are spared. It looks at no scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le, Lt

from layerif.allocate._shares import Cap, check_feasible, shifted_to_mean
from layerif.allocate.allocation import BUDGET_TOLERANCE, Allocation, checked_sizes
from layerif.allocate.sparsity import TargetSparsity
from layerif.checks import Whole, check_fields, check_value, how_many
from layerif.layers import LayerMap
from layerif.scores import LayerScores

Slope = Annotated[float, Ge(-1), Le(1), "sparsity from one block to the next; null chooses it by trials"]
SparedFloor = Annotated[float, Ge(0), Lt(1), "the default is 0.2"]

RISES = (0.0, -0.1, 0.1, -0.2, 0.2, -0.3, 0.3)  # from the first block to the last, those that trials compare


def along_depth(
    numel: Sequence[int], target: float, *, slope: float, spare: int = 0, floor: float = 0.2, cap: float = 0.9
) -> list[float]:
    """Gives sparsities on a straight line over depth whose mean, weighted by the layers' parameters, is `target`.

    ρ_l = c + slope·(l − (L−1)/2) with one c for all, which is the target where the line is not clipped and the layers
    are of one size. Where ρ_l is clipped to [0, `cap`], the other layers make up for it by a common c, and so they do
    for the spared ones.

    Args:
        numel: the parameters of each layer, the weights of the mean.
        target: the mean sparsity.
        slope: of the line.
        spare: so many layers at the beginning get `floor` in place of their point of the line.
        floor: the sparsity of a spared layer, at most the target.
        cap: the most that a layer gets.

    Raises:
        ValueError: too many layers are spared for the others to make up for them.
    """
    weights = checked_sizes(numel, len(numel))
    for name, value, hint in (
        ("target", target, TargetSparsity),
        ("slope", slope, Slope),
        ("spare", spare, Whole),
        ("floor", floor, SparedFloor),
        ("cap", cap, Cap),
    ):
        check_value(f"allocator.{name}", value, hint)
    check_feasible(target, cap, "allocator.cap")
    _check_floor(target, spare, floor)
    if spare >= len(weights):
        raise ValueError(
            f"allocator.spare={spare} leaves none of {how_many(len(weights), 'layer')} to prune; use "
            f"allocator.spare<={len(weights) - 1}"
        )
    spared, others = floor * sum(weights[:spare]), weights[spare:]
    rest = (target * sum(weights) - spared) / sum(others)  # the mean of the others
    if rest > cap + BUDGET_TOLERANCE / 2:
        raise ValueError(
            f"allocator.target={target} cannot be reached with allocator.spare={spare}: the others can make up for "
            f"{(spared + cap * sum(others)) / sum(weights):.6f} at most; lower the target, or spare fewer blocks"
        )
    line = [slope * (l - (len(weights) - 1) / 2) for l in range(spare, len(weights))]
    return [floor] * spare + shifted_to_mean(line, others, min(rest, cap), cap)


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Gives sparsities by depth, see `along_depth`.

    Attributes:
        target: the mean sparsity.
        slope: the rise of the sparsity from one block to the next. None: one of `candidates`, by trials on calibration
            text. Trials need a model, which an allocator does not have: called by itself, it gives slope 0.
        spare: the number of blocks at the beginning that get `floor`; the others make up for them.
        floor: the sparsity of a spared block.
        cap: the most that a block gets.
    """

    spends: ClassVar[Literal["nothing"]] = "nothing"
    paths: ClassVar[tuple[str, ...]] = ()

    target: TargetSparsity = 0.5
    slope: Slope | None = None
    spare: Whole = 0
    floor: SparedFloor = 0.2
    cap: Cap = 0.9

    def __post_init__(self) -> None:
        check_fields(self, "allocator")
        check_feasible(self.target, self.cap, "allocator.cap")
        _check_floor(self.target, self.spare, self.floor)

    @property
    def source(self) -> str:
        slope = "by trials" if self.slope is None else f"{self.slope:g}"
        return f"depth(slope={slope}, spare={self.spare})"

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        return self._allocation(layers, 0.0 if self.slope is None else self.slope)

    def with_each_slope(self, layers: LayerMap) -> list[Depth]:
        """Gives this allocator with each slope that trials compare, slope 0 first; itself where the slope is given."""
        if self.slope is not None:
            return [self]
        steps = len(layers.names) - 1
        rises = RISES if len(layers.names) - self.spare > 1 else RISES[:1]
        return [replace(self, slope=rise / max(steps, 1)) for rise in rises]

    def candidates(self, layers: LayerMap) -> list[Allocation]:
        """Gives the allocation of each of `with_each_slope`; the best one is found by `layerif.pruning.trials`."""
        return [one._allocation(layers, one.slope or 0.0) for one in self.with_each_slope(layers)]

    def _allocation(self, layers: LayerMap, slope: float) -> Allocation:
        values = along_depth(layers.numel, self.target, slope=slope, spare=self.spare, floor=self.floor, cap=self.cap)
        return Allocation(layers.names, "sparsity", tuple(values), self.target, layers.numel)


def _check_floor(target: float, spare: int, floor: float) -> None:
    if spare and floor > target:
        raise ValueError(
            f"allocator.floor={floor} is above allocator.target={target}, so that "
            f"{how_many(spare, 'spared block')} would lose more than the others; use allocator.floor<={target}"
        )
