"""The size of an adapter, counted from the shapes of the layers that it is put on, before any part of it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from layerif.models.blocks import blocks
from layerif.models.stored import AnyLinear, stored_in
from layerif.moe.model import linears_of_blocks

# By block and by name inside it: the inputs and outputs of each linear layer that gets an adapter.
Shapes = Mapping[str, Mapping[str, tuple[int, int]]]

_BYTES = 4 * 4  # a trained parameter, its gradient and AdamW's two moments, in float32


class Capacity(NamedTuple):
    """The experts of a block or matrix, one in plain LoRA, and the rank of each; 0 of either for no adapter."""

    experts: int
    rank: int


def adapted_shapes(base: nn.Module, targets: Sequence[str] | None) -> Shapes:
    """Finds the linear layers of the blocks that get an adapter.

    Args:
        base: the bare model, or its skeleton.
        targets: names of the layers, and of tensors of fused experts, whose matrices then count one by one; None: every
            linear layer of the blocks.
    """
    endings = tuple(f".{ending}" for ending in targets or linears_of_blocks(base))
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for block, inside in blocks(base).items():
        linears: dict[str, tuple[str, AnyLinear]] = {}  # with the name that a target has
        for name, module in inside.named_modules():
            if isinstance(module, nn.Linear):
                linears[name] = name, module
            for part, stored in stored_in(module).items():
                linears[f"{name}.{part}".strip(".")] = f"{name}.{stored.kind}" if part else name, stored
        found[block] = {
            name: (linear.in_features, linear.out_features)
            for name, (target, linear) in linears.items()
            if f".{block}.{target}".endswith(endings)
        }
    return found


def names_of(shapes: Shapes) -> list[str]:
    """Gives the full names of the linear layers with an adapter."""
    return [f"{block}.{name}" for block, layers in shapes.items() for name in layers]


def num_parameters(shapes: Shapes, capacities: Mapping[str, Capacity]) -> int:
    """Counts the parameters of an adapter.

    A linear layer of I inputs and O outputs has E·r·(I + O) + E·I with E > 1 experts and a router, r·(I + O) with one.

    Args:
        shapes: of the layers with an adapter.
        capacities: by block, or by the full name of a linear layer.
    """
    total = 0
    for block, layers in shapes.items():
        for name, (inputs, outputs) in layers.items():
            experts, rank = capacity_of(capacities, block, name)
            total += experts * rank * (inputs + outputs) + (experts * inputs if experts > 1 else 0)
    return total


def too_large_rank(shapes: Shapes, capacities: Mapping[str, Capacity]) -> str | None:
    """Says which layer has a rank above its smaller side, where a larger rank adds nothing; None where none has."""
    for block, layers in shapes.items():
        for name, sides in layers.items():
            if (rank := capacity_of(capacities, block, name).rank) > min(sides):
                return (
                    f"a rank of {_count(rank)} is more than {block}.{name} can use: it has "
                    f"{sides[0]} inputs and {sides[1]} outputs, so {min(sides)} is full rank"
                )
    return None


def check_memory(num_trained: int, free: float, *, advice: str, what: str = "the adapter", held: int = 0) -> None:
    """Refuses a training that needs more memory than there is.

    Args:
        num_trained: the parameters that are trained.
        free: bytes.
        what: has them.
        advice: says what to do.
        held: the numbers that are held for each parameter beside those of training.

    Raises:
        ValueError: with the numbers.
    """
    needed = (_BYTES + 4 * held) * num_trained
    if needed > free:
        more = f", and {held} numbers more for each" if held else ""
        raise ValueError(
            f"{what} would have {_count(num_trained)} parameters, whose training takes "
            f"{_count(needed // 10**9)} GB (the weights, their gradients and AdamW's two moments in float32{more}), "
            f"and {free / 1e9:.3g} GB are free; {advice}"
        )


def capacity_of(capacities: Mapping[str, Capacity], block: str, name: str) -> Capacity:
    """Gives the capacity of a linear layer: its own, or else that of its block."""
    return capacities.get(f"{block}.{name}") or capacities[block]


def _count(number: int) -> str:
    """Writes a number with separators, or as a power of ten where nobody would count its digits."""
    return f"{number:,}" if number < 10**18 else f"about 10^{math.log10(number):.0f}"
