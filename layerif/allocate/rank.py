"""LoRA rank per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerif.allocate._shares import (
    Shift,
    check_budget,
    check_count_settings,
    checked_scores,
    oriented_values,
    round_largest_remainder,
    shares_of,
)
from layerif.allocate.allocation import Allocation
from layerif.layers import LayerMap
from layerif.scores import LayerScores


def to_rank(
    scores: Sequence[float], budget: int, *, beta: float = 1.0, floor: int = 1, shift: Shift = "min"
) -> list[int]:
    """LoRA ranks per layer that sum to `budget`, by the shares and the largest remainder of `to_experts`."""
    values = checked_scores(scores)
    check_budget(budget, floor, len(values), unit="rank")
    return round_largest_remainder(values, shares_of(values, beta, shift), budget, floor)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """LoRA rank per layer, by `to_rank`. budget: all ranks together; None: 8 per layer."""

    budget: int | None = None
    beta: float = 1.0
    floor: int = 1
    shift: Shift = "min"

    def __post_init__(self) -> None:
        check_count_settings(self.budget, self.beta, self.floor, self.shift)

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        budget = 8 * len(layers.names) if self.budget is None else self.budget
        values = oriented_values(scores, layers, "rank", smoothing=False)
        ranks = to_rank(values, budget, beta=self.beta, floor=self.floor, shift=self.shift)
        return Allocation(layers.names, "rank", tuple(ranks), budget)
