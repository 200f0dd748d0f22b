"""One linear layer with E low-rank experts and its own router, all experts in two dense products.

Letters: T tokens (any leading shape), E experts, K chosen experts, R rank of one expert. With all A_e stacked to
A (E·R × d_in) and all B_e side by side to B (d_out × E·R),

    Σ_e g_e·B_e·A_e·x = B·(g ⊗ A·x),   g ⊗ h = each expert's R entries of h times its weight g_e,

which equals the loop over experts and keeps, for backward, T·(2·E·R + E) numbers besides the layer's own input
where the loop keeps copies of its input and output for each chosen expert.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from layerif.checks import how_many
from layerif.models.stored import AnyLinear, stored_in
from layerif.moe.config import LoraMoeConfig
from layerif.moe.routing import Record, Routing


class LoraMoeLinear(nn.Module, BaseTunerLayer):
    """A frozen nn.Linear with experts per adapter; `name` is the name of the module in the base model.

    Weights per adapter: `lora_moe_A` (E·R × d_in), `lora_moe_B` (d_out × E·R) and, for E > 1, `lora_moe_router`
    (E × d_in). As in PEFT the adapter computes in its own dtype (float32 over a bfloat16 base unless
    `autocast_adapter_dtype=False`) and the sum returns to the base layer's.
    """

    adapter_layer_names = ("lora_moe_A", "lora_moe_B", "lora_moe_router")
    other_param_names = (
        "r",
        "num_experts",
        "top_k",
        "scaling",
        "balance_coefficient",
        "keeps_zeros",
        "lora_moe_dropout",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraMoeConfig,
        num_experts: int,
        name: str,
        routing: Routing,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = self._base_linear()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.name = name
        self.routing = routing
        self.r: dict[str, int] = {}
        self.num_experts: dict[str, int] = {}
        self.top_k: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.balance_coefficient: dict[str, float] = {}
        self.lora_moe_dropout = nn.ModuleDict()
        self.lora_moe_A = nn.ModuleDict()
        self.lora_moe_B = nn.ModuleDict()
        self.lora_moe_router = nn.ModuleDict()
        self.keeps_zeros: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, num_experts)

    def update_layer(self, adapter_name: str, config: LoraMoeConfig, num_experts: int) -> None:
        """Adds an adapter: A and router are kaiming-uniform(√5), whose bound depends on d_in alone, and B is zero."""
        self.r[adapter_name] = config.r
        self.num_experts[adapter_name] = num_experts
        self.top_k[adapter_name] = min(config.top_k, num_experts)
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self.balance_coefficient[adapter_name] = config.balance_coefficient
        self.keeps_zeros[adapter_name] = config.keep_zeros and num_experts == 1
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_moe_dropout[adapter_name] = dropout
        down = nn.Linear(self.in_features, num_experts * config.r, bias=False)
        up = nn.Linear(num_experts * config.r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        self.lora_moe_A[adapter_name] = down
        self.lora_moe_B[adapter_name] = up
        if num_experts > 1:
            router = nn.Linear(self.in_features, num_experts, bias=False)
            nn.init.kaiming_uniform_(router.weight, a=math.sqrt(5))
            self.lora_moe_router[adapter_name] = router
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def has_router(self) -> bool:
        """Tells if an active adapter has more than one expert, and so a router."""
        return any(adapter in self.lora_moe_router for adapter in self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_moe_A:
                result = result + self._experts(x, adapter)
        return result.to(dtype)

    def _experts(self, x: Tensor, adapter: str) -> Tensor:
        down = cast(nn.Linear, self.lora_moe_A[adapter])
        x = self._cast_input_dtype(x, down.weight.dtype)
        if self.keeps_zeros[adapter]:
            return F.linear(self.lora_moe_dropout[adapter](x), self._delta_weight(adapter))
        hidden_TER = down(self.lora_moe_dropout[adapter](x))
        if self.num_experts[adapter] == 1:
            scaled = hidden_TER * self.scaling[adapter]
        else:
            gates_TE = (self._gates(x, adapter) * self.scaling[adapter]).to(hidden_TER.dtype)
            by_expert = hidden_TER.unflatten(-1, (self.num_experts[adapter], self.r[adapter]))
            scaled = (by_expert * gates_TE.unsqueeze(-1)).flatten(-2)
        return self.lora_moe_B[adapter](scaled)

    def _gates(self, x: Tensor, adapter: str) -> Tensor:
        """Returns routing weights (T × E), which are zero outside the top-k and sum to 1.

        The renormalised top-k of a softmax is the softmax of the top-k logits: half the work, nothing to divide.
        """
        router = cast(nn.Linear, self.lora_moe_router[adapter])
        logits_TE = router(x)
        if logits_TE.dtype != torch.float64:  # half precision ties experts that differ
            logits_TE = logits_TE.float()
        top_k = self.top_k[adapter]
        coefficient = self.balance_coefficient[adapter]
        self.routing.keep(Record(self.name, adapter, logits_TE, top_k, router.weight.requires_grad, coefficient))
        if top_k == self.num_experts[adapter]:
            return logits_TE.softmax(dim=-1)
        top_logits, chosen = logits_TE.topk(top_k, dim=-1)
        return torch.zeros_like(logits_TE).scatter(-1, chosen, top_logits.softmax(dim=-1))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns B·A·α/r (d_out × d_in), with `keep_zeros` zero where the base weight is zero.

        Raises:
            ValueError: the adapter has several experts.
        """
        self.refuse_merge(adapter)
        return self._delta_weight(adapter).detach()

    def _delta_weight(self, adapter: str) -> Tensor:
        down, up = cast(nn.Linear, self.lora_moe_A[adapter]), cast(nn.Linear, self.lora_moe_B[adapter])
        delta = up.weight @ down.weight * self.scaling[adapter]
        return delta.where(self._base_linear().weight != 0, 0) if self.keeps_zeros[adapter] else delta

    def refuse_merge(self, adapter: str) -> None:
        """Refuses a merge, naming this module, where no single weight equals base and adapter together."""
        if self.num_experts.get(adapter, 1) > 1:
            raise ValueError(
                f"cannot merge adapter {adapter!r} into {self.name}: its {self.num_experts[adapter]} experts are "
                "weighted anew for every token; only num_experts=1 merges. Keep the adapter, or drop it by unload()"
            )
        weight = self._base_linear().weight
        if adapter in self.num_experts and not weight.is_floating_point():
            raise ValueError(
                f"cannot merge adapter {adapter!r} into {self.name}: its weight is stored as {weight.dtype}; "
                "load the base model in a floating-point dtype to merge"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds B·A·α/r to the base weight.

        Args:
            safe_merge: refuse a merged weight that is not finite, and leave the base weight as it was.
            adapter_names: the adapters to merge; None merges the active ones.

        Raises:
            ValueError: an adapter has several experts, or the merged weight is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_moe_A:
                weight = self._base_linear().weight
                merged = weight.data + self.get_delta_weight(adapter).to(weight.dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(
                        f"merging adapter {adapter!r} into {self.name} gives non-finite weights; load the base model "
                        "in float32, or look at the adapter"
                    )
                weight.data.copy_(merged)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtracts every merged adapter from the base weight, up to rounding."""
        if not self.merged:
            warnings.warn(f"{self.name} has no merged adapter: nothing to unmerge", stacklevel=2)
        while self.merged_adapters:
            weight = self._base_linear().weight
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def _base_linear(self) -> AnyLinear:
        base = self.get_base_layer()
        return stored_in(base).get("", cast(nn.Linear, base))

    def extra_repr(self) -> str:
        return ", ".join(
            f"{adapter}: {how_many(count, 'expert')} of rank {self.r[adapter]}"
            + (f", top {self.top_k[adapter]}" if count > 1 else "")
            for adapter, count in self.num_experts.items()
        )

    def __repr__(self) -> str:
        return "lora_moe." + super().__repr__()
