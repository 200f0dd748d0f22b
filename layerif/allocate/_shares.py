"""The arithmetic and the checks that allocators share.

Counts: shares of a whole number and the largest remainder. Sparsities: levels whose weighted mean is the target. Units
that are kept: their number, as a whole number or as a share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from layerif.checks import Count, check_value, how_many
from layerif.layers import LayerMap, in_layer_order
from layerif.scores import SPREAD_NOISE, AllocationKind, LayerScores, smooth

Shift = Literal["min", "none"]
Beta = Annotated[float, Ge(0), "0 gives every layer the same"]
Cap = Annotated[float, Gt(0), Lt(1), "the default is 0.9"]
Keep = Annotated[float, Gt(0), "a whole number is a number of blocks, and a fraction a share of them"]

_TIE_NOISE = 1e-9  # in experts; fractions that lie nearer differ by rounding alone


def shares_of(values: list[float], beta: float, shift: Shift) -> list[Fraction]:
    """Gives w^β/Σw^β as fractions that sum to one exactly, so that rounding misses no budget, however large."""
    check_value("allocator.beta", beta, Beta)
    check_value("allocator.shift", shift, Shift)
    low, high = min(values), max(values)
    if high - low <= SPREAD_NOISE * high:
        return [Fraction(1, len(values))] * len(values)
    base = low if shift == "min" else 0.0
    powers = [Fraction(((value - base) / (high - base)) ** beta) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def round_largest_remainder(values: list[float], shares: list[Fraction], budget: int, floor: int) -> list[int]:
    """Gives whole numbers that sum to `budget`, each at least `floor` and in the order of `values`."""
    parts = [share * (budget - floor * len(values)) for share in shares]
    counts = [floor + math.floor(part) for part in parts]
    fractions = [part - math.floor(part) for part in parts]
    # Fractions that differ by float noise alone are one tie, so that no unit or summation order decides it.
    descending = sorted(range(len(parts)), key=lambda l: -fractions[l])
    tie = dict.fromkeys(descending, 0)
    for before, l in itertools.pairwise(descending):
        tie[l] = tie[before] + (fractions[before] - fractions[l] > _TIE_NOISE)
    for l in sorted(descending, key=lambda l: (tie[l], l))[: budget - sum(counts)]:
        counts[l] += 1
    # A tie of almost equal scores may have gone to the lower one: the same counts, dealt out by score.
    by_score = sorted(range(len(values)), key=lambda l: (-values[l], l))
    for l, count in zip(by_score, sorted(counts, reverse=True), strict=True):
        counts[l] = count
    return counts


def scaled_to_mean(relative: Sequence[float], weights: Sequence[int], target: float, most: float) -> list[float]:
    """Gives ρ_l = min(c·r_l, most) with the one c whose weighted mean is the target.

    The mean stays below the target only where layers with r_l = 0 would have to make up for those at `most`.

    Args:
        relative: r, finite and at least 0.
        weights: of the mean.
        target: the mean, at most `most`.
        most: the most that a layer gets.
    """
    wanted = target * sum(weights)
    clipped: set[int] = set()
    while True:
        free = [l for l in range(len(relative)) if l not in clipped]
        scalable = math.fsum(weights[l] * relative[l] for l in free)
        rest = wanted - most * sum(weights[l] for l in clipped)
        scale = max(rest, 0.0) / scalable if scalable > 0 else 0.0
        over = [l for l in free if scale * relative[l] > most]
        if not over:
            return [most if l in clipped else scale * relative[l] for l in range(len(relative))]
        clipped.update(over)


def shifted_to_mean(steps: Sequence[float], weights: Sequence[int], target: float, most: float) -> list[float]:
    """Gives ρ_l = clip(c + step_l, 0, most) with the one c whose weighted mean is the target; there always is one.

    Args:
        steps: the levels without c.
        weights: of the mean.
        target: the mean, from 0 to `most`.
        most: the most that a layer gets.
    """

    def clipped(c: float) -> list[float]:
        return [min(max(c + step, 0.0), most) for step in steps]

    # The mean is piecewise linear in c and bends where a layer meets a bound: between two bends c is exact.
    bends = sorted({bound - step for step in steps for bound in (0.0, most)})
    means = [mean_of(clipped(c), weights) for c in bends]
    above = next((index for index, value in enumerate(means) if value >= target), len(bends) - 1)
    if above == 0 or means[above] == means[above - 1]:
        return clipped(bends[above])
    share = (target - means[above - 1]) / (means[above] - means[above - 1])
    return clipped(bends[above - 1] + share * (bends[above] - bends[above - 1]))


def mean_of(values: Sequence[float], weights: Sequence[int]) -> float:
    """Gives the mean of the values, weighted."""
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def number_to_keep(keep: float, num_units: int, *, unit: str = "layer", all_allowed: bool = True) -> int:
    """Reads `allocator.keep`: a whole number of units, or a share of them, which is rounded to the nearest, halves up.

    Args:
        keep: 1 is one unit, and 1.0 all of them.
        num_units: the units that there are.
        unit: names one of them in messages.
        all_allowed: allow to keep all.

    Returns:
        A number from 1 to `num_units`.

    Raises:
        ValueError: no unit would be kept, more than there are, or all where that is not allowed.
    """
    check_value("allocator.keep", keep, Keep)
    units, most = how_many(num_units, unit), num_units if all_allowed else num_units - 1
    if most < 1:
        raise ValueError(f"a model with {units} has none to spare; leaving some out needs a model of at least two")
    advice = f"use a whole number from 1 to {most}, or a share such as 0.5"
    if isinstance(keep, int):
        number = keep
    elif keep > 1:
        raise ValueError(f"allocator.keep={keep} is neither a whole number nor a share of {units}; {advice}")
    else:
        number = math.floor(Fraction(str(keep)) * num_units + Fraction(1, 2))  # the decimal that was given, exactly
    if number < 1:
        raise ValueError(f"allocator.keep={keep} of {units} keeps none; {advice}")
    if number > num_units:
        raise ValueError(f"allocator.keep={keep} is more than the {units} that there are; {advice}")
    if number > most:
        raise ValueError(f"allocator.keep={keep} keeps all of {units}; {advice}")
    return number


def check_feasible(target: float, most: float, setting: str) -> None:
    """Refuses a mean sparsity above the most that a layer gets, which `setting` says."""
    if target > most:
        raise ValueError(
            f"allocator.target={target} is outside the feasible range 0 to {most}; lower it, or raise {setting}"
        )


def oriented_values(scores: LayerScores, layers: LayerMap, kind: AllocationKind, *, smoothing: bool) -> list[float]:
    """Gives the scores in the model's order, turned so that higher gets more of `kind`, and smoothed if asked for."""
    by_name = dict(zip(scores.layers, scores.oriented(kind), strict=True))
    values = list(in_layer_order(by_name, layers.names, source=f"scores from {scores.source}"))
    if not smoothing:
        return values
    smoothed = smooth(values)
    # The polynomial may undershoot zero; lifting all values leaves every share under shift=min as it is.
    lift = max(0.0, -min(smoothed))
    return [value + lift for value in smoothed]


def checked_scores(scores: Sequence[float]) -> list[float]:
    """Gives the scores as floats, and refuses negative and non-finite ones by their index."""
    values = [float(score) for score in scores]
    if not values:
        raise ValueError("an allocation needs the score of at least one layer, got none; give one for each")
    for l, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise ValueError(
                f"scores must be finite and >= 0, got {value} at index {l}; "
                "take |S|, higher = give more (LayerScores.oriented)"
            )
    return values


def check_budget(budget: int, floor: int, num_layers: int, *, unit: str) -> None:
    """Refuses a budget that cannot give every layer its floor, and names the least that can."""
    check_value("allocator.budget", budget, Count)
    check_value("allocator.floor", floor, Count)
    if budget < num_layers * floor:
        raise ValueError(
            f"budget={budget} cannot give {num_layers} layers {how_many(floor, unit)} each; "
            f"use allocator.budget>={num_layers * floor}"
        )
