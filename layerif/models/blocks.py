"""The blocks of a loaded model, and the weight matrices of each block by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerif.layers import LayerMap, is_attention
from layerif.models.quantised import check_packed_layers
from layerif.models.stored import AnyLinear, Packed, Stored, expert_at, stored_in, tensor_of

Scope = Literal["attention", "mlp", "all"]
Parameters = Literal["weights", "lora"]


def bare(model: nn.Module) -> nn.Module:
    """Returns the transformers model inside a PEFT wrapper, so that layers have one name with and without adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the decoder blocks, the members of the largest module list, by their name in the bare model.

    A model that reads more than text is searched in its text decoder alone.
    """
    whole: Any = bare(model)
    decoder = whole.get_decoder() if hasattr(whole, "get_decoder") else whole
    inside = {id(module) for module in decoder.modules()}
    lists = [
        (name, module)
        for name, module in whole.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inside
    ]
    if not lists:
        return {}
    name, found = max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    return {f"{name}.{index}": block for index, block in enumerate(found)}


def linears(block: nn.Module, scope: Scope = "all") -> Iterator[tuple[str, AnyLinear]]:
    """Yields the linear layers of one block with their names inside the block.

    Those are nn.Linear modules that a model calls, Conv1D modules, and the matrices of fused experts one by one.

    Args:
        block: the block.
        scope: attention takes the layers inside the child module that mixes tokens (see `is_attention`), mlp takes the
            others.
    """
    adapters = _adapters(block)
    uncalled = _uncalled(block)
    for name, module in block.named_modules():
        if name in uncalled or (adapters and name.startswith(adapters)):
            continue
        found = stored_in(module) or ({"": module} if isinstance(module, nn.Linear) else {})
        for inside, linear in found.items():
            path = f"{name}.{inside}".strip(".")
            if in_scope(path, scope):
                yield path, linear


def linear_at(model: nn.Module, name: str) -> AnyLinear:
    """Returns a linear layer of a model by its name or by the name of its weight, see `linears`."""
    name = name.removesuffix(".weight")
    holder, _, kind = name.rpartition(".")
    holder, _, expert = holder.rpartition(".")
    if expert.isdigit() and (found := expert_at(bare(model).get_submodule(holder), kind, int(expert))):
        return found
    module: Any = bare(model).get_submodule(name)
    return stored_in(module).get("") or module


def weight_of(model: nn.Module, param: str) -> Tensor:
    """Returns the weight (outputs × inputs) of a linear layer by its name in a `LayerMap`."""
    return linear_at(model, param).weight


def shape_of(model: nn.Module, param: str) -> tuple[int, int]:
    """Returns the outputs and inputs of a linear layer by its name in a `LayerMap`, without making its numbers."""
    linear = linear_at(model, param)
    return linear.out_features, linear.in_features


def dtype_of(model: nn.Module, param: str) -> torch.dtype:
    """Returns the type of the numbers that go into a linear layer: that of its weight, or of the model's embedding.

    A quantised layer keeps its weight in a type of its own, whole numbers most often.
    """
    linear = linear_at(model, param)
    if isinstance(linear, Packed):
        return bare(model).get_input_embeddings().weight.dtype  # type: ignore[operator, union-attr]
    return tensor_of(linear).dtype


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
        skip_unsupported: leave out experts in a layout that is not known. Other matrices that are not linear layers
            are always left out, see `matrices_left_out`.

    Raises:
        ValueError: a block has quantised weights that cannot be measured, no linear layer in scope, or experts in a
            layout that is not known and that are not skipped.
    """
    found = blocks(model)
    if not found:
        raise ValueError(
            f"{type(bare(model)).__name__} has no nn.ModuleList and so no blocks to score; "
            "supported are decoder-only transformers of the transformers library"
        )
    names, params, sizes, shapes = [], [], [], []
    for block_name, block in found.items():
        check_packed_layers(block_name, block)
        matrices = {
            f"{block_name}.{name}.weight": (module.out_features, module.in_features)
            for name, module in (linears(block, scope) if parameters == "weights" else _lora_linears(block, scope))
        }
        if parameters == "weights" and not skip_unsupported:
            advice = (
                f"choose another probe.scope than {scope}, or leave such matrices out with probe.skip_unsupported=true"
            )
            refuse_unknown_experts(block_name, block, scope, advice)
        if not matrices:
            raise ValueError(_nothingin_scope(block_name, block, scope, parameters))
        names.append(block_name)
        params.append(tuple(matrices))
        sizes.append([num_out * num_in for num_out, num_in in matrices.values()])
        shapes += matrices.values()
    flat = tuple(size for of_block in sizes for size in of_block)
    return LayerMap(tuple(names), tuple(params), tuple(map(sum, sizes)), flat, tuple(shapes))


def in_scope(name: str, scope: Scope) -> bool:
    """Tells if a scope takes a matrix, by its name inside the block, see `linears`."""
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
        if isinstance(module, nn.Linear) and in_scope(name, scope) and re.search(r"\.lora_(moe_)?[AB]\.", name):
            yield name, module  # A and B of a LoRA or a LoRA-MoE, without the router


def _nothingin_scope(name: str, block: nn.Module, scope: Scope, parameters: Parameters) -> str:
    if parameters == "lora":
        return (
            f"probe.parameters=lora found no LoRA matrix in block {name!r} with probe.scope={scope}; "
            "give the adapter with model.adapter=/folder, or measure probe.parameters=weights"
        )
    kinds = sorted({type(each).__name__ for each in block.modules() if any(p.ndim > 1 for p in each.parameters(False))})
    holds = f"its matrices are those of {', '.join(kinds)}, which cannot be measured" if kinds else "it has no matrix"
    advice = f"{holds}; choose another model" if scope == "all" else "use probe.scope=all"
    return f"block {name!r} has no linear layer in probe.scope={scope}; allowed: attention, mlp, all; {advice}"


def matrices_left_out(block: nn.Module, scope: Scope = "all") -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Returns the matrices of a block that are not linear layers, with the module that holds each, by name.

    Those are kernels of convolutions, the states of a Mamba, routers, and experts in a layout that is not known.
    """
    taken = {id(each.parameter if isinstance(each, Stored) else each.weight) for _, each in linears(block)}
    adapters = _adapters(block)
    found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    for name, module in block.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            path = f"{name}.{kind}".strip(".")
            is_ours = id(parameter) not in taken and not (adapters and path.startswith(adapters))
            if parameter.ndim >= 2 and is_ours and not kind.endswith("bias") and in_scope(name, scope):
                found[path] = module, parameter
    return found


def refuse_unknown_experts(block_name: str, block: nn.Module, scope: Scope, advice: str) -> None:
    """Refuses experts in a layout that is not known: they hold most of a block, and its score would lack them.

    Raises:
        ValueError: names the first of them.
    """
    for name, (module, parameter) in matrices_left_out(block, scope).items():
        if parameter.ndim >= 3 and not isinstance(module, nn.Conv1d | nn.Conv2d):
            raise ValueError(
                f"{block_name}.{name} {tuple(parameter.shape)} is a matrix of a {type(module).__name__}, which is not "
                f"a linear layer, nor one of the fused experts whose layout is known; {advice}"
            )


def note_left_out(model: nn.Module, scope: Scope = "all") -> str | None:
    """Says which matrices of the blocks are not linear layers, and how many weights they have; None: there is none."""
    kinds: dict[str, str] = {}
    numel = total = 0
    for block in blocks(model).values():
        total += sum(each.numel() for each in block.parameters())
        for name, (module, parameter) in matrices_left_out(block, scope).items():
            kinds.setdefault(name, f"{name} of {type(module).__name__}")
            numel += parameter.numel()
    if not kinds:
        return None
    return (
        f"left out, because the model does not use them as linear layers: {', '.join(kinds.values())} "
        f"({numel:,} weights, {numel / total:.2g} of the blocks)"
    )


def adaptable(block: nn.Module) -> set[str]:
    """Returns the names of the linear layers of a block that an adapter is put on.

    Fused experts are none of these, nor are `x_proj` and `out_proj` of a Mamba, whose kernels take the weights past an
    adapter in training, nor is a gate of one output, which has no rank to choose.
    """
    mixers = {name for name, module in block.named_modules() if hasattr(module, "A_log")}
    found = set()
    for name, linear in linears(block):
        holder, _, kind = name.removesuffix(".base_layer").rpartition(".")
        is_expert = isinstance(linear, Stored) and linear.expert is not None
        is_passed_by = kind in ("x_proj", "out_proj") and holder in mixers and _has_fast_mixers(block)
        if not is_expert and not is_passed_by and linear.out_features > 1:
            found.add(name.removesuffix(".base_layer"))
    return found


def _has_fast_mixers(block: nn.Module) -> bool:
    """Tells if a block is of a family whose kernels take whole mixers, those where PEFT refuses `out_proj`."""
    family = type(block).__module__.rpartition(".modeling_")[2]
    return family in {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def _uncalled(block: nn.Module) -> set[str]:
    """Returns the nn.Linear modules that a block uses in another way than calling them for their product.

    A Mamba takes the weight of its `dt_proj`; the routers of Llama 4 and PhiMoE choose in their forward.
    """
    modules = dict(block.named_modules())
    return {
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear)
        and (
            (name.endswith("dt_proj") and hasattr(modules[name.rpartition(".")[0]], "A_log"))
            or (type(module).__module__.startswith(_MODELS) and not _gives_product(module))
        )
    }


_MODELS = ("transformers.models.", "transformers_modules.")  # the second holds remote code


@torch.no_grad()
def _gives_product(linear: nn.Linear) -> bool:
    """Tells by a small trial if the forward of a class derived from nn.Linear gives the product of inputs and weight.

    That of Falcon does. A router gives choices, and DeepSeek-V4 multiplies groups of outputs with inputs of their own.
    """
    if type(linear).forward is nn.Linear.forward:
        return True
    num_out, num_in = 3, 2  # small, whatever the shape and the device of the weight
    values = torch.linspace(-1, 2, num_out * num_in + num_out, dtype=torch.float32, device="cpu")
    weight_OI, bias_O = values[: num_out * num_in].view(num_out, num_in), values[num_out * num_in :]
    trial = copy.copy(linear)
    trial.training = False  # no noise in a router's input
    trial._parameters = {"weight": weight_OI, "bias": None if linear.bias is None else bias_O}  # type: ignore[assignment]
    input_TI = torch.tensor([[1.0, -0.5], [0.25, 2.0], [-1.0, 0.75], [0.5, 0.5]], device="cpu")
    expected_TO = F.linear(input_TI, weight_OI, trial.bias)
    try:
        found: object = type(linear).forward(trial, input_TI)
    except Exception:  # it needs another input than a linear layer
        return False
    return isinstance(found, Tensor) and found.shape == expected_TO.shape and torch.allclose(found, expected_TO)


def context_length(model: nn.Module) -> int | None:
    """Returns the most tokens that the model reads; None where it has no limit."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the first parameter."""
    return next(model.parameters()).device
