"""LoRA-MoE as a PEFT method: the choice of the linear layers, their numbers of experts, and the rules of merging."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from layerif.checks import did_you_mean
from layerif.models.blocks import adaptable, blocks
from layerif.models.stored import fused_experts, stored_in
from layerif.moe.config import LoraMoeConfig
from layerif.moe.layer import LoraMoeLinear
from layerif.moe.routing import Routing

NO_MATCH = (0, 0)


class LoraMoeModel(BaseTuner):
    """The base model with a `LoraMoeLinear` in place of every targeted nn.Linear.

    Raises:
        ValueError: a target is not an nn.Linear, a targeted module has no count in `num_experts`, or a key of
            `num_experts` matches no target. The model is then left as it was.
    """

    prefix = "lora_moe_"
    tuner_layer_cls = LoraMoeLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's attribute; targets come from the blocks

    def _pre_injection_hook(self, model: nn.Module, config: LoraMoeConfig, adapter_name: str) -> None:
        # A model wrapped a second time keeps one routing record.
        found = [module.routing for module in model.modules() if isinstance(module, LoraMoeLinear)]
        self.routing = found[0] if found else Routing()

    def _post_injection_hook(self, model: nn.Module, config: LoraMoeConfig, adapter_name: str) -> None:
        self.routing.watch(model)

    def _prepare_adapter_config(self, peft_config: LoraMoeConfig, model_config: dict[str, Any]) -> LoraMoeConfig:
        if peft_config.target_modules in (None, "all-linear"):
            peft_config.target_modules = linears_of_blocks(self.model)
        return peft_config

    def _prepare_model(self, peft_config: LoraMoeConfig, model: nn.Module) -> None:
        if fused_experts(model):
            warnings.warn(
                "LoRA-MoE adapts linear layers and leaves the fused experts of every block alone",
                RuntimeWarning,
                stacklevel=1,  # PEFT calls this, and only warnings of layerif become notes
            )
        named = {name: module for name, module in _outside_adapters(model) if name}
        targets = [name for name in named if self._check_target_module_exists(peft_config, name)]
        for name in targets:
            _require_linear(name, named[name])
        if targets and isinstance(peft_config.num_experts, Mapping):
            _check_counts(peft_config.num_experts, targets, list(blocks(model)))

    def _create_and_replace(
        self,
        peft_config: LoraMoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        _require_linear(current_key, target)
        counts = peft_config.num_experts
        num_experts = counts if isinstance(counts, int) else counts[_count_key(counts, current_key)]
        if isinstance(target, LoraMoeLinear):
            target.update_layer(adapter_name, peft_config, num_experts)
            return
        layer = LoraMoeLinear(target, adapter_name, peft_config, num_experts, current_key, self.routing)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges as PEFT does. Raises ValueError, before anything is merged, where a module has several experts."""
        self._refuse_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._refuse_merge(adapter_names)
        self.routing.unwatch()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)  # pyright: ignore

    def _refuse_merge(self, adapter_names: list[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, LoraMoeLinear):
                for adapter in adapter_names or self.active_adapters:
                    module.refuse_merge(adapter)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuses arguments that PEFT drops before the forward, because they would silently have no effect."""
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} is not supported by LoRA-MoE, got {kwargs[name]!r}; "
                    "choose one adapter for the whole batch with set_adapter"
                )
        yield


def linears_of_blocks(model: nn.Module) -> list[str]:
    """Returns name endings that match every adaptable layer inside the blocks and nothing outside, or full names."""
    inside = {f"{block_name}.{name}": name for block_name, block in blocks(model).items() for name in adaptable(block)}
    if not inside:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear inside a list of decoder blocks; name some in target_modules"
        )
    endings = set(inside.values())
    also_outside = any(
        name not in inside and f".{name}".endswith(tuple(f".{ending}" for ending in endings))
        for name, _ in _outside_adapters(model)
    )
    return sorted(inside if also_outside else endings)


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields `named_modules` without the modules inside an adapter layer."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        yield name, module
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)


def _require_linear(name: str, module: nn.Module) -> None:
    supported = isinstance(module, LoraMoeLinear) or (
        isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    )
    supported = supported or "" in stored_in(module)  # a Conv1D
    if not supported:
        raise ValueError(
            f"target_modules matches {name}, a {type(module).__name__}; LoRA-MoE takes nn.Linear and Conv1D modules "
            "only: narrow target_modules, or list the module in exclude_modules"
        )


def _check_counts(counts: Mapping[str, int], targets: list[str], blocks: list[str]) -> None:
    for key in counts:
        if all(_specificity(key, name) == NO_MATCH for name in targets):
            known = f"; the blocks are {blocks[0]} to {blocks[-1]}" if blocks else ""
            hint = did_you_mean(key, blocks + targets)
            raise ValueError(
                f"num_experts key {key!r} matches no targeted module{hint}; give a block, a module or a pattern{known}"
            )
    missing = [name for name in targets if all(_specificity(key, name) == NO_MATCH for key in counts)]
    if missing:
        raise ValueError(
            f"num_experts has no count for {missing[0]} ({len(missing)} of {len(targets)} targeted modules have none); "
            "add its block, the module or a pattern to num_experts, or list it in exclude_modules"
        )


def _count_key(counts: Mapping[str, int], name: str) -> str:
    """Returns the most specific key that matches the module; among patterns the first."""
    return max(counts, key=lambda key: _specificity(key, name))


def _specificity(key: str, name: str) -> tuple[int, int]:
    """Ranks how specifically a key of `num_experts` names a module; NO_MATCH where it does not match."""
    if key == name:
        return 3, 0
    if re.match(rf"(.*\.)?({key})$", name):
        return 2, 0
    if name.startswith(f"{key}."):
        return 1, len(key)
    return NO_MATCH
