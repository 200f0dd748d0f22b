"""Curves say what the loss pays for each level of each unit, and the knapsack spends a budget on the cheapest levels.

Letters in shape suffixes: U units (matrices or blocks), K levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from layerif.allocate._hulls import Sense, interpolated, knapsack
from layerif.allocate.allocation import COUNTS, MEANS, Allocation, spent_budget
from layerif.checks import Count, check_choice, check_fields, check_unique, check_value, how_many
from layerif.layers import LayerMap, MatrixOrBlock, Unit, block_of, sublayers
from layerif.scores import AllocationKind

Level = Annotated[float, Ge(0), Le(32)]  # a fraction of the weights, or bits
FLOOR, CAP = 0.2, 0.9  # the least and the most sparsity, where none is given

_NOTHING = 1e-12  # times the largest cost: it stands for no cost where logarithms are taken


@dataclass(frozen=True, eq=False)
class Curves:
    """The predicted change of the loss for every level of every unit, and what each level spends.

    Attributes:
        units: names of matrices or of blocks.
        levels: the levels, ascending: fractions of the weights for a sparsity, bits of each weight for bits, 0 and 1
            for blocks, where 1 keeps, numbers for ranks and experts.
        costs: in nats, for each unit and level (U×K). Gains of ranks and experts are in nats for each unit of the step
            that a direction is followed by.
        sizes: what a level spends of the budget (U×K), ascending: the number of weights to remove for a sparsity, the
            bits of all weights for bits, the parameters of an adapter for ranks and experts.
        kind: what a level is.
        sense: `cost` where `costs` are rises of the loss, `gain` where they are falls.
        unit: whether units are matrices, blocks, or the attention and MLP of blocks.
        source: what the curves belong to, by part: the model, the pruner, the text of its masks, the text of the loss.
        fingerprint: of the measurement.
        is_stepped: only the levels themselves can be had, and nothing between two of them.
        by_half: the costs that each half of the samples alone adds (2×U×K); their sum is `costs`, but for gains, of
            which each half has a concave curve of its own. None where the samples are not kept apart.
        most: the highest level that each unit can have; None: the last of all.

    Raises:
        ValueError: names the unit whose cost is not finite, or says which sizes do not fit one another.
    """

    units: tuple[str, ...]
    levels: tuple[float, ...]
    costs: Tensor
    sizes: Tensor
    kind: AllocationKind = "sparsity"
    sense: Sense = "cost"
    unit: Unit = "matrix"
    source: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = "none"
    is_stepped: bool = False
    by_half: Tensor | None = None
    most: tuple[float, ...] | None = None

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

    def allocate(self, target: float | None = None, unit: MatrixOrBlock | None = None, **settings: Any) -> Allocation:
        """Spends the curves.

        Args:
            target: the mean level, weighted by the size of the units: the fraction of all weights to remove, or the
                bits of a weight. For gains the budget: the parameters of the adapter, or None.
            unit: `matrix` or `block`; None: the unit of the curves. Curves of matrices add up to curves of blocks.
            settings: `floor` and `cap`, see `Knapsack`.
        """
        spent: dict[str, Any] = {"budget" if self.kind in COUNTS else "target": target}
        return Knapsack(unit=unit, **spent, **settings)(self)

    @cached_property
    def halves(self) -> tuple[Curves, Curves] | None:
        """The curves of two disjoint halves of the samples; None where the samples are not kept apart."""
        if self.by_half is None:
            return None
        first, second = (replace(self, costs=2 * half, by_half=None) for half in self.by_half)
        return first, second

    @cached_property
    def by_block(self) -> Curves:
        """The curves of the blocks: sums over matrices, without what those of a block do together (`granularity`)."""
        blocks = list(dict.fromkeys(map(block_of, self.units)))
        rows = torch.tensor([blocks.index(block_of(unit)) for unit in self.units])

        def summed(values_UK: Tensor) -> Tensor:
            return values_UK.new_zeros(len(blocks), values_UK.shape[1]).index_add_(0, rows, values_UK)

        by_half = None if self.by_half is None else torch.stack([summed(half) for half in self.by_half])
        most = None
        if self.most is not None:
            of_rows = list(zip(rows.tolist(), self.most, strict=True))
            most = tuple(min(each for row, each in of_rows if row == number) for number in range(len(blocks)))
        return replace(
            self,
            most=most,
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
            total += interpolated(fine.levels, costs_K, values[unit])
        return total

    def size_at(self, values: Mapping[str, float]) -> float:
        """Gives what levels of the curves spend of the budget together, a level for every unit, by its name."""
        levels = [self.levels.index(values[unit]) for unit in self.units]
        return float(self.sizes[torch.arange(len(levels)), levels].sum())


def with_base(kind: AllocationKind, levels: Sequence[float]) -> tuple[float, ...]:
    """Gives all levels of a curve whose prices at some levels are known: a sparsity of 0 costs nothing."""
    return (0.0, *levels) if kind == "sparsity" else tuple(levels)


def equal_curves(
    layers: LayerMap,
    unit: Unit,
    levels: Sequence[float],
    is_stepped: bool = False,
    kind: AllocationKind = "sparsity",
) -> Curves:
    """Gives curves that cost the same for each weight, which a knapsack spends evenly: to try a request.

    A sparsity costs in proportion. Each further bit leaves a quarter of the cost, as it does of a squared error.
    """
    names, numel = sizes_of(layers, unit)
    weights_U1, levels_K = torch.tensor(numel, dtype=torch.float64)[:, None], torch.tensor(levels, dtype=torch.float64)
    costs_UK = weights_U1 / weights_U1.sum() * (0.25**levels_K if kind == "bits" else levels_K)
    return Curves(names, tuple(levels), costs_UK, weights_U1 * levels_K, kind=kind, unit=unit, is_stepped=is_stepped)


def sizes_of(layers: LayerMap, unit: Unit) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Gives the names of the units, and the weights of each.

    Raises:
        ValueError: the layers do not say how large their matrices are.
    """
    if unit == "block":
        return layers.names, layers.numel
    if layers.matrix_numel is None:
        raise ValueError("these layers do not say how large each matrix is; take them of a model (layer_map)")
    if unit == "expert":
        experts = layers.each_expert
        if not experts.names:
            raise ValueError("this model has no fused experts; use allocator.unit=block")
        return experts.names, experts.numel
    if unit == "sublayer":
        found = sublayers(layers)
        return tuple(found), tuple(found.values())
    return tuple(name.removesuffix(".weight") for name in layers.matrices), layers.matrix_numel


@dataclass(frozen=True, kw_only=True)
class Knapsack:
    """Spends curves, by `knapsack`: each unit gets the level at which the loss pays least in all.

    Bits are steps, so that their mean stays at or below the target. More bits that do not lower the price of a unit
    are not bought. Ranks and experts are bought by `layerif.allocate.gains.spend`.

    Attributes:
        target: the mean level: the fraction of all weights to remove (None: 0.5), or the bits of a weight.
        budget: of ranks and experts, in parameters of the adapter; None: those of rank 8, or of 5 experts, everywhere.
        unit: matrix or block; None: the unit of the curves.
        floor: the least of a unit; None: the sparsity 0.2, or the target where that is lower, or the fewest bits; rank
            0, which is no adapter, or 1 expert.
        cap: the most of a unit; None: the sparsity 0.9, or the most bits, ranks or experts of the curves.
    """

    spends: ClassVar[Literal["curves"]] = "curves"

    target: Level | None = None
    budget: Count | None = None
    unit: MatrixOrBlock | None = None
    floor: Annotated[float, Ge(0)] | None = None
    cap: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "allocator")

    def range(self, curves: Curves, target: float) -> tuple[float, float]:
        """Gives the least and the most that a unit gets.

        Args:
            curves: of sparsity or bits.
            target: the mean level.

        Raises:
            ValueError: the target lies outside, or no unit can have it.
        """
        least, most = min(FLOOR, target), CAP
        if curves.kind == "bits":
            least, most = curves.levels[0], curves.levels[-1]
        elif curves.kind == "sparsity":
            check_value("allocator.target", target, Annotated[float, Lt(1)])
            check_value("allocator.cap", most if self.cap is None else self.cap, Annotated[float, Lt(1)])
        low, high = least if self.floor is None else self.floor, most if self.cap is None else self.cap
        if not low <= target <= high:
            is_bits = curves.kind == "bits"
            nearest = min(curves.levels, key=lambda level: abs(level - (low + high) / 2))
            example = f", as allocator.target={nearest:g}" if is_bits and low <= nearest <= high else ""
            raise ValueError(
                f"allocator.target={target} is outside the feasible range {low:g} to {high:g}{' bits' * is_bits}; "
                f"change it{example}, or allocator.floor or allocator.cap"
            )
        return low, high

    def __call__(self, curves: Curves) -> Allocation:
        is_counted = curves.kind in COUNTS and curves.sense == "gain"
        if not is_counted and (curves.kind not in MEANS or curves.sense != "cost"):
            got = f"{curves.kind} ({curves.sense})" + "; use allocator=blocks" * (curves.kind == "blocks")
            raise ValueError(
                f"allocator=knapsack must have curves of what a sparsity or bits cost, or of what ranks or experts "
                f"gain, got {got}"
            )
        other, size = ("target", "budget") if is_counted else ("budget", "target")
        if getattr(self, other) is not None:
            raise ValueError(
                f"allocator.{other}={getattr(self, other)} has no meaning for {curves.kind}; use allocator.{size}"
            )
        if self.unit == "matrix" and curves.unit == "block":
            raise ValueError(
                "allocator.unit=matrix needs curves of matrices, and these are of blocks; use "
                "estimator.granularity=matrix, or allocator.unit=block"
            )
        spent = curves.by_block if self.unit == "block" and curves.unit == "matrix" else curves
        if is_counted:
            from layerif.allocate.gains import spend  # which is made of curves

            return spend(spent, self.budget, floor=self.floor, cap=self.cap)
        target = 0.5 if self.target is None else self.target
        low, high = self.range(curves, target)
        fine = spent.finer
        weights = [round(float(size) / fine.levels[-1]) for size in fine.sizes[:, -1]]
        points = [self._points(fine.levels, costs_K, low, high, fine.is_stepped) for costs_K in fine.costs.tolist()]
        given = [level for level, _ in points[0]]
        if not given or not given[0] - 1e-9 <= target <= min(given[-1], spent.levels[-1]) + 1e-9:
            raise ValueError(
                f"allocator.target={target} is outside the levels that allocator.floor and allocator.cap leave of "
                f"{', '.join(f'{level:g}' for level in spent.levels)}; change one of the three, or the levels "
                f"({'estimator.formats' if curves.kind == 'bits' else 'estimator.levels, pruner.m'})"
            )
        if curves.kind == "bits":
            points = [_falling(each) for each in points]
        levels = [[level for level, _ in each] for each in points]
        sizes = [[level * weight for level in each] for each, weight in zip(levels, weights, strict=True)]
        values = knapsack(
            [[cost for _, cost in each] for each in points],
            sizes,
            levels,
            target * sum(weights),
            is_stepped=fine.is_stepped,
        )
        budget = spent_budget(curves.kind, values, weights) if fine.is_stepped else target
        return Allocation(fine.units, curves.kind, tuple(values), budget, tuple(weights), dict(curves.source))

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
        ends = {level: interpolated(levels, costs, level) for level in (low, min(high, levels[-1]))}
        return sorted([each for each in inside if all(abs(each[0] - end) > 1e-9 for end in ends)] + [*ends.items()])


def _falling(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Leaves out levels that cost no less than a lower one."""
    found = list(points[:1])
    for level, cost in points[1:]:
        if cost < found[-1][1]:
            found.append((level, cost))
    return found
