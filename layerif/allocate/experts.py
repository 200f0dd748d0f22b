"""LoRA experts per layer, by the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
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
from layerif.checks import Count, check_fields, check_value
from layerif.layers import LayerMap
from layerif.scores import LayerScores

Rounding = Literal["largest_remainder", "upstream"]


def to_experts(
    scores: Sequence[float],
    budget: int,
    *,
    beta: float,
    floor: int = 1,
    shift: Shift = "min",
    rounding: Rounding = "largest_remainder",
) -> list[int]:
    """Gives whole numbers of experts per layer that sum to `budget`.

    The share of layer l is w_l^β/Σw^β, with w = s − min s (`shift=min`) or w = s (`shift=none`).

    Args:
        scores: s, one per layer; a higher score gets more.
        budget: the experts of all layers together.
        beta: β, at least 0.
        floor: the least that a layer gets.
        shift: see above.
        rounding: `largest_remainder` gives n_l = floor + ⌊f_l⌋ with f_l = share·(budget − L·floor), and one more to
            the largest fractions of f until the budget is spent; a layer with a higher score never gets fewer.
            `upstream` is the rounding behind the published vectors: share·budget rounded half to even, at least
            `floor`; then the whole error goes onto one layer, a surplus taken from the highest score, a deficit given
            to the lowest. It does not keep the order, and fails where the surplus exceeds what the highest layer holds.

    Raises:
        ValueError: for negative or non-finite scores, and for a budget below L·floor.
    """
    check_value("allocator.rounding", rounding, Rounding)
    values = checked_scores(scores)
    check_budget(budget, floor, len(values), unit="expert")
    shares = shares_of(values, beta, shift)
    if rounding == "upstream":
        return _round_upstream(values, shares, budget, floor)
    return round_largest_remainder(values, shares, budget, floor)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Spends scores on LoRA experts per layer, by `to_experts`.

    Attributes:
        budget: the experts of all layers together; None: 5 per layer (the paper's 160 on 32).
        beta: the paper used 2.5 for Mistral-7B and 3 for Gemma-7B.
        floor, shift, rounding: see `to_experts`.
        smoothing: smooth the scores over depth first.
    """

    spends: ClassVar[Literal["scores"]] = "scores"

    budget: Count | None = None
    beta: Beta = 2.5
    floor: Count = 1
    shift: Shift = "min"
    rounding: Rounding = "largest_remainder"
    smoothing: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "allocator")

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        budget = 5 * len(layers.names) if self.budget is None else self.budget
        values = oriented_values(scores, layers, "experts", smoothing=self.smoothing)
        counts = to_experts(values, budget, beta=self.beta, floor=self.floor, shift=self.shift, rounding=self.rounding)
        return Allocation(layers.names, "experts", tuple(counts), budget)


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
