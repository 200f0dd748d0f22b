"""Gain curves of ranks, or experts, of an adapter: what they gain, the parameters they take, and their purchase.

Letters in shape suffixes: U units, K levels, R directions of a matrix, H the two halves of the samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from layerif.allocate._hulls import interpolated, knapsack, lower_hull
from layerif.allocate.allocation import Allocation
from layerif.allocate.curves import Curves
from layerif.layers import LayerMap

Counted = Literal["rank", "experts"]

USUAL: Mapping[str, int] = {"rank": 8, "experts": 5}  # the level that a budget of null gives to every matrix
FLOORS: Mapping[str, int] = {"rank": 0, "experts": 1}
MOST_RANK = 128  # directions of a matrix, unless the user wants another number
MOST_EXPERTS = 16  # unless a matrix has directions for more


def gain_curves(
    layers: LayerMap,
    gains: Sequence[Tensor] | None,
    *,
    kind: Counted = "rank",
    expert_rank: int = 8,
    most_rank: int | None = None,
    source: Mapping[str, str] | None = None,
    fingerprint: str = "none",
) -> Curves:
    """Makes the concave curves of matrices out of the gains of their directions.

    Args:
        layers: the matrices with their shapes.
        gains: of each direction of each matrix, in the order in which directions are taken, as each half of the samples
            adds to them (2×R); None: every parameter gains the same, to try a request.
        kind: the meaning of a level. E experts of rank r are given what rank r·E gains, which is an upper bound.
        expert_rank: the rank of an expert.
        most_rank: the directions of a matrix; None: as many as its rank, and 128 at most.
        source: see `Curves`.
        fingerprint: of the measurement.
    """
    assert layers.matrix_shapes is not None
    shapes = layers.matrix_shapes
    most = [min(*shape, most_rank or MOST_RANK) for shape in shapes]
    top = max(most) if kind == "rank" else max(max(most) // expert_rank, MOST_EXPERTS)
    levels, step = tuple(range(top + 1)), 1 if kind == "rank" else expert_rank
    sizes_UK = sizes_of_levels(kind, shapes, levels, expert_rank)

    def at_levels(gains_R: Tensor) -> list[float]:
        curve = concave_majorant(gains_R.tolist())
        return [interpolated(range(len(curve)), curve, level * step) for level in levels]

    by_half = None
    if gains is None:
        costs_UK = sizes_UK / sizes_UK[:, -1].sum()
    else:
        costs_UK = torch.tensor([at_levels(each_HR.sum(0)) for each_HR in gains], dtype=torch.float64)
        halves = [[at_levels(2 * each_HR[half]) for each_HR in gains] for half in (0, 1)]
        by_half = torch.tensor(halves, dtype=torch.float64) / 2
    return Curves(
        tuple(param.removesuffix(".weight") for param in layers.matrices),
        tuple(map(float, levels)),
        costs_UK,
        sizes_UK,
        kind=kind,
        sense="gain",
        source=source or {},
        fingerprint=fingerprint,
        is_stepped=True,
        by_half=by_half,
        most=tuple(map(float, most)) if kind == "rank" else None,
    )


def concave_majorant(gains: Sequence[float]) -> list[float]:
    """Gives the least concave curve that never falls and lies nowhere below the sums of the first gains.

    Args:
        gains: of one level after the other; some may be negative.

    Returns:
        The curve at no level, at the first, and so on; it begins with 0.
    """
    sums = [0.0, *torch.tensor(list(gains), dtype=torch.float64).cumsum(0).tolist()]
    top = max(range(len(sums)), key=lambda level: sums[level])  # behind it the curve is flat
    levels = [float(level) for level in range(top + 1)]
    hull = lower_hull([-value for value in sums[: top + 1]], levels)
    at, values = [levels[level] for level in hull], [sums[level] for level in hull]
    return [interpolated(at, values, float(level)) for level in range(len(sums))]


def sizes_of_levels(
    kind: Counted, shapes: Sequence[tuple[int, int]], levels: Sequence[int], expert_rank: int = 8
) -> Tensor:
    """Counts the parameters of an adapter's matrices at every level (U×K, float64).

    Rank r takes r·(O + I), and E experts of rank r take E·r·(O + I), with a router's E·I more where E > 1.

    Args:
        kind: the meaning of a level.
        shapes: outputs O and inputs I of each matrix.
        levels: ranks, or numbers of experts.
        expert_rank: the rank of an expert.
    """
    levels_K = torch.tensor(levels, dtype=torch.float64)
    sides_U1 = torch.tensor([sum(shape) for shape in shapes], dtype=torch.float64)[:, None]
    if kind == "rank":
        return sides_U1 * levels_K
    inputs_U1 = torch.tensor([shape[1] for shape in shapes], dtype=torch.float64)[:, None]
    return sides_U1 * (expert_rank * levels_K) + inputs_U1 * levels_K.where(levels_K > 1, 0)


def spend(
    curves: Curves, budget: int | None = None, *, floor: float | None = None, cap: float | None = None
) -> Allocation:
    """Buys the ranks, or experts, that gain most for their parameters.

    The budget is never exceeded, and what is left of it is less than the smallest step that a unit may still take.

    Args:
        curves: gains of ranks or experts.
        budget: parameters; None: those of rank 8, or of 5 experts, in every matrix, less where a matrix has no more,
            and between floor and cap.
        floor: the least of a unit; None: rank 0, which is no adapter, or 1 expert.
        cap: the most of a unit; None: the most that the curves have.

    Raises:
        ValueError: floor and cap are not whole numbers of the curves, or the budget does not fit them.
    """
    kind, last = curves.kind, curves.levels[-1]
    low, high = FLOORS[kind] if floor is None else floor, last if cap is None else cap
    if low % 1 or high % 1 or not 0 <= low <= min(high, last):
        raise ValueError(
            f"allocator.floor={low:g} and allocator.cap={high:g} must be whole numbers of {_WORDS[kind]}, the floor at "
            f"most the cap; allowed: 0 to {last:g}"
        )
    # The order of the units must not decide a tie, so they come by their names.
    order = sorted(range(len(curves.units)), key=lambda unit: curves.units[unit])
    levels, costs, sizes, usual = [], [], [], 0.0
    for unit in order:
        most = last if curves.most is None else curves.most[unit]
        if low > most:
            raise ValueError(
                f"allocator.floor={low:g} is more than {curves.units[unit]} can have, whose curve ends at rank "
                f"{most:g}; lower it, or name other layers in method.target_modules"
            )
        inside = [number for number, level in enumerate(curves.levels) if low <= level <= min(high, most)]
        levels.append([curves.levels[number] for number in inside])
        costs.append(curves.costs[unit, inside].tolist())
        sizes.append(curves.sizes[unit, inside].tolist())
        usual += float(curves.sizes[unit, curves.levels.index(max(low, min(USUAL[kind], most, high, last)))])
    given = usual if budget is None else budget
    what = {"matrix": "matrices", "block": "blocks"}[curves.unit] if len(order) > 1 else curves.unit
    _check_budget(given, sizes, f"the {_WORDS[kind]} of {len(order)} {what}", low)
    found = knapsack(costs, sizes, levels, given, sense="gain", is_stepped=True)
    values = [int(value) for _, value in sorted(zip(order, found, strict=True))]
    return Allocation(curves.units, kind, tuple(values), sum(values))


_WORDS: Mapping[str, str] = {"rank": "ranks", "experts": "experts"}


def _check_budget(budget: float, sizes: Sequence[Sequence[float]], what: str, low: float) -> None:
    """Refuses a budget of parameters that cannot pay the floors or a single step, or that nothing can spend."""
    least, most = sum(each[0] for each in sizes), sum(each[-1] for each in sizes)
    if budget < least:
        raise ValueError(
            f"allocator.budget={budget:.0f} parameters cannot pay {what}, {low:g} each, which take {least:.0f}; raise "
            "it, or lower allocator.floor"
        )
    steps = [each[1] - each[0] for each in sizes if len(each) > 1]
    if not low and budget < min(steps, default=0):
        raise ValueError(
            f"allocator.budget={budget:.0f} parameters are below one step, of which the smallest takes "
            f"{min(steps):.0f}; raise it"
        )
    if budget > most:
        raise ValueError(
            f"allocator.budget={budget:.0f} parameters are more than the {most:.0f} that {what} can have; lower it, or "
            f"raise allocator.cap (at most {MOST_EXPERTS} experts, or ranks up to estimator.r_max)"
        )
