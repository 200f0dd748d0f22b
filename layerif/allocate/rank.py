"""LoRA rank per layer or matrix, by the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any, ClassVar, Literal

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


def to_rank_by_size(
    scores: Sequence[float],
    numel: Sequence[Sequence[int]],
    budget: int,
    *,
    beta: float = 1.0,
    floor: int = 1,
    shift: Shift = "min",
) -> list[int]:
    """Gives LoRA ranks of matrices that sum to `budget`: the share of a block goes to its matrices by their size.

    Args:
        scores: one for each block; a higher score gets more.
        numel: the sizes of the matrices of each block.
        budget: the ranks of all matrices together.
        beta: see `to_experts`.
        floor: the least that a matrix gets.
        shift: see `to_experts`.
    """
    of_blocks = checked_scores(scores)
    check_budget(budget, floor, sum(map(len, numel)), unit="rank")
    shares = [
        share * Fraction(size, sum(sizes))
        for share, sizes in zip(shares_of(of_blocks, beta, shift), numel, strict=True)
        for size in sizes
    ]
    return round_largest_remainder(list(map(float, shares)), shares, budget, floor)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Spends scores on the LoRA rank of each layer or matrix, by `to_rank` or `to_rank_by_size`.

    Attributes:
        budget: all ranks together; None: 8 per layer, or per matrix.
        beta, floor, shift: see `to_experts`.
        matrices: the rank of a matrix: None gives it that of its layer, `size` shares the ranks of a layer by the sizes
            of its matrices, `score` takes the score of the matrix itself.
        target_modules: names of the linear layers that get a rank of their own; None: every one of the blocks.
    """

    spends: ClassVar[Literal["scores"]] = "scores"

    budget: Count | None = None
    beta: Beta = 1.0
    floor: Count = 1
    shift: Shift = "min"
    matrices: Literal["size", "score"] | None = None
    target_modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "allocator")

    @property
    def takes_matrices(self) -> bool:
        """Tells if scores of matrices are spent, and not those of layers."""
        return self.matrices == "score"

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        settings: Any = {"beta": self.beta, "floor": self.floor, "shift": self.shift}
        if self.matrices is None:
            budget = 8 * len(layers.names) if self.budget is None else self.budget
            ranks = to_rank(oriented_values(scores, layers, "rank", smoothing=False), budget, **settings)
            return Allocation(layers.names, "rank", tuple(ranks), budget)
        adapted = layers.only(self.target_modules, setting="method.target_modules")
        each = adapted.each_matrix
        budget = 8 * len(each.names) if self.budget is None else self.budget
        if self.matrices == "score":
            of_matrices = _of_adapted(scores, each.names)
            ranks = to_rank(oriented_values(of_matrices, each, "rank", smoothing=False), budget, **settings)
        else:
            values = oriented_values(_of_adapted(scores, adapted.names), adapted, "rank", smoothing=False)
            numel, sizes = iter(each.numel), [len(params) for params in adapted.params]
            ranks = to_rank_by_size(values, [list(islice(numel, size)) for size in sizes], budget, **settings)
        return Allocation(each.names, "rank", tuple(ranks), budget)


def _of_adapted(scores: LayerScores, names: Sequence[str]) -> LayerScores:
    """Gives the scores of those that get an adapter, and refuses scores that lack one of them."""
    by_name = scores.by_name()
    if missing := [name for name in names if name not in by_name]:
        raise ValueError(
            f"allocator.matrices=score needs the score of every matrix with an adapter, and {missing[0]} has none "
            f"({len(missing)} of {len(names)}); use probe.scope=all, or name matrices that are measured in "
            "method.target_modules"
        )
    return replace(scores, layers=tuple(names), values=tuple(by_name[name] for name in names))
