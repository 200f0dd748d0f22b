"""Curves say what the loss pays for each level of each unit, and the knapsack spends a budget on the cheapest levels.

Letters in shape suffixes: U units (matrices or blocks), K levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from layerif.allocate.allocation import Allocation
from layerif.checks import check_choice, check_fields, check_unique, how_many
from layerif.layers import Granularity, LayerMap, block_of
from layerif.scores import AllocationKind

Sense = Literal["cost", "gain"]
Level = Annotated[float, Ge(0), Le(1)]
MeanSparsity = Annotated[float, Ge(0), Lt(1)]
FLOOR, CAP = 0.2, 0.9  # the least and the most sparsity, where none is given

_TIE = 1e-9  # slopes that differ by less, relative to the steeper one, are equal: rounding alone tells them apart
_NOTHING = 1e-12  # times the largest cost: it stands for no cost where logarithms are taken


@dataclass(frozen=True, eq=False)
class Curves:
    """The predicted change of the loss for every level of every unit, and what each level spends.

    Attributes:
        units: names of matrices or of blocks.
        levels: the levels, ascending: fractions of the weights for a sparsity.
        costs: in nats, for each unit and level (U×K).
        sizes: what a level spends of the budget (U×K), ascending: the number of weights to remove for a sparsity.
        kind: what a level is.
        sense: `cost` where a higher level costs, `gain` where it pays.
        unit: whether units are matrices or blocks.
        source: what the curves belong to, by part: the model, the pruner, the text of its masks, the text of the loss.
        fingerprint: of the measurement.
        is_stepped: only the levels themselves can be had, and nothing between two of them.
        by_half: the costs that each half of the samples alone adds (2×U×K); their sum is `costs`. None where the
            samples are not kept apart.

    Raises:
        ValueError: names the unit whose cost is not finite, or says which sizes do not fit one another.
    """

    units: tuple[str, ...]
    levels: tuple[float, ...]
    costs: Tensor
    sizes: Tensor
    kind: AllocationKind = "sparsity"
    sense: Sense = "cost"
    unit: Granularity = "matrix"
    source: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = "none"
    is_stepped: bool = False
    by_half: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice("sense", self.sense, get_args(Sense))
        check_unique(self.units, self.units, what="curves")
        shape = (len(self.units), len(self.levels))
        if self.costs.shape != shape or self.sizes.shape != shape:
            raise ValueError(
                f"curves of {how_many(shape[0], 'unit')} and {how_many(shape[1], 'level')} must have costs and sizes "
                f"of {shape}, got {tuple(self.costs.shape)} and {tuple(self.sizes.shape)}"
            )
        if not bool((self.sizes.diff(dim=1) > 0).all()) or any(
            after <= before for before, after in zip(self.levels, self.levels[1:], strict=False)
        ):
            raise ValueError("levels and sizes of curves must ascend; give every level once, the lowest first")
        if not bool(self.costs.isfinite().all()):
            unit = self.units[int((~self.costs.isfinite()).any(dim=1).nonzero()[0])]
            raise ValueError(
                f"the cost of {unit} is not finite; look at its weights and inputs, or load the model in float32 "
                "(model.dtype=float32)"
            )

    def allocate(self, target: float, unit: Granularity | None = None, **settings: Any) -> Allocation:
        """Spends the curves.

        Args:
            target: the mean level, weighted by the size of the units: the fraction of all weights to remove.
            unit: `matrix` or `block`; None: the unit of the curves. Curves of matrices add up to curves of blocks.
            settings: `floor` and `cap`, see `Knapsack`.
        """
        return Knapsack(target=target, unit=unit, **settings)(self)

    @cached_property
    def halves(self) -> tuple[Curves, Curves] | None:
        """The curves of two disjoint halves of the samples; None where the samples are not kept apart."""
        if self.by_half is None:
            return None
        first, second = (replace(self, costs=2 * half, by_half=None) for half in self.by_half)
        return first, second

    @cached_property
    def by_block(self) -> Curves:
        """The curves of the blocks: the sums over each block's matrices.

        The sum leaves out what the matrices of a block do together; `granularity=block` measures that.
        """
        blocks = list(dict.fromkeys(map(block_of, self.units)))
        rows = torch.tensor([blocks.index(block_of(unit)) for unit in self.units])

        def summed(values_UK: Tensor) -> Tensor:
            return values_UK.new_zeros(len(blocks), values_UK.shape[1]).index_add_(0, rows, values_UK)

        by_half = None if self.by_half is None else torch.stack([summed(half) for half in self.by_half])
        return replace(
            self,
            units=tuple(blocks),
            costs=summed(self.costs),
            sizes=summed(self.sizes),
            unit="block",
            by_half=by_half,
        )

    @cached_property
    def finer(self) -> Curves:
        """The curves on levels that lie 0.01 apart, as they are where only the levels themselves can be had.

        From the lowest level above 0 on, the logarithm of the cost follows a monotone cubic (PCHIP); below, the cost is
        a straight line from 0.
        """
        if self.is_stepped or self.kind != "sparsity" or len(self.levels) < 4:
            return self
        from scipy.interpolate import PchipInterpolator  # it takes half a second, which start-up should not pay

        known = [level for level in self.levels if level > 0]
        start, stop = round(known[0] * 100), round(known[-1] * 100)
        levels = sorted({*known, *(each / 100 for each in range(start, stop + 1) if known[0] < each / 100 < known[-1])})
        measured_UK = self.costs[:, len(self.levels) - len(known) :].double()
        floor = max(float(measured_UK.max()) * _NOTHING, torch.finfo(torch.float64).tiny)
        logs_UK = measured_UK.clamp(min=floor).log()
        fine_UK = torch.from_numpy(PchipInterpolator(known, logs_UK.numpy(), axis=1)(levels)).exp()
        weights_U = self.sizes[:, -1] / self.levels[-1]
        zero_U1 = fine_UK.new_zeros(len(self.units), 1)
        all_levels = (0.0, *levels)
        return replace(
            self,
            levels=all_levels,
            costs=torch.cat([zero_U1, fine_UK], dim=1),
            sizes=weights_U[:, None] * torch.tensor(all_levels, dtype=torch.float64),
            by_half=None,
        )

    def with_costs(self, by_half: Tensor) -> Curves:
        """Gives curves of other costs, those that each half of the samples adds (2×U×K)."""
        return replace(self, costs=by_half.sum(0), by_half=by_half)

    def at(self, values: Mapping[str, float]) -> float:
        """Gives the predicted change of the loss, in nats, of a level for every unit, by its name."""
        fine = self.finer
        total = 0.0
        for unit, costs_K in zip(fine.units, fine.costs.tolist(), strict=True):
            total += _interpolated(fine.levels, costs_K, values[unit])
        return total


def equal_curves(layers: LayerMap, unit: Granularity, levels: Sequence[float], is_stepped: bool = False) -> Curves:
    """Gives curves that cost the same for each weight, which a knapsack spends evenly: to try a request."""
    names, numel = sizes_of(layers, unit)
    sizes_UK = torch.tensor(numel, dtype=torch.float64)[:, None] * torch.tensor(levels, dtype=torch.float64)
    return Curves(names, tuple(levels), sizes_UK / sizes_UK.sum(), sizes_UK, unit=unit, is_stepped=is_stepped)


def sizes_of(layers: LayerMap, unit: Granularity) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Gives the names of the units, and the weights of each.

    Raises:
        ValueError: the layers do not say how large their matrices are.
    """
    if unit == "block":
        return layers.names, layers.numel
    if layers.matrix_numel is None:
        raise ValueError("these layers do not say how large each matrix is; take them of a model (layer_map)")
    return tuple(name.removesuffix(".weight") for name in layers.matrices), layers.matrix_numel


def knapsack(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float]],
    levels: Sequence[Sequence[float]],
    budget: float,
    *,
    sense: Sense = "cost",
    is_stepped: bool = False,
) -> list[float]:
    """Gives each unit a level, so that the levels spend a budget and cost least (or gain most) together.

    The lower convex hull of cost over size (for gains the upper, concave one) of every unit is a row of segments. The
    segments of all units are bought in the order of their slope. Segments of equal slope share the rest of the budget
    in proportion to their size. Where levels are steps, a step that does not fit is left out, and afterwards single
    levels are taken as long as one fits. This is the optimum for convex curves and levels without steps. Gains in steps
    miss the optimum by the value of the first segment that does not fit at most.

    Args:
        costs: of each level of each unit.
        sizes: what each level spends, ascending.
        levels: the levels of each unit; the first is what the unit has at least.
        budget: what all units spend together: exactly where levels are not steps, otherwise at most.
        sense: whether costs are costs or gains.
        is_stepped: only the levels themselves can be had.

    Returns:
        The level of each unit.

    Raises:
        ValueError: the lowest levels spend more than the budget, or the highest spend less, where there are no steps.
    """
    sign = -1.0 if sense == "gain" else 1.0
    least = math.fsum(each[0] for each in sizes)
    most = math.fsum(each[-1] for each in sizes)
    slack = 1e-9 * max(abs(most), 1.0)
    if budget < least - slack or (budget > most + slack and not is_stepped):
        raise ValueError(f"a budget of {budget} is not allowed; allowed: {least} to {most}")
    segments: list[tuple[float, int, int, int]] = []
    for number, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        hull = _lower_hull([sign * each for each in cost], size)
        for start, stop in itertools.pairwise(hull):
            slope = sign * (cost[stop] - cost[start]) / (size[stop] - size[start])
            segments.append((slope, number, start, stop))
    segments.sort(key=lambda each: (each[0], each[2]))  # of equal ones, the low levels of all units first
    rest = budget - least
    if is_stepped:
        return _stepped(segments, costs, sizes, levels, rest, sign)
    found = [float(each[0]) for each in levels]
    for equal in _ties(segments):
        spans: dict[int, tuple[int, int]] = {}  # a unit may have several segments of equal slope, side by side
        for _, number, start, stop in equal:
            first, last = spans.get(number, (start, stop))
            spans[number] = min(first, start), max(last, stop)
        wanted = math.fsum(sizes[number][stop] - sizes[number][start] for number, (start, stop) in spans.items())
        share = min(1.0, max(rest, 0.0) / wanted)
        for number, (start, stop) in spans.items():
            size_of_level = sizes[number][start] + share * (sizes[number][stop] - sizes[number][start])
            found[number] = _interpolated(sizes[number], levels[number], size_of_level)
        rest -= share * wanted
        if share < 1:
            break  # rounding may leave a rest, which must not buy more
    return found


def _ties(segments: Sequence[tuple[float, int, int, int]]) -> Iterator[Sequence[tuple[float, int, int, int]]]:
    """Yields the segments of equal slope together, in the order of their slope."""
    start = 0
    for stop in range(1, len(segments) + 1):
        slope = segments[start][0]
        if stop == len(segments) or segments[stop][0] - slope > _TIE * max(abs(slope), abs(segments[stop][0])):
            yield segments[start:stop]
            start = stop


def _stepped(
    segments: Sequence[tuple[float, int, int, int]],
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float]],
    levels: Sequence[Sequence[float]],
    rest: float,
    sign: float,
) -> list[float]:
    """Buys whole segments as long as they fit, and then single steps."""
    at = [0] * len(levels)
    room = rest * (1 + 1e-12) + 1e-9
    for _, number, start, stop in segments:
        size = sizes[number][stop] - sizes[number][start]
        if at[number] == start and size <= room:
            at[number] = stop
            room -= size
    while True:
        steps = [
            (
                sign * (costs[number][stop] - costs[number][here]) / (sizes[number][stop] - sizes[number][here]),
                number,
                stop,
            )
            for number, here in enumerate(at)
            for stop in range(here + 1, len(levels[number]))
            if sizes[number][stop] - sizes[number][here] <= room
        ]
        if not steps:
            return [levels[number][here] for number, here in enumerate(at)]
        _, number, stop = min(steps)
        room -= sizes[number][stop] - sizes[number][at[number]]
        at[number] = stop


def _lower_hull(costs: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """Gives the levels on the lower convex hull of cost over size, the first and the last among them."""
    hull: list[int] = []
    for level in range(len(costs)):
        while len(hull) > 1:
            before, last = hull[-2], hull[-1]
            slope_to_last = (costs[last] - costs[before]) * (sizes[level] - sizes[before])
            slope_to_here = (costs[level] - costs[before]) * (sizes[last] - sizes[before])
            if slope_to_last <= slope_to_here:
                break
            hull.pop()
        hull.append(level)
    return hull


def _interpolated(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """Gives the value of a polygon at a point; outside it the first or the last value."""
    for low, high, before, after in zip(points, points[1:], values, values[1:], strict=False):
        if at <= high:
            return before + (after - before) * min(max((at - low) / (high - low), 0.0), 1.0)
    return values[-1]


@dataclass(frozen=True, kw_only=True)
class Knapsack:
    """Spends curves, by `knapsack`: each unit gets the level at which the loss pays least in all.

    Attributes:
        target: the mean level: the fraction of all weights to remove.
        unit: matrix or block; None: the unit of the curves.
        floor: the least sparsity of a unit; None: 0.2, or the target where that is lower.
        cap: the most sparsity of a unit; None: 0.9.
    """

    spends: ClassVar[Literal["curves"]] = "curves"

    target: MeanSparsity = 0.5
    unit: Granularity | None = None
    floor: Level | None = None
    cap: Annotated[float, Gt(0), Lt(1)] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "allocator")
        low, high = self.range
        if not low <= self.target <= high:
            raise ValueError(
                f"allocator.target={self.target} is outside the feasible range {low} to {high}; change it, or "
                "allocator.floor or allocator.cap"
            )

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most that a unit gets."""
        low = min(FLOOR, self.target) if self.floor is None else self.floor
        return low, CAP if self.cap is None else self.cap

    def __call__(self, curves: Curves) -> Allocation:
        if curves.kind != "sparsity" or curves.sense != "cost":
            raise ValueError(
                f"allocator=knapsack must have curves of what a sparsity costs, got {curves.kind} ({curves.sense})"
            )
        if self.unit == "matrix" and curves.unit == "block":
            raise ValueError(
                "allocator.unit=matrix needs curves of matrices, and these are of blocks; use "
                "estimator.granularity=matrix, or allocator.unit=block"
            )
        spent = curves.by_block if self.unit == "block" and curves.unit == "matrix" else curves
        fine = spent.finer
        low, high = self.range
        weights = [round(float(size) / fine.levels[-1]) for size in fine.sizes[:, -1]]
        points = [self._points(fine.levels, costs_K, low, high, fine.is_stepped) for costs_K in fine.costs.tolist()]
        levels = [[level for level, _ in each] for each in points]
        given = levels[0]
        if not given or not given[0] - 1e-9 <= self.target <= min(given[-1], spent.levels[-1]) + 1e-9:
            raise ValueError(
                f"allocator.target={self.target} is outside the levels that allocator.floor and allocator.cap leave of "
                f"{', '.join(f'{level:g}' for level in spent.levels)}; change one of the three, or the levels "
                "(estimator.levels, pruner.m)"
            )
        sizes = [[level * weight for level in each] for each, weight in zip(levels, weights, strict=True)]
        values = knapsack(
            [[cost for _, cost in each] for each in points],
            sizes,
            levels,
            self.target * sum(weights),
            is_stepped=fine.is_stepped,
        )
        budget = self.target
        if fine.is_stepped:
            budget = math.fsum(value * size for value, size in zip(values, weights, strict=True)) / sum(weights)
        return Allocation(fine.units, "sparsity", tuple(values), budget, tuple(weights), dict(curves.source))

    @staticmethod
    def _points(
        levels: Sequence[float], costs: Sequence[float], low: float, high: float, is_stepped: bool
    ) -> list[tuple[float, float]]:
        """Gives the levels from `low` to `high` with their costs; without steps both ends are there, interpolated."""
        inside = [
            (level, cost) for level, cost in zip(levels, costs, strict=True) if low - 1e-9 <= level <= high + 1e-9
        ]
        if is_stepped:
            return inside
        ends = {level: _interpolated(levels, costs, level) for level in (low, min(high, levels[-1]))}
        return sorted([each for each in inside if all(abs(each[0] - end) > 1e-9 for end in ends)] + [*ends.items()])
