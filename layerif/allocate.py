"""From scores to allocations: how many experts, what rank or what sparsity each layer gets.

The `to_*` functions are the arithmetic (sequences in, lists out); they take finite, non-negative values where higher
means "give more", in any unit: scaling all values changes nothing. Equal values give the uniform allocation, ties go to
the lower index. The dataclasses below them are the configuration and take `LayerScores`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any, Literal, get_args

from layerif.checks import check_choice, check_unique, is_number
from layerif.layers import LayerMap, in_layer_order
from layerif.scores import SPREAD_NOISE, Kind, LayerScores, smooth

Shift = Literal["min", "none"]
Rounding = Literal["largest_remainder", "upstream"]
Rule = Literal["scaled", "shifted"]

BUDGET_TOLERANCE = 1e-6  # of a sparsity, as a fraction of all parameters
_TIE_NOISE = 1e-9  # of one expert: nearer fractions are the rounding of equal ones


@dataclass(frozen=True)
class Allocation:
    """What each layer gets.

    values: a count per layer (experts, rank), or the fraction of the layer's parameters to remove (sparsity).
    budget: the sum of the counts, or the parameter-weighted mean of the sparsities; checked on construction, exactly
        and to 1e-6. numel: parameters per layer, the weights of that mean; only for sparsity.
    """

    layers: tuple[str, ...]
    kind: Kind
    values: tuple[int, ...] | tuple[float, ...]
    budget: int | float
    numel: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_unique(self.layers, self.values, what=f"{self.kind} values")
        allowed = "a fraction in [0, 1]" if self.kind == "sparsity" else "a whole number >= 1"
        for layer, value in zip(self.layers, self.values, strict=True):
            if self.kind == "sparsity":
                valid = is_number(value) and 0 <= value <= 1
            else:
                valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not valid:
                raise ValueError(f"{self.kind} of layer {layer!r} must be {allowed}, got {value!r}")
        spent = spent_budget(self.kind, self.values, self.numel)
        if abs(spent - self.budget) > (BUDGET_TOLERANCE if self.kind == "sparsity" else 0):
            raise ValueError(f"the {self.kind} values spend a budget of {spent}, not the {self.budget} they were given")

    def by_name(self) -> dict[str, Any]:
        return dict(zip(self.layers, self.values, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; `from_dict` is its inverse."""
        return {
            "layers": list(self.layers),
            "kind": self.kind,
            "values": list(self.values),
            "budget": self.budget,
            "numel": None if self.numel is None else list(self.numel),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Allocation:
        return cls(
            layers=tuple(saved["layers"]),
            kind=saved["kind"],
            values=tuple(saved["values"]),
            budget=saved["budget"],
            numel=None if saved.get("numel") is None else tuple(saved["numel"]),
        )


def spent_budget(kind: Kind, values: Sequence[float], numel: Sequence[int] | None = None) -> int | float:
    """The sum of counts, or the mean of sparsities weighted by `numel`."""
    if kind != "sparsity":
        return sum(int(value) for value in values)
    weights = _checked_numel(numel, len(values))
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def to_experts(
    scores: Sequence[float],
    budget: int,
    *,
    beta: float,
    floor: int = 1,
    shift: Shift = "min",
    rounding: Rounding = "largest_remainder",
) -> list[int]:
    """Whole numbers of experts per layer that sum to `budget`.

    Share of layer l: w_l^β/Σw^β, with w = s − min s (`shift=min`) or w = s (`shift=none`).
    largest_remainder: n_l = floor + ⌊f_l⌋ with f_l = share·(budget − L·floor), and what is left over goes to the
        largest fractions of f. A layer with a higher score never gets fewer.
    upstream: the rounding behind the published vectors. share·budget rounded half to even, at least `floor`; then the
        whole error goes onto one layer, a surplus taken from the highest score, a deficit given to the lowest. It does
        not keep the order, and fails where the surplus exceeds what the highest layer holds.
    Raises ValueError for negative or non-finite scores, and for a budget below L·floor.
    """
    check_choice("allocator.rounding", rounding, get_args(Rounding))
    values = _checked_scores(scores)
    _check_budget(budget, floor, len(values), unit="expert")
    shares = _shares(values, beta, shift)
    if rounding == "upstream":
        return _round_upstream(values, shares, budget, floor)
    return _round_largest_remainder(values, shares, budget, floor)


def to_rank(
    scores: Sequence[float], budget: int, *, beta: float = 1.0, floor: int = 1, shift: Shift = "min"
) -> list[int]:
    """LoRA ranks per layer that sum to `budget`, by the shares and the largest remainder of `to_experts`."""
    values = _checked_scores(scores)
    _check_budget(budget, floor, len(values), unit="rank")
    return _round_largest_remainder(values, _shares(values, beta, shift), budget, floor)


def to_sparsity(
    scores: Sequence[float],
    numel: Sequence[int],
    target: float,
    *,
    epsilon: float,
    max_sparsity: float = 0.99,
    rule: Rule = "scaled",
) -> list[float]:
    """Sparsities per layer whose mean, weighted by the layers' parameters `numel` (d), is `target`.

    x = min-max of s (equal scores: ½), then
    scaled (the paper's): r = (1−ε) + 2εx; ρ_l = c·r_l with one c for all. Where c·r_l exceeds `max_sparsity`, ρ_l is
        `max_sparsity` and the other layers make up for it, still in proportion to r (upstream clips without, and
        misses the target).
    shifted (OWL's and DLP's): ρ_l = c + 2εx_l with one c for all, which is target + 2ε(x_l − mean x) where nothing is
        clipped; clipped to [0, `max_sparsity`] the other layers make up for it by a common c.
    Raises ValueError, with the feasible range, if no c meets the target.
    """
    values = _checked_scores(scores)
    weights = _checked_numel(numel, len(values))
    _check_sparsity_settings(target, epsilon, max_sparsity)
    check_choice("allocator.rule", rule, get_args(Rule))
    if rule == "shifted":
        return _shifted([2 * epsilon * x for x in _min_max(values)], weights, target, max_sparsity)
    relative = [(1 - epsilon) + 2 * epsilon * x for x in _min_max(values)]
    relative = [r if r > SPREAD_NOISE else 0.0 for r in relative]  # ε = 1: rounding must not be scaled up to a share
    wanted = target * sum(weights)
    clipped: set[int] = set()
    while True:
        free = [l for l in range(len(values)) if l not in clipped]
        scalable = math.fsum(weights[l] * relative[l] for l in free)
        rest = wanted - max_sparsity * sum(weights[l] for l in clipped)
        if rest <= BUDGET_TOLERANCE * sum(weights) / 2 or scalable > 0:
            scale = max(rest, 0.0) / scalable if scalable > 0 else 0.0
        else:  # ε = 1 leaves nothing to scale in the lowest layers
            feasible = max_sparsity * sum(weights[l] for l in clipped) / sum(weights)
            raise ValueError(
                f"allocator.target={target} cannot be reached with allocator.epsilon={epsilon}: layers of the lowest "
                f"score stay dense; feasible are 0 to {feasible:.6f}; lower the target or epsilon"
            )
        over = [l for l in free if scale * relative[l] > max_sparsity]
        if not over:
            return [max_sparsity if l in clipped else scale * relative[l] for l in range(len(values))]
        clipped.update(over)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """LoRA experts per layer, by `to_experts`.

    budget: experts of all layers together; None: 5 per layer (the paper's 160 on 32). beta: the paper's was 2.5 for
    Mistral-7B and 3 for Gemma-7B. smoothing: smooth the scores over depth first.
    """

    budget: int | None = None
    beta: float = 2.5
    floor: int = 1
    shift: Shift = "min"
    rounding: Rounding = "largest_remainder"
    smoothing: bool = False

    def __post_init__(self) -> None:
        _check_count_settings(self.budget, self.beta, self.floor, self.shift)
        check_choice("allocator.rounding", self.rounding, get_args(Rounding))

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        budget = 5 * len(layers.names) if self.budget is None else self.budget
        values = _oriented(scores, layers, "experts", smoothing=self.smoothing)
        counts = to_experts(values, budget, beta=self.beta, floor=self.floor, shift=self.shift, rounding=self.rounding)
        return Allocation(layers.names, "experts", tuple(counts), budget)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """LoRA rank per layer, by `to_rank`. budget: all ranks together; None: 8 per layer."""

    budget: int | None = None
    beta: float = 1.0
    floor: int = 1
    shift: Shift = "min"

    def __post_init__(self) -> None:
        _check_count_settings(self.budget, self.beta, self.floor, self.shift)

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        budget = 8 * len(layers.names) if self.budget is None else self.budget
        values = _oriented(scores, layers, "rank", smoothing=False)
        ranks = to_rank(values, budget, beta=self.beta, floor=self.floor, shift=self.shift)
        return Allocation(layers.names, "rank", tuple(ranks), budget)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Sparsity per layer, by `to_sparsity`, weighted by the parameters the `LayerMap` counts.

    target: mean sparsity. epsilon: range of the relative sparsities; the paper used 0.3 for magnitude pruning, 0.1 for
    Wanda and SparseGPT. smoothing: smooth the scores over depth first (the paper's; needs at least 7 layers).
    rule: `scaled` is the paper's map and AlphaPruning's, `shifted` that of OWL (epsilon 0.08) and DLP (0.15); these
    do not smooth.
    """

    target: float = 0.5
    epsilon: float = 0.1
    max_sparsity: float = 0.99
    smoothing: bool = True
    rule: Rule = "scaled"

    def __post_init__(self) -> None:
        _check_sparsity_settings(self.target, self.epsilon, self.max_sparsity)
        check_choice("allocator.rule", self.rule, get_args(Rule))

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        values = _oriented(scores, layers, "sparsity", smoothing=self.smoothing)
        sparsities = to_sparsity(
            values, layers.numel, self.target, epsilon=self.epsilon, max_sparsity=self.max_sparsity, rule=self.rule
        )
        return Allocation(layers.names, "sparsity", tuple(sparsities), self.target, layers.numel)


def _shares(values: list[float], beta: float, shift: Shift) -> list[Fraction]:
    """w^β/Σw^β, summing to one exactly: no budget, however large, is missed by rounding."""
    _check_beta_and_shift(beta, shift)
    low, high = min(values), max(values)
    if high - low <= SPREAD_NOISE * high:
        return [Fraction(1, len(values))] * len(values)
    base = low if shift == "min" else 0.0
    powers = [Fraction(((value - base) / (high - base)) ** beta) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def _round_largest_remainder(values: list[float], shares: list[Fraction], budget: int, floor: int) -> list[int]:
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


def _round_upstream(values: list[float], shares: list[Fraction], budget: int, floor: int) -> list[int]:
    counts = [max(floor, round(round(float(share * budget), 9))) for share in shares]
    surplus = sum(counts) - budget
    taken_from = values.index(max(values) if surplus > 0 else min(values))
    if counts[taken_from] - surplus < floor:
        raise ValueError(
            f"rounding=upstream overspends the budget={budget} by {surplus}, but the highest-scored layer holds only "
            f"{counts[taken_from]}; use allocator.rounding=largest_remainder"
        )
    counts[taken_from] -= surplus
    return counts


def _shifted(steps: list[float], weights: list[int], target: float, max_sparsity: float) -> list[float]:
    """ρ_l = clip(c + step_l, 0, max_sparsity) of the one c that meets the target; there always is one."""

    def clipped(c: float) -> list[float]:
        return [min(max(c + step, 0.0), max_sparsity) for step in steps]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    # The mean is piecewise linear in c and bends where a layer meets a bound: between two bends c is exact.
    bends = sorted({bound - step for step in steps for bound in (0.0, max_sparsity)})
    means = [mean(clipped(c)) for c in bends]
    above = next((index for index, value in enumerate(means) if value >= target), len(bends) - 1)
    if above == 0 or means[above] == means[above - 1]:
        return clipped(bends[above])
    share = (target - means[above - 1]) / (means[above] - means[above - 1])
    return clipped(bends[above - 1] + share * (bends[above] - bends[above - 1]))


def _min_max(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    if high - low <= SPREAD_NOISE * high:
        return [0.5] * len(values)
    return [(value - low) / (high - low) for value in values]


def _oriented(scores: LayerScores, layers: LayerMap, kind: Kind, *, smoothing: bool) -> list[float]:
    """The scores in the model's order, higher = give more of `kind`, smoothed if asked for."""
    by_name = dict(zip(scores.layers, scores.oriented(kind), strict=True))
    values = list(in_layer_order(by_name, layers.names, source=f"scores from {scores.source}"))
    if not smoothing:
        return values
    smoothed = smooth(values)
    # The polynomial may undershoot zero; lifting all values leaves every share under shift=min as it is.
    lift = max(0.0, -min(smoothed))
    return [value + lift for value in smoothed]


def _checked_scores(scores: Sequence[float]) -> list[float]:
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


def _checked_numel(numel: Sequence[int] | None, num_layers: int) -> list[int]:
    if numel is None or len(numel) != num_layers or not all(weight > 0 for weight in numel):
        raise ValueError(
            f"sparsity needs numel, the number of parameters (>= 1) of each of the {num_layers} layers; got {numel}"
        )
    return [int(weight) for weight in numel]


def _check_budget(budget: int, floor: int, num_layers: int, *, unit: str) -> None:
    check_whole("budget", budget)
    check_whole("floor", floor)
    if budget < num_layers * floor:
        raise ValueError(
            f"budget={budget} cannot give {num_layers} layers {floor} {unit}{'s' if floor > 1 else ''} each; "
            f"use allocator.budget>={num_layers * floor}"
        )


def _check_count_settings(budget: int | None, beta: float, floor: int, shift: str) -> None:
    if budget is not None:
        check_whole("budget", budget)
    check_whole("floor", floor)
    _check_beta_and_shift(beta, shift)


def check_whole(setting: str, got: object) -> None:
    if not isinstance(got, Integral) or isinstance(got, bool) or int(got) < 1:
        raise ValueError(f"allocator.{setting} must be a whole number >= 1, got {got!r}")


def _check_beta_and_shift(beta: float, shift: str) -> None:
    check_choice("allocator.shift", shift, get_args(Shift))
    if not is_number(beta) or not math.isfinite(beta) or beta < 0:
        raise ValueError(f"allocator.beta={beta} must be finite and >= 0 (0: the same for every layer)")


def _check_sparsity_settings(target: float, epsilon: float, max_sparsity: float) -> None:
    if not 0 <= epsilon <= 1:
        raise ValueError(f"allocator.epsilon={epsilon} must be in [0, 1]; the paper used 0.1 to 0.5")
    if not 0 < max_sparsity < 1:  # of a layer without weights nothing would be left to prune or to recover
        raise ValueError(f"allocator.max_sparsity={max_sparsity} must be in (0, 1); the default is 0.99")
    if not 0 <= target <= max_sparsity:
        raise ValueError(
            f"allocator.target={target} is outside the feasible range 0 to {max_sparsity} (allocator.max_sparsity)"
        )
