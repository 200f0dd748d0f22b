"""The parameters of each layer, by name.

A layer is one decoder block. Every value per layer is indexed by the layer's name, never by a position.

Letter in shape suffixes: L layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

from layerif.checks import did_you_mean

T = TypeVar("T")
Unit = Literal["matrix", "sublayer", "block", "expert"]  # a sublayer is the attention or the MLP of a block
MatrixOrBlock = Literal["matrix", "block"]
Droppable = Literal["block", "sublayer", "expert"]
_WORDS = {  # in messages, by unit
    "block": ("layer", "layers", ""),
    "matrix": ("matrix", "matrices", " or pruner.skip leaves out"),
    "sublayer": ("sublayer", "sublayers", ""),
    "expert": ("expert", "experts", ""),
}


@dataclass(frozen=True)
class LayerMap:
    """The measured parameters of each block, in the model's order.

    Attributes:
        names: L block names, as in `model.named_modules()`.
        params: per block, the names of its measured weight matrices, as in `model.named_parameters()`.
        numel: per block, the number of entries of those matrices together.
        matrix_numel: the number of entries of each matrix, block by block; None where nobody needs it.
        matrix_shapes: outputs and inputs of each matrix; None where nobody needs them.
    """

    names: tuple[str, ...]
    params: tuple[tuple[str, ...], ...]
    numel: tuple[int, ...]
    matrix_numel: tuple[int, ...] | None = field(default=None, compare=False)
    matrix_shapes: tuple[tuple[int, int], ...] | None = field(default=None, compare=False)

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

    def without(self, patterns: Sequence[str]) -> LayerMap:
        """Gives the layers without some of their matrices, and without blocks of which no matrix is left.

        Args:
            patterns: as for `is_named`.

        Raises:
            ValueError: a pattern names no matrix, or nothing is left.
        """
        if not patterns:
            return self
        check_named(self.matrices, patterns)
        kept = self._those([not is_named(param, patterns) for param in self.matrices])
        if not kept.names:
            raise ValueError(f"pruner.skip={list(patterns)} leaves no matrix; name fewer")
        return kept

    def only(self, targets: Sequence[str] | None, *, setting: str) -> LayerMap:
        """Gives the layers with some of their matrices alone, and without blocks of which no matrix is left.

        Args:
            targets: names of linear layers or the ends of them, as PEFT takes them; None: all.
            setting: holds them, for the message.

        Raises:
            ValueError: a name means no linear layer of the blocks.
        """
        if not targets:
            return self
        for target in targets:
            if not any(is_target(param, [target]) for param in self.matrices):
                ends = sorted({param.removesuffix(".weight").rpartition(".")[2] for param in self.matrices})
                raise ValueError(
                    f"{setting} holds {target!r}, which is not a linear layer of the blocks"
                    f"{did_you_mean(target, ends)}; they have {', '.join(ends)} (null: all of them)"
                )
        return self._those([is_target(param, targets) for param in self.matrices])

    @cached_property
    def without_experts(self) -> LayerMap:
        """The layers without the matrices of fused experts, which no adapter has a rank for one by one."""
        kept = [not is_expert(param) for param in self.matrices]
        return self if all(kept) else self._those(kept)

    @cached_property
    def each_matrix(self) -> LayerMap:
        """The same matrices, each as a layer of its own."""
        assert self.matrix_numel is not None
        names = tuple(param.removesuffix(".weight") for param in self.matrices)
        params = tuple((param,) for param in self.matrices)
        return LayerMap(names, params, self.matrix_numel, self.matrix_numel, self.matrix_shapes)

    @cached_property
    def each_expert(self) -> LayerMap:
        """The matrices of fused experts, each expert as a layer of its own: `model.layers.0.mlp.experts.3`."""
        assert self.matrix_numel is not None
        numel = dict(zip(self.matrices, self.matrix_numel, strict=True))
        found: dict[str, list[str]] = {}
        for param in filter(is_expert, self.matrices):
            found.setdefault(param.removesuffix(".weight").rpartition(".")[0], []).append(param)
        sizes = tuple(sum(numel[param] for param in params) for params in found.values())
        flat = tuple(numel[param] for params in found.values() for param in params)
        return LayerMap(tuple(found), tuple(map(tuple, found.values())), sizes, flat)

    def _those(self, is_kept: Sequence[bool]) -> LayerMap:
        """Gives the layers with the marked matrices alone."""
        assert self.matrix_numel is not None
        numbers = [number for number, kept in enumerate(is_kept) if kept]
        params: dict[str, list[str]] = {}
        sizes: dict[str, int] = {}
        for number in numbers:
            param = self.matrices[number]
            block = self.block_of[param]
            params.setdefault(block, []).append(param)
            sizes[block] = sizes.get(block, 0) + self.matrix_numel[number]
        shapes = self.matrix_shapes
        return LayerMap(
            tuple(params),
            tuple(map(tuple, params.values())),
            tuple(sizes.values()),
            tuple(self.matrix_numel[number] for number in numbers),
            None if shapes is None else tuple(shapes[number] for number in numbers),
        )


def block_of(unit: str) -> str:
    """Gives the block of a matrix: the name up to the first whole number in it."""
    parts = unit.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def is_expert(param: str) -> bool:
    """Tells if a matrix is one expert's among those of a block: `mlp.experts.3.down_proj` inside it."""
    return re.search(r"\.[0-9]+\.[^.]+$", f".{within_block(param.removesuffix('.weight'))}") is not None


def is_whole_expert(unit: str) -> bool:
    """Tells if a unit is an expert of a block with all of its matrices: `model.layers.0.mlp.experts.3`."""
    return within_block(unit).rpartition(".")[2].isdigit()


def within_block(unit: str) -> str:
    """Gives the name of a matrix inside its block (`mlp.down_proj`); an empty text for a block."""
    return unit.removeprefix(block_of(unit)).lstrip(".")


def sublayers(layers: LayerMap) -> dict[str, int]:
    """Gives the attention and the MLP of every block by name, each with the weights in it.

    Raises:
        ValueError: the matrices of a block belong to other parts than these two.
    """
    assert layers.matrix_numel is not None
    sizes = dict(zip(layers.matrices, layers.matrix_numel, strict=True))
    found: dict[str, int] = {}
    for block, params in layers.by_block.items():
        parts: dict[str, int] = {}
        for param in params:
            name = f"{block}.{param.removeprefix(f'{block}.').partition('.')[0]}"
            parts[name] = parts.get(name, 0) + sizes[param]
        if [is_attention(name.rpartition(".")[2]) for name in parts] not in ([True, False], [False, True]):
            names = ", ".join(name.rpartition(".")[2] for name in parts)
            raise ValueError(
                f"block {block!r} has {names} where an attention and an MLP are needed; use allocator.unit=block"
            )
        found |= parts
    return found


def is_attention(name: str) -> bool:
    """Tells if a module inside a block mixes tokens, by its name there: attention, or a Mamba in its place."""
    return any(part in name for part in ("attn", "attention", "mamba", "mixer"))


def depths(blocks: Sequence[str]) -> dict[str, int]:
    """Gives the number of each block in the model, by name: the whole number that the name ends with.

    Where a name ends with none, or two end with the same one, each block's position counts.
    """
    ends = [block.rpartition(".")[2] for block in blocks]
    is_numbered = all(re.fullmatch("[0-9]{1,4}", end) for end in ends)
    numbers = [int(end) for end in ends] if is_numbered else []
    found = numbers if len({*numbers}) == len(blocks) else range(len(blocks))
    return dict(zip(blocks, found, strict=True))


def kinds_of(units: Sequence[str]) -> list[str]:
    """Gives the names that matrices have inside their blocks, each once and in the order of the model.

    Not every block needs to have every matrix: a name that only later blocks have takes its place among the others.
    """
    found: list[str] = []
    place, before = 0, ""
    for unit in units:
        block, kind = block_of(unit), within_block(unit)
        place = place if block == before else 0
        if kind and kind not in found:
            found.insert(place, kind)
        place, before = (found.index(kind) + 1 if kind else place), block
    return found


def short_names(kinds: Sequence[str]) -> list[str]:
    """Gives the last part of each name, as long as these tell them apart: `down_proj` for `mlp.down_proj`."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return ends if len({*ends}) == len(ends) else list(kinds)


def is_named(param: str, patterns: Sequence[str]) -> bool:
    """Tells if a matrix is meant by one of some names.

    A name is the matrix's own (`model.layers.0.mlp.down_proj`), the end of it (`down_proj`, `mlp.down_proj`), or what
    holds the matrix (`model.layers.0`).
    """
    name = param.removesuffix(".weight")
    return any(
        name == pattern or name.endswith(f".{pattern}") or name.startswith(f"{pattern}.")
        for pattern in (each.removesuffix(".weight") for each in patterns)
    )


def is_target(param: str, targets: Sequence[str]) -> bool:
    """Tells if PEFT would put an adapter on a matrix: a target is its name or the end of it."""
    name = param.removesuffix(".weight")
    return any(name == target or name.endswith(f".{target}") for target in targets)


def check_named(params: Sequence[str], patterns: Sequence[str]) -> None:
    """Refuses a name that means none of these matrices, see `is_named`.

    Raises:
        ValueError: says which, and names the nearest.
    """
    for pattern in patterns:
        if not any(is_named(param, [pattern]) for param in params):
            ends = sorted({param.removesuffix(".weight").rpartition(".")[2] for param in params})
            raise ValueError(
                f"pruner.skip names {pattern!r}, and the model has no such matrix{did_you_mean(pattern, ends)}; name a "
                f"matrix, the end of its name ({', '.join(ends)}) or a block"
            )


def refuse_unreached(names: Sequence[str]) -> None:
    """Refuses to prune by inputs what has none.

    Args:
        names: the linear layers that no calibration token reaches.

    Raises:
        ValueError: there is one; it names all experts and layers of this kind.
    """
    if not names:
        return
    units = list(dict.fromkeys(re.sub(r"(\.experts\.\d+)\..*", r"\1", name) for name in names))
    raise ValueError(
        f"no calibration token reaches {', '.join(units)}; give more calibration windows, or name them: "
        f"pruner.skip=[{','.join(units)}]"
    )


def in_layer_order(
    by_name: Mapping[str, T], layers: Sequence[str], *, source: str, unit: Unit = "block"
) -> tuple[T, ...]:
    """Gives the values of `by_name`, one for each of `layers`, in their order.

    Args:
        by_name: one value for each layer.
        layers: names of the model's layers, of its matrices, or of the attention and MLP of its layers.
        source: names the place that the values come from, for the message.
        unit: which of the three `layers` are.

    Raises:
        ValueError: for an unknown or a missing one.
    """
    one, several, skipped = _WORDS[unit]
    known = set(layers)
    for name in by_name:
        if name not in known:
            raise ValueError(
                f"{source} names the {one} {name!r}, which this model does not have{skipped}"
                f"{did_you_mean(name, layers)}; its {len(layers)} {several} are {layers[0]!r} to {layers[-1]!r}"
            )
    missing = [name for name in layers if name not in by_name]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of the model's {len(layers)} {several}, the first is {missing[0]!r}; "
            f"give every {one} a value"
        )
    return tuple(by_name[name] for name in layers)
