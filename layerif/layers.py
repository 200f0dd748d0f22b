"""The parameters of each layer, by name.

A layer is one decoder block. Every value per layer is indexed by the layer's name, never by a position.

Letter in shape suffixes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from layerif.checks import did_you_mean

T = TypeVar("T")


@dataclass(frozen=True)
class LayerMap:
    """The measured parameters of each block, in the model's order.

    Attributes:
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

    @cached_property
    def matrices(self) -> tuple[str, ...]:
        """The names of all measured matrices, block by block."""
        return tuple(param for params in self.params for param in params)

    @cached_property
    def by_block(self) -> dict[str, tuple[str, ...]]:
        """The names of each block's matrices, by the block's name."""
        return dict(zip(self.names, self.params, strict=True))

    @cached_property
    def block_of(self) -> dict[str, str]:
        """The name of each matrix's block, by the matrix's name."""
        return {param: block for block, params in self.by_block.items() for param in params}


def in_layer_order(by_name: Mapping[str, T], layers: Sequence[str], *, source: str) -> tuple[T, ...]:
    """Gives the values of `by_name`, one for each of `layers`, in their order.

    Args:
        by_name: one value for each layer.
        layers: names of the model's layers.
        source: names the place that the values come from, for the message.

    Raises:
        ValueError: for an unknown or a missing layer.
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
