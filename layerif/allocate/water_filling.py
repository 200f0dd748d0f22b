"""Water-filling (MDL, Amaefuna et al., 2026): sparsities, experts and ranks per layer from gains, by one multiplier.

The gains q are the scores of `estimator=quadratic`; a layer of high gain keeps more weights and gets more experts, or a
higher rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from layerif.allocate._shares import (
    Cap,
    check_budget,
    check_feasible,
    checked_scores,
    round_largest_remainder,
    scaled_to_mean,
)
from layerif.allocate.allocation import Allocation, checked_sizes
from layerif.allocate.sparsity import TargetSparsity
from layerif.checks import Count, check_fields, check_value
from layerif.layers import LayerMap, in_layer_order
from layerif.scores import SPREAD_NOISE, LayerScores

Power = Annotated[float, Ge(1), Le(2), "the gains' exponent, k of sparsities and β of experts"]


def sparsity_by_gain(
    gains: Sequence[float], numel: Sequence[int], target: float, *, power: float = 1.0, cap: float = 0.9
) -> list[float]:
    """Gives ρ_l = min(cap, κ·n_l/q_l^k) with the one κ whose mean, weighted by the layers' parameters, is `target`.

    With k = 1 this spends Σ n_l·ρ_l at the least Σ q_l·ρ_l². κ is exact: it is found by clipping, not by bisection.

    Args:
        gains: q, one per layer; a layer of higher gain gets less sparsity. None counts as less than 1e-12 of the
            highest.
        numel: n, the parameters of each layer.
        target: the mean sparsity.
        power: k.
        cap: the most that a layer gets.
    """
    values = checked_scores(gains)
    weights = checked_sizes(numel, len(values))
    check_value("allocator.target", target, TargetSparsity)
    check_value("allocator.power", power, Power)
    check_value("allocator.cap", cap, Cap)
    check_feasible(target, cap, "allocator.cap")
    highest = max(values)
    relative = [max(value / highest, SPREAD_NOISE) if highest > 0 else 1.0 for value in values]
    return scaled_to_mean(
        [weight / gain**power for weight, gain in zip(weights, relative, strict=True)], weights, target, cap
    )


def experts_by_gain(
    gains: Sequence[float], costs: Sequence[float], budget: int, *, power: float = 1.0, floor: int = 1
) -> list[int]:
    """Gives whole numbers of experts that sum to `budget`, each at least `floor`.

    Above the floor a layer gets e_l = max(γ·q_l^β/c_l − 1, 0), with the one γ whose sum of all e_l is what the floors
    leave, rounded by the largest remainder.

    Args:
        gains: q, one per layer; a layer of higher gain gets more experts.
        costs: c, the size of an expert of each layer, in any unit.
        budget: the experts of all layers together.
        power: β.
        floor: the least that a layer gets.
    """
    values = checked_scores(gains)
    check_value("allocator.power", power, Power)
    check_budget(budget, floor, len(values), unit="expert")
    if len(costs) != len(values) or min(costs) <= 0:
        raise ValueError(f"costs must hold a number above 0 for each of {len(values)} layers; got {list(costs)}")
    highest, mean_cost = max(values), sum(costs) / len(costs)
    heights = [
        (value / highest if highest > 0 else 1.0) ** power * mean_cost / cost
        for value, cost in zip(values, costs, strict=True)
    ]
    above = _filled(heights, budget - floor * len(values))
    parts = [Fraction(each) for each in above]
    total = sum(parts)
    shares = [part / total if total else Fraction(1, len(parts)) for part in parts]
    return round_largest_remainder(heights, shares, budget, floor)


@dataclass(frozen=True, kw_only=True)
class WaterFilling:
    """Spends gains on sparsities by `sparsity_by_gain`, or on experts or ranks by `experts_by_gain`.

    Scores that mark undertrained layers mean more sparsity when they are high, and gains less: for a sparsity they are
    turned round as `estimator=reversed` does. The size of an expert, or of a rank, counts as in proportion to the
    block's parameters, which makes no difference where all blocks have the same shape.

    Attributes:
        kind: spend on `sparsity`, `experts` or `rank`.
        power: k or β.
        target: the mean sparsity.
        cap: the most sparsity that a block gets.
        budget: the experts, or ranks, of all blocks together; None: 5 experts or rank 8 per block.
        floor: the fewest experts, or the lowest rank, of a block.
    """

    spends: ClassVar[Literal["scores"]] = "scores"

    kind: Literal["sparsity", "experts", "rank"] = "sparsity"
    power: Power = 1.0
    target: TargetSparsity = 0.5
    cap: Cap = 0.9
    budget: Count | None = None
    floor: Count = 1

    def __post_init__(self) -> None:
        check_fields(self, "allocator")
        check_feasible(self.target, self.cap, "allocator.cap")

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        gains = in_layer_order(scores.by_name(), layers.names, source=f"scores from {scores.source}")
        if self.kind != "sparsity":
            each = 5 if self.kind == "experts" else 8
            budget = each * len(layers.names) if self.budget is None else self.budget
            counts = experts_by_gain(gains, layers.numel, budget, power=self.power, floor=self.floor)
            return Allocation(layers.names, self.kind, tuple(counts), budget)
        if scores.higher_means == "undertrained":
            low, high = min(gains), max(gains)
            gains = tuple(low + (high - gain) for gain in gains)
        values = sparsity_by_gain(gains, layers.numel, self.target, power=self.power, cap=self.cap)
        return Allocation(layers.names, "sparsity", tuple(values), self.target, layers.numel)


def _filled(heights: Sequence[float], volume: float) -> list[float]:
    """Gives max(γ·h_l − 1, 0) with the one γ whose sum is the volume."""
    falling = sorted(heights, reverse=True)
    multiplier, total = 0.0, 0.0
    for number, height in enumerate(falling, 1):
        total += height
        if multiplier and multiplier * height <= 1:  # this layer and those below it get nothing
            break
        multiplier = (volume + number) / total
    return [max(multiplier * height - 1, 0.0) for height in heights]
