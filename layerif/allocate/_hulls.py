"""The arithmetic of the knapsack: convex hulls, their segments, and the order in which these are bought."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

Sense = Literal["cost", "gain"]

_STRAIGHT = 1e-12  # a level that lies above a straight line by less, relative to it, is on it: that is rounding
_TIE = 1e-9  # slopes that differ by less, relative to the steeper one, are equal: rounding alone tells them apart


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
    in proportion to their size. Where levels are steps, units of equal slope take a segment each in turn, a step that
    does not fit is left out, and afterwards single levels are taken as long as one fits. This is the optimum for convex
    curves and levels without steps. Gains in steps miss the optimum by the value of the first segment that does not fit
    at most.

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
        hull = lower_hull([sign * each for each in cost], size)
        for start, stop in itertools.pairwise(hull):
            slope = sign * (cost[stop] - cost[start]) / (size[stop] - size[start])
            segments.append((slope, number, start, stop))
    segments.sort(key=lambda each: (each[0], each[2]))  # among equal ones the low levels of all units come first
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
            found[number] = interpolated(sizes[number], levels[number], size_of_level)
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
    """Buys whole segments as long as they fit, those of equal slope together, and then single steps."""
    at = [0] * len(levels)
    room = rest * (1 + 1e-12) + 1e-9

    for equal in _ties(segments):
        # The first segments of all units come before the second ones, and large ones before small ones, so that equal
        # curves are spent evenly to the end.
        rounds: list[tuple[int, float, int, int, int]] = []
        seen: dict[int, int] = {}
        for _, number, start, stop in sorted(equal, key=lambda each: each[2]):
            seen[number] = seen.get(number, 0) + 1
            rounds.append((seen[number], sizes[number][start] - sizes[number][stop], number, start, stop))
        for _, size, number, start, stop in sorted(rounds):
            if at[number] == start and -size <= room:
                at[number] = stop
                room += size
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


def lower_hull(costs: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """Gives the levels on the lower convex hull of cost over size, with the first, the last and those on its edges."""
    hull: list[int] = []
    for level in range(len(costs)):
        while len(hull) > 1:
            before, last = hull[-2], hull[-1]
            slope_to_last = (costs[last] - costs[before]) * (sizes[level] - sizes[before])
            slope_to_here = (costs[level] - costs[before]) * (sizes[last] - sizes[before])
            if slope_to_last - slope_to_here <= _STRAIGHT * (abs(slope_to_last) + abs(slope_to_here)):
                break
            hull.pop()
        hull.append(level)
    return hull


def interpolated(points: Sequence[float], values: Sequence[float], at: float) -> float:
    """Gives the value of a polygon at a point; outside it the first or the last value."""
    for low, high, before, after in zip(points, points[1:], values, values[1:], strict=False):
        if at <= high:
            return before + (after - before) * min(max((at - low) / (high - low), 0.0), 1.0)
    return values[-1]
