"""Layers to train, by the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from layerif.allocate._shares import Keep, checked_scores, number_to_keep, oriented_values
from layerif.allocate.allocation import Allocation
from layerif.checks import check_fields
from layerif.layers import LayerMap
from layerif.scores import LayerScores


def to_layers(scores: Sequence[float], keep: float) -> list[int]:
    """Gives 1 to the layers of the highest scores and 0 to the others; of equal scores the earlier layers come first.

    Args:
        scores: at least 0; a higher one is trained first.
        keep: a whole number of layers, or a share of them; 1.0 is all.
    """
    values = checked_scores(scores)
    number = number_to_keep(keep, len(values))
    highest = sorted(range(len(values)), key=lambda l: (-values[l], l))[:number]
    return [int(l in highest) for l in range(len(values))]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Spends scores on the layers that are trained at all, by `to_layers`.

    Attributes:
        keep: see `to_layers`.
    """

    spends: ClassVar[Literal["scores"]] = "scores"

    keep: Keep = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "allocator")

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        values = to_layers(oriented_values(scores, layers, "layers", smoothing=False), self.keep)
        return Allocation(layers.names, "layers", tuple(values), sum(values))
