"""A model quantised to a number format for each matrix, and the texts by which other quantisers do the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerif.formats import Format, format_of, spelt_formats
from layerif.layers import LayerMap
from layerif.models.blocks import bare, weight_of


def formats_of_matrices(layers: LayerMap, bits: Mapping[str, float], formats: Sequence[Format]) -> dict[str, Format]:
    """Gives the format of every matrix, by parameter name.

    Args:
        layers: the blocks and their matrices.
        bits: of each matrix, or of each block.
        formats: those that may be given, each with bits of its own.

    Raises:
        ValueError: names the first bits that no format takes.
    """
    found = {}
    for block, params in layers.by_block.items():
        for param in params:
            name = param.removesuffix(".weight")
            unit = name if name in bits else block
            chosen = format_of(bits[unit], formats)
            if chosen is None:
                raise ValueError(
                    f"the allocation gives {unit} {bits[unit]:g} bits, and no format takes them; allowed: "
                    f"{spelt_formats(formats)} (method.formats)"
                )
            found[param] = chosen
    return found


def embeddings_of(model: nn.Module) -> dict[str, Tensor]:
    """Gives the weights of embedding and head, by parameter name; once where both are the same weight."""
    base: Any = bare(model)
    ends = [each for each in (base.get_input_embeddings(), base.get_output_embeddings()) if each is not None]
    wanted = {id(each.weight) for each in ends}
    return {name: weight for name, weight in base.named_parameters() if id(weight) in wanted}


@dataclass(frozen=True)
class Rounded:
    """A matrix after it was quantised.

    Attributes:
        numel: its weights.
        error: ‖Δ‖/‖W‖.
    """

    numel: int
    error: float


@torch.no_grad()
def quantise(model: nn.Module, chosen: Mapping[str, Format]) -> dict[str, Rounded]:
    """Quantises weights and reads them back, in place.

    Args:
        model: the model.
        chosen: the format of each weight, by parameter name.

    Returns:
        What became of each weight, by parameter name.
    """
    found = {}
    for param, each in chosen.items():
        weight = weight_of(model, param)
        rounded = each(weight)
        size = float(weight.double().norm())
        found[param] = Rounded(weight.numel(), float((rounded - weight).double().norm()) / (size or 1.0))
        weight.copy_(rounded)
    return found


def bits_of(chosen: Mapping[str, Format], numel: Mapping[str, int]) -> float:
    """Gives the true mean bits of a weight, scales included."""
    return sum(chosen[name].bits * numel[name] for name in chosen) / sum(numel[name] for name in chosen)


def tensor_types(chosen: Mapping[str, Format], names: Mapping[str, str]) -> str:
    """Lists the type of each tensor as `llama-quantize --tensor-type-file` reads it: a pattern and a type on a line.

    Args:
        chosen: the format of each weight, all of them of GGUF.
        names: the name of each weight in a GGUF file.
    """
    return "".join(f"{re.escape(names[param])}={each.name.lower()}\n" for param, each in chosen.items())


def config_groups(chosen: Mapping[str, Format]) -> dict[str, Any]:
    """Gives a `quantization_config` in the schema of compressed-tensors: a group of layers for each format.

    Args:
        chosen: the format of each weight of a linear layer. Layers without one stay as they are.
    """
    by_format: dict[str, list[str]] = {}
    for param, each in chosen.items():
        by_format.setdefault(each.name, []).append(param.removesuffix(".weight"))
    formats = {each.name: each for each in chosen.values()}
    groups = {
        f"group_{number}": {
            "targets": targets,
            "weights": _weights(formats[name]),
            "input_activations": None,
            "output_activations": None,
            "format": _packing(formats[name]),
        }
        for number, (name, targets) in enumerate(by_format.items())
    }
    packings = {_packing(each) for each in formats.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": packings.pop() if len(packings) == 1 else "mixed-precision",
        "quantization_status": "initialized",
        "config_groups": groups,
        "ignore": [],
    }


def _is_float(each: Format) -> bool:
    return each.name == "MXFP4"


def _packing(each: Format) -> str:
    return "mxfp4-pack-quantized" if _is_float(each) else "pack-quantized"


def _weights(each: Format) -> dict[str, Any]:
    found = {
        "num_bits": each.whole,
        "type": "float" if _is_float(each) else "int",
        "symmetric": each.is_symmetric,
        "strategy": "group",
        "group_size": each.block,
        "dynamic": False,
    }
    return found | ({"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"} if _is_float(each) else {})
