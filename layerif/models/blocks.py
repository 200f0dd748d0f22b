"""The blocks of a loaded model, and the weight matrices of each block by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from layerif.layers import LayerMap, is_attention
from layerif.models.quantised import refuse_quantised_block

Scope = Literal["attention", "mlp", "all"]
Parameters = Literal["weights", "lora"]


def bare(model: nn.Module) -> nn.Module:
    """Returns the transformers model inside a PEFT wrapper, so that layers have one name with and without adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the decoder blocks, the members of the largest module list, by their name in the bare model."""
    lists = [(name, module) for name, module in bare(model).named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return {}
    name, found = max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    return {f"{name}.{index}": block for index, block in enumerate(found)}


def linears(block: nn.Module, scope: Scope = "all") -> Iterator[tuple[str, nn.Linear]]:
    """Yields the linear layers of one block with their names inside the block.

    Args:
        block: the block.
        scope: attention takes the layers inside the child module whose name contains `attn` or `attention`, mlp takes
            the others.
    """
    adapters = _adapters(block)
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and _in_scope(name, scope) and not name.startswith(adapters):
            yield name, module


def layer_map(
    model: nn.Module,
    *,
    scope: Scope = "attention",
    parameters: Parameters = "weights",
    skip_unsupported: bool = False,
) -> LayerMap:
    """Names the weight matrices to measure in every block.

    Args:
        model: the model, with or without weights.
        scope: the linear layers to take, see `linears`.
        parameters: weights takes the matrices of the linear layers themselves (biases and norms are left out, as in the
            paper), lora takes A and B of a loaded PEFT adapter instead.
        skip_unsupported: leave out matrices in scope that are not linear layers, such as fused experts.

    Raises:
        ValueError: a block has quantised weights, no linear layer in scope, or a matrix that is not a linear layer and
            is not skipped.
    """
    found = blocks(model)
    if not found:
        raise ValueError(
            f"{type(bare(model)).__name__} has no nn.ModuleList and so no blocks to score; "
            "supported are decoder-only transformers of the transformers library"
        )
    names, params, sizes, shapes = [], [], [], []
    for block_name, block in found.items():
        refuse_quantised_block(block_name, block)
        matrices = {
            f"{block_name}.{name}.weight": module.weight
            for name, module in (linears(block, scope) if parameters == "weights" else _lora_linears(block, scope))
        }
        if not matrices:
            raise ValueError(_nothing_in_scope(block_name, block, scope, parameters))
        if parameters == "weights" and not skip_unsupported:
            _refuse_other_matrices(block_name, block, scope)
        names.append(block_name)
        params.append(tuple(matrices))
        sizes.append([weight.numel() for weight in matrices.values()])
        shapes += [tuple(weight.shape) for weight in matrices.values()]
    flat = tuple(size for of_block in sizes for size in of_block)
    return LayerMap(tuple(names), tuple(params), tuple(map(sum, sizes)), flat, tuple(shapes))


def _in_scope(name: str, scope: Scope) -> bool:
    return scope == "all" or (scope == "attention") == is_attention(name)


def _adapters(block: nn.Module) -> tuple[str, ...]:
    """Returns the prefixes of all modules that PEFT put into a block; PEFT's layers list their own."""
    return tuple(
        f"{name}.{part}"
        for name, module in block.named_modules()
        for part in getattr(module, "adapter_layer_names", ())
    )


def _lora_linears(block: nn.Module, scope: Scope) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and _in_scope(name, scope) and re.search(r"\.lora_(moe_)?[AB]\.", name):
            yield name, module  # A and B of a LoRA or a LoRA-MoE, without the router


def _nothing_in_scope(name: str, block: nn.Module, scope: Scope, parameters: Parameters) -> str:
    if parameters == "lora":
        return (
            f"probe.parameters=lora found no LoRA matrix in block {name!r} with probe.scope={scope}; "
            "give the adapter with model.adapter=/folder, or measure probe.parameters=weights"
        )
    kinds = sorted({type(each).__name__ for each in block.modules() if any(p.ndim > 1 for p in each.parameters(False))})
    holds = f"its matrices are those of {', '.join(kinds)}, which cannot be measured" if kinds else "it has no matrix"
    advice = f"{holds}; choose another model" if scope == "all" else "use probe.scope=all"
    return f"block {name!r} has no linear layer in probe.scope={scope}; allowed: attention, mlp, all; {advice}"


def _refuse_other_matrices(block_name: str, block: nn.Module, scope: Scope) -> None:
    """Refuses a fused or convolutional matrix, which would be missing from the score of the block."""
    adapters = _adapters(block)
    for name, module in block.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or isinstance(module, nn.Linear) or f"{name}.{kind}".startswith(adapters):
                continue
            if _in_scope(name, scope):
                raise ValueError(
                    f"{block_name}.{name}.{kind} {tuple(parameter.shape)} is a matrix of a {type(module).__name__}, "
                    f"and only linear layers can be measured; choose another probe.scope than {scope}, or leave such "
                    "matrices out with probe.skip_unsupported=true"
                )


def context_length(model: nn.Module) -> int | None:
    """Returns the most tokens that the model reads; None where it has no limit."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the first parameter."""
    return next(model.parameters()).device
