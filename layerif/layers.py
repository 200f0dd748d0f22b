"""Which parameters belong to which layer.

A layer is one decoder block. Every value per layer is indexed by the layer's name, never by a position.

Letter in shape suffixes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from layerif.checks import did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class LayerMap:
    """The measured parameters of each block, in the model's order.

    names: L block names, as in `model.named_modules()`.
    params: per block, the names of its measured weight matrices, as in `model.named_parameters()`.
    numel: per block, the number of entries of those matrices together.
    """

    names: tuple[str, ...]
    params: tuple[tuple[str, ...], ...]
    numel: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.params) == len(self.numel):
            raise ValueError(
                f"a LayerMap needs one entry per block: got {len(self.names)} names, "
                f"{len(self.params)} params, {len(self.numel)} numel"
            )


def in_layer_order(by_name: Mapping[str, T], layers: Sequence[str], *, source: str) -> tuple[T, ...]:
    """The values of `by_name`, one for each of `layers`, in their order.

    source: what holds the values, for the message. Raises ValueError for an unknown or a missing layer.
    """
    known = set(layers)
    for name in by_name:
        if name not in known:
            raise ValueError(
                f"{source} names the layer {name!r}, which this model does not have{did_you_mean(name, layers)}; "
                f"its {len(layers)} layers are {layers[0]!r} to {layers[-1]!r}"
            )
    missing = [name for name in layers if name not in by_name]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of the model's {len(layers)} layers, the first is {missing[0]!r}; "
            "give every layer a value"
        )
    return tuple(by_name[name] for name in layers)
