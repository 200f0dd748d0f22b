"""Blocks or experts to keep: those of the highest scores, those that cost most to leave out, or all outside a span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from layerif.allocate._shares import Keep, number_to_keep, oriented_values
from layerif.allocate.allocation import Allocation
from layerif.allocate.curves import Curves
from layerif.allocate.spans import Spans
from layerif.checks import check_fields, is_finite
from layerif.layers import Droppable, LayerMap, Unit
from layerif.scores import LayerScores


def to_blocks(values: Sequence[float], keep: int) -> list[int]:
    """Gives 1 to the `keep` units of the highest values, and 0 to the others.

    Among equal values the earlier unit stays.

    Args:
        values: one per unit, finite; a higher one stays longer.
        keep: the number of units that stay, at least one and not all.
    """
    for index, value in enumerate(values):
        if not is_finite(value):
            raise ValueError(f"values must be finite, got {value} at index {index}; give each unit a number")
    number = _number(keep, len(values), "block")
    stays = {*sorted(range(len(values)), key=lambda index: (-values[index], index))[:number]}
    return [int(index in stays) for index in range(len(values))]


def _number(keep: float, num_units: int, unit: Unit) -> int:
    return number_to_keep(keep, num_units, unit=unit, all_allowed=False)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Keeps the blocks of the highest scores, those that cost most to leave out, or all outside the nearest span.

    Important blocks stay, and undertrained ones go first. Among equal blocks the earlier ones stay, and among equal
    spans the last one goes.

    Attributes:
        keep: a whole number of units that stay, or a fraction of them.
        unit: `block`, or `sublayer`: attention and MLP of each block are units of their own, which needs prices of
            these (`estimator=skip_curve`) or a search (`method.search=greedy`). `expert`: every block keeps so many of
            its experts, by scores of their matrices, `estimator=expert_output` or `estimator=skip_curve`.
    """

    spends: ClassVar[Literal["either"]] = "either"
    kind: ClassVar[Literal["blocks"]] = "blocks"

    keep: Keep = 0.8
    unit: Droppable = "block"

    def __post_init__(self) -> None:
        check_fields(self, "allocator")

    @property
    def takes_experts(self) -> bool:
        """Tells if every expert is scored by itself, and not every layer."""
        return self.unit == "expert"

    def __call__(self, given: LayerScores | Curves | Spans, layers: LayerMap | None = None) -> Allocation:
        if isinstance(given, LayerScores):
            assert layers is not None
            if self.takes_experts:
                experts = layers.each_expert
                return self._kept(experts.names, oriented_values(given, experts, "blocks", smoothing=False))
            self._check_unit("block", f"estimator={given.source} scores blocks")
            return self._kept(layers.names, oriented_values(given, layers, "blocks", smoothing=False))
        if isinstance(given, Spans):
            self._check_unit("block", "spans are made of blocks")
            length = len(given.blocks) - _number(self.keep, len(given.blocks), "block")
            start = given.least(length)
            values = tuple(int(not start <= number < start + length) for number in range(len(given.blocks)))
            return Allocation(given.blocks, "blocks", values, sum(values))
        if given.kind != "blocks":
            raise ValueError(f"allocator=blocks must have curves of blocks, got {given.kind}; use estimator=skip_curve")
        self._check_unit(given.unit, f"these prices are of {given.unit}s")
        return self._kept(given.units, given.costs[:, 0].tolist())

    def _kept(self, units: Sequence[str], values: Sequence[float]) -> Allocation:
        if self.takes_experts:
            return self._kept_of_each_block(units, values)
        number = _number(self.keep, len(units), self.unit)
        return Allocation(tuple(units), "blocks", tuple(to_blocks(values, number)), number)

    def _kept_of_each_block(self, units: Sequence[str], values: Sequence[float]) -> Allocation:
        """Keeps as many experts in every block, because a configuration has one number for all."""
        by_block: dict[str, list[int]] = {}
        for index, unit in enumerate(units):
            by_block.setdefault(unit.rpartition(".")[0], []).append(index)
        if len({*map(len, by_block.values())}) > 1:
            raise ValueError("allocator.unit=expert needs blocks of equally many experts; use allocator.unit=block")
        kept = [0] * len(units)
        for indices in by_block.values():
            number = _number(self.keep, len(indices), "expert")
            for index, stays in zip(indices, to_blocks([values[index] for index in indices], number), strict=True):
                kept[index] = stays
        return Allocation(tuple(units), "blocks", tuple(kept), sum(kept))

    def _check_unit(self, got: str, why: str) -> None:
        if got != self.unit:
            raise ValueError(
                f"allocator.unit={self.unit} cannot be spent: {why}; use estimator=skip_curve, whose unit follows, or "
                f"allocator.unit={got}"
            )
