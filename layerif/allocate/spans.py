"""The evidence on leaving blocks out: prices of single units, and distances over spans of consecutive blocks.

Letters in shape suffixes: L blocks, U units, K levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerif.allocate.curves import Curves, sizes_of
from layerif.checks import how_many
from layerif.layers import LayerMap, Unit


@dataclass(frozen=True, eq=False)
class Spans:
    """The distance that leaving out each span of consecutive blocks bridges: a curve over lengths for each start.

    Attributes:
        blocks: the names of all blocks, in the model's order.
        by_half: for each half of the samples the sum over its tokens of the distance between the hidden state before
            block l and that before block k (2×(L+1)×(L+1)); the last state is the last block's output.
        num_tokens: of each half.
        source: what the distances belong to, by part: the model and the text.
        fingerprint: of the measurement.
    """

    kind: ClassVar[Literal["blocks"]] = "blocks"
    sense: ClassVar[Literal["distance"]] = "distance"

    blocks: tuple[str, ...]
    by_half: Tensor
    num_tokens: tuple[int, int]
    source: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = "none"

    def __post_init__(self) -> None:
        shape = (2, len(self.blocks) + 1, len(self.blocks) + 1)
        if self.by_half.shape != shape:
            raise ValueError(
                f"spans of {how_many(len(self.blocks), 'block')} must have distances of {shape}, got "
                f"{tuple(self.by_half.shape)}"
            )

    @cached_property
    def distances(self) -> Tensor:
        """The mean over the tokens of the distance between any two states ((L+1)×(L+1))."""
        return self.by_half.sum(0) / max(1, sum(self.num_tokens))

    @property
    def halves(self) -> tuple[Spans, Spans] | None:
        """The spans of two disjoint halves of the samples; None where one of them is empty."""
        if not all(self.num_tokens):
            return None
        first, second = (
            Spans(self.blocks, torch.stack([half, half * 0]), (number, 0), self.source, self.fingerprint)
            for half, number in zip(self.by_half, self.num_tokens, strict=True)
        )
        return first, second

    def of_length(self, length: int) -> list[float]:
        """Gives the distance of each span of so many blocks, by the block that it begins with."""
        return self.distances.diagonal(length).tolist()

    def least(self, length: int) -> int:
        """Gives the number of the block that the span of least distance begins with, the last one among equals."""
        found = self.of_length(length)
        return max(start for start, distance in enumerate(found) if distance == min(found))

    def summary(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the part that a record keeps: the least distance of every length, and that of an allocation."""
        lengths = range(1, len(self.blocks))
        num_dropped = sum(not value for value in values.values())
        return {
            "kind": self.kind,
            "sense": self.sense,
            "unit": "span",
            "levels": list(lengths),
            "everywhere": [min(self.of_length(length)) for length in lengths],
            "distance": min(self.of_length(num_dropped)),
            "source": dict(self.source),
            "fingerprint": self.fingerprint,
        }


def block_curves(units: Sequence[str], costs: Tensor, numel: Sequence[int], unit: Unit, **about: Any) -> Curves:
    """Makes curves of two levels: 0 leaves a unit out, at its price, and 1 keeps it.

    Args:
        units: the names of the units.
        costs: the price of leaving each one out, in nats (U), or that by half of the samples (2×U).
        numel: the weights of each.
        unit: whether they are blocks or sublayers.
        **about: further fields of the curves.
    """
    sizes_UK = torch.tensor([[0.0, float(size)] for size in numel], dtype=torch.float64)
    costs_UK = torch.stack([costs.double(), torch.zeros_like(costs, dtype=torch.float64)], dim=-1)
    by_half = costs_UK if costs.ndim == 2 else None
    total_UK = costs_UK if by_half is None else costs_UK.sum(0)
    return Curves(
        tuple(units),
        (0.0, 1.0),
        total_UK,
        sizes_UK,
        kind="blocks",
        unit=unit,
        is_stepped=True,
        by_half=by_half,
        **about,
    )


def equal_costs(layers: LayerMap, unit: Unit) -> Curves:
    """Gives prices that are in proportion to the size of the unit that is left out: to try a request."""
    names, numel = sizes_of(layers, unit)
    return block_curves(names, torch.tensor(numel, dtype=torch.float64) / sum(numel), numel, unit)
