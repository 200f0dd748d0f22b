"""Experts are left out of every block of a model, as many in each, with their rows of the routers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerif.checks import did_you_mean, how_many
from layerif.models.stored import fused_experts

_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")  # names that the number of experts has
_CHOSEN = ("num_experts_per_tok", "top_k_experts")  # and the number that a token is sent to
_GROUPS = "n_group"


def expert_changes(model: Any, experts: Sequence[str]) -> list[tuple[Any, str, Any]]:
    """Lists the attributes that change if experts are left out: the object, the name and the new value of each.

    Args:
        model: the bare model, with weights or without.
        experts: the names of those that go, such as `model.layers.0.mlp.experts.3`.

    Raises:
        ValueError: an expert is unknown, the blocks would keep unequal numbers, or a token could not be sent to as many
            experts as before.
    """
    fused = set(fused_experts(model))
    holders = {name: module for name, module in model.named_modules() if module in fused}
    known = [f"{name}.{number}" for name, module in holders.items() for number in range(_number_of(module))]
    if not known:
        raise ValueError("this model has no fused experts; use allocator.unit=block")
    for expert in experts:
        if expert not in known:
            raise ValueError(
                f"{expert!r} is not one of the {how_many(len(known), 'expert')} of this model"
                f"{did_you_mean(expert, known)}; give names such as {known[0]}"
            )
    config, gone = model.config.get_text_config(), set(experts)
    stays = {
        name: [number for number in range(_number_of(module)) if f"{name}.{number}" not in gone]
        for name, module in holders.items()
    }
    kept = {len(numbers) for numbers in stays.values()}
    if len(kept) > 1:
        raise ValueError(
            f"the blocks would keep {min(kept)} to {max(kept)} experts, and a configuration has one number for all; "
            "keep as many in every block"
        )
    _check_routing(config, kept.pop())
    changes: list[tuple[Any, str, Any]] = []
    for name, numbers in stays.items():
        before, around = _number_of(holders[name]), model.get_submodule(name.rpartition(".")[0])
        for module in (around, holders[name], *_routers(around)):
            changes += _of_module(module, before, numbers)
    changes += [(config, name, len(numbers)) for name in _NUMBERS if name in config.to_dict()]
    return changes


def _number_of(holder: Any) -> int:
    return len(holder.down_proj)


def _routers(around: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules beside the experts that send tokens to them."""
    for name, child in around.named_children():
        if name in ("gate", "router"):
            yield from child.modules()


def _of_module(module: nn.Module, before: int, numbers: Sequence[int]) -> Iterator[tuple[Any, str, Any]]:
    """Yields the tensors of a module that have an entry for each expert, and its settings that count experts."""
    for name, parameter in module.named_parameters(recurse=False):
        if len(parameter) == before:
            yield module, name, nn.Parameter(_chosen(parameter, numbers), requires_grad=parameter.requires_grad)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.ndim and len(buffer) == before:
            yield module, name, _chosen(buffer, numbers)
    for name in (*_NUMBERS, "out_features"):
        if vars(module).get(name) == before:
            yield module, name, len(numbers)


def _chosen(tensor: Tensor, numbers: Sequence[int]) -> Tensor:
    return tensor.detach()[torch.tensor(numbers, device=tensor.device)].clone()


def _check_routing(config: Any, kept: int) -> None:
    """Refuses to keep fewer experts than a token is sent to, and routers that choose among groups of experts."""
    chosen = max(getattr(config, name, None) or 0 for name in _CHOSEN)
    if kept < chosen:
        raise ValueError(
            f"a token is sent to {how_many(chosen, 'expert')} of its block, and {kept} would be left; use "
            f"allocator.keep>={chosen}"
        )
    if (groups := getattr(config, _GROUPS, None) or 1) > 1:
        raise ValueError(
            f"the routers of a {config.model_type} model choose among {groups} groups of experts, and leaving out some "
            "would move the others to other groups; use allocator.unit=block"
        )
