"""Quantised weights, which are refused by name: measuring, training and pruning take floating-point weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PACKED_BY = ("bitsandbytes", "torchao")  # their tensors may pretend to be of a floating-point type
_SUPPORTED = (
    "layerif measures, trains and prunes floating-point weights; give the model as it was before it was quantised"
)


def refuse_quantised_config(where: str, config: Any) -> None:
    """Refuses a model whose configuration says that its weights are quantised.

    Args:
        where: the folder or the name of the model, for the message.
        config: of transformers.
    """
    settings = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if settings:
        raise ValueError(
            f"cannot load {where!r}: by quantization_config in its config.json it is quantised ({_scheme(settings)}), "
            f"and {_SUPPORTED}"
        )


def refuse_quantised_block(name: str, block: nn.Module) -> None:
    """Refuses a block in memory that holds a matrix of anything but plain floating-point numbers.

    Args:
        name: of the block, for the message.
        block: of a model that was loaded in any way.
    """
    matrices = [each for each in block.named_parameters() if each[1].ndim >= 2]
    # A mask is a buffer, too, but is not called a weight.
    matrices += [each for each in block.named_buffers() if each[1].ndim >= 2 and "weight" in each[0].rpartition(".")[2]]
    for path, matrix in matrices:
        if matrix.dtype not in _PLAIN or type(matrix).__module__.startswith(_PACKED_BY):
            module = type(block.get_submodule(path.rpartition(".")[0])).__name__
            raise ValueError(f"{name}.{path} ({module}, {matrix.dtype}) is quantised, and {_SUPPORTED}")


def _scheme(settings: Any) -> str:
    """Names a way of quantising: `bitsandbytes nf4`."""
    if not isinstance(settings, Mapping):
        return str(settings)
    if settings.get("load_in_8bit"):
        kind = "int8"
    elif settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    else:
        kind = f"{settings['bits']} bits" if "bits" in settings else ""
    return f"{settings.get('quant_method', 'by an unnamed method')} {kind}".strip()
