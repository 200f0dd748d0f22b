"""Bits per layer, by the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from layerif.allocate._hulls import knapsack
from layerif.allocate._shares import checked_scores, oriented_values, shifted_to_mean
from layerif.allocate.allocation import Allocation, checked_sizes, spent_budget
from layerif.checks import check_fields, check_value
from layerif.formats import formats_called
from layerif.layers import LayerMap
from layerif.scores import SPREAD_NOISE, LayerScores

TargetBits = Annotated[float, Gt(0), Le(32)]
Spread = Annotated[float, Ge(0), Le(32), "0 gives every layer the same"]


def to_bits(
    scores: Sequence[float], numel: Sequence[int], target: float, *, levels: Sequence[float], spread: float
) -> list[float]:
    """Gives bits per layer whose mean, weighted by the layers' parameters, is the target or little below it.

    With x the min-max of s (0 for equal scores), a layer's wish is b_l = c + spread·x_l, clipped to the levels, with
    the one c whose weighted mean is the target. Bits come in steps: `knapsack` buys levels in the order in which
    Σ d_l·(level − b_l)² falls most, or rises least, for each bit, until the budget is spent.

    Args:
        scores: s, one per layer; a higher score gets more bits.
        numel: d, the parameters of each layer.
        target: the mean bits.
        levels: the bits that can be had, ascending.
        spread: the bits between the wishes of the lowest and of the highest score.

    Raises:
        ValueError: the target lies outside the levels.
    """
    values, weights = checked_scores(scores), checked_sizes(numel, len(scores))
    check_value("allocator.target", target, TargetBits)
    check_value("allocator.spread", spread, Spread)
    least, most = levels[0], levels[-1]
    if not least <= target <= most:
        raise ValueError(
            f"allocator.target={target} is outside the feasible range {least:g} to {most:g} bits; change it, or the "
            "formats"
        )
    low, high = min(values), max(values)
    is_equal = high - low <= SPREAD_NOISE * high
    steps = [0.0 if is_equal else spread * (value - low) / (high - low) for value in values]
    wishes = [least + above for above in shifted_to_mean(steps, weights, target - least, most - least)]
    order = sorted(range(len(values)), key=lambda l: -values[l])  # among equal wishes a higher score goes first
    costs = [[weights[l] * (level - wishes[l]) ** 2 for level in levels] for l in order]
    sizes = [[weights[l] * level for level in levels] for l in order]
    bought = knapsack(costs, sizes, [list(levels)] * len(order), target * sum(weights), is_stepped=True)
    return [bits for _, bits in sorted(zip(order, bought, strict=True))]


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Spends scores on the bits of each layer, by `to_bits`.

    Attributes:
        target: the mean bits of a weight, with scales.
        spread: the bits between the wishes of the layers of the lowest and of the highest score.
        smoothing: smooth the scores over depth first; it needs at least 7 layers.
        formats: whose bits can be had: `gguf`, `all` or a list of names.
    """

    spends: ClassVar[Literal["scores"]] = "scores"

    target: TargetBits = 5.0
    spread: Spread = 2.0
    smoothing: bool = False
    formats: str | Sequence[str] = "gguf"

    def __post_init__(self) -> None:
        check_fields(self, "allocator")
        formats_called(self.formats, "allocator.formats")

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        values = oriented_values(scores, layers, "bits", smoothing=self.smoothing)
        levels = [each.bits for each in formats_called(self.formats)]
        bits = to_bits(values, layers.numel, self.target, levels=levels, spread=self.spread)
        return Allocation(layers.names, "bits", tuple(bits), spent_budget("bits", bits, layers.numel), layers.numel)
