"""LoRA rank per layer, by the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from layerif.allocate._shares import (
    Beta,
    Shift,
    check_budget,
    checked_scores,
    oriented_values,
    round_largest_remainder,
    shares_of,
)
from layerif.allocate.allocation import Allocation
from layerif.checks import Count, check_fields
from layerif.layers import LayerMap
from layerif.scores import LayerScores


def to_rank(
    scores: Sequence[float], budget: int, *, beta: float = 1.0, floor: int = 1, shift: Shift = "min"
) -> list[int]:
    """Gives LoRA ranks per layer that sum to `budget`, by the shares and the largest remainder of `to_experts`."""
    values = checked_scores(scores)
    check_budget(budget, floor, len(values), unit="rank")
    return round_largest_remainder(values, shares_of(values, beta, shift), budget, floor)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Spends scores on the LoRA rank of each layer, by `to_rank`.

    Attributes:
        budget: all ranks together; None: 8 per layer.
        beta, floor, shift: see `to_experts`.
    """

    spends: ClassVar[Literal["scores"]] = "scores"

    budget: Count | None = None
    beta: Beta = 1.0
    floor: Count = 1
    shift: Shift = "min"

    def __post_init__(self) -> None:
        check_fields(self, "allocator")

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        budget = 8 * len(layers.names) if self.budget is None else self.budget
        values = oriented_values(scores, layers, "rank", smoothing=False)
        ranks = to_rank(values, budget, beta=self.beta, floor=self.floor, shift=self.shift)
        return Allocation(layers.names, "rank", tuple(ranks), budget)
