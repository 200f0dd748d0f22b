"""Shares of a whole number, the largest remainder, and the checks that allocators have in common."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral
from typing import Literal, get_args

from layerif.checks import check_choice, is_number
from layerif.layers import LayerMap, in_layer_order
from layerif.scores import SPREAD_NOISE, Kind, LayerScores, smooth

Shift = Literal["min", "none"]


_TIE_NOISE = 1e-9  # of one expert: nearer fractions are the rounding of equal ones


def shares_of(values: list[float], beta: float, shift: Shift) -> list[Fraction]:
    """w^β/Σw^β, summing to one exactly: no budget, however large, is missed by rounding."""
    check_beta_and_shift(beta, shift)
    low, high = min(values), max(values)
    if high - low <= SPREAD_NOISE * high:
        return [Fraction(1, len(values))] * len(values)
    base = low if shift == "min" else 0.0
    powers = [Fraction(((value - base) / (high - base)) ** beta) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def round_largest_remainder(values: list[float], shares: list[Fraction], budget: int, floor: int) -> list[int]:
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


def oriented_values(scores: LayerScores, layers: LayerMap, kind: Kind, *, smoothing: bool) -> list[float]:
    """The scores in the model's order, higher = give more of `kind`, smoothed if asked for."""
    by_name = dict(zip(scores.layers, scores.oriented(kind), strict=True))
    values = list(in_layer_order(by_name, layers.names, source=f"scores from {scores.source}"))
    if not smoothing:
        return values
    smoothed = smooth(values)
    # The polynomial may undershoot zero; lifting all values leaves every share under shift=min as it is.
    lift = max(0.0, -min(smoothed))
    return [value + lift for value in smoothed]


def checked_scores(scores: Sequence[float]) -> list[float]:
    values = [float(score) for score in scores]
    if not values:
        raise ValueError("an allocation needs the score of at least one layer, got none")
    for l, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise ValueError(
                f"scores must be finite and >= 0, got {value} at index {l}; "
                "take |S|, higher = give more (LayerScores.oriented)"
            )
    return values


def check_budget(budget: int, floor: int, num_layers: int, *, unit: str) -> None:
    check_whole("budget", budget)
    check_whole("floor", floor)
    if budget < num_layers * floor:
        raise ValueError(
            f"budget={budget} cannot give {num_layers} layers {floor} {unit}{'s' if floor > 1 else ''} each; "
            f"use allocator.budget>={num_layers * floor}"
        )


def check_count_settings(budget: int | None, beta: float, floor: int, shift: str) -> None:
    if budget is not None:
        check_whole("budget", budget)
    check_whole("floor", floor)
    check_beta_and_shift(beta, shift)


def check_whole(setting: str, got: object) -> None:
    if not isinstance(got, Integral) or isinstance(got, bool) or int(got) < 1:
        raise ValueError(f"allocator.{setting} must be a whole number >= 1, got {got!r}")


def check_beta_and_shift(beta: float, shift: str) -> None:
    check_choice("allocator.shift", shift, get_args(Shift))
    if not is_number(beta) or not math.isfinite(beta) or beta < 0:
        raise ValueError(f"allocator.beta={beta} must be finite and >= 0 (0: the same for every layer)")
