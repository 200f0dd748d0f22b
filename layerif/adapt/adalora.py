"""AdaLoRA (Zhang et al., 2023), PEFT's own: it starts with more ranks and takes away the least important ones.

The steps of the optimiser fall into three parts: ranks stay as they are (a tenth), are taken away, and are settled (the
last three tenths). PEFT's schedule asks for its total before a training; here it follows from the run's steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from peft import AdaLoraConfig, PeftConfig
from torch import Tensor, nn

from layerif.adapt.adapters import Adapter, Scaling, counts_of_units
from layerif.adapt.sizes import Capacity, adapted_shapes, num_parameters
from layerif.allocate.allocation import Allocation
from layerif.checks import NonNegative
from layerif.moe.lora import lora_targets
from layerif.scores import AllocationKind

_BEFORE, _AFTER = 0.1, 0.3  # shares of the steps before ranks are taken away, and after
_LEAST_STEPS = 3  # one to see what is important, one to settle the ranks, one to train them
_NAME = "default"
_IMPORTANCE, _UNCERTAINTY, _KEPT = "importance.", "uncertainty.", "kept."  # prefixes in a checkpoint
_SETTLED = "settled"


@dataclass(frozen=True, kw_only=True)
class AdaLoraAdapter(Adapter):
    """PEFT's AdaLoRA, which ends with as many parameters as plain LoRA has with the ranks of the allocation.

    Attributes:
        scaling: α/r at the start.
        more: the ranks at the start, as a multiple of those of the allocation.
        orthogonality: the weight of the mean over A and B of every matrix of ‖A·Aᵀ − 1‖ and ‖Bᵀ·B − 1‖.
    """

    kind: ClassVar[str] = "adalora"
    allocates: ClassVar[AllocationKind] = "rank"

    scaling: Scaling = 2.0
    more: Annotated[float, Ge(1)] = 1.5
    orthogonality: NonNegative = 0.5

    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        rank = self._first_rank(allocation)
        return AdaLoraConfig(
            init_r=rank,
            lora_alpha=self.scaling * rank,  # type: ignore[arg-type] - PEFT divides, any number will do
            lora_dropout=self.lora_dropout,
            orth_reg_weight=self.orthogonality,
            target_modules=list(self.target_modules or lora_targets(base)),
            total_step=1,  # until `scheduled` knows
            task_type="CAUSAL_LM",
        )

    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        first = Capacity(1, self._first_rank(allocation))
        return dict.fromkeys(counts_of_units(base, allocation, self.target_modules), first)

    def put_on(self, base: nn.Module, allocation: Allocation) -> nn.Module:
        ranks = {block: Capacity(1, rank) for block, rank in allocation.by_name().items()}
        wanted = num_parameters(adapted_shapes(base, self.target_modules or lora_targets(base)), ranks)
        model: Any = super().put_on(base, allocation)
        model.wanted, model.is_settled = wanted, False
        allocator = model.base_model.rankallocator
        sizes = {name: _size(layer) for name, layer in _layers(model).items()}
        allocator.target_bgt = min(round(wanted * len(sizes) / sum(sizes.values())), allocator.init_bgt - 1)
        return model

    def penalties(self, model: nn.Module) -> dict[str, tuple[float, Tensor]]:
        return {"orthogonality": (self.orthogonality, orthogonality(model))} if self.orthogonality else {}

    def scheduled(self, model: nn.Module, num_steps: int) -> None:
        if num_steps < _LEAST_STEPS:
            raise ValueError(
                f"method=adalora needs at least {_LEAST_STEPS} steps to choose ranks, and the trainer's settings give "
                f"{num_steps}; raise trainer.max_epochs or trainer.max_steps"
            )
        config = _config(model)
        config.total_step = num_steps
        config.tinit, config.tfinal = int(_BEFORE * num_steps), math.ceil(_AFTER * num_steps)

    def stepped(self, model: nn.Module, step: int) -> None:
        peft: Any = model
        settles = _config(model).total_step - _config(model).tfinal
        if step == settles:
            peft.base_model.rankallocator.target_bgt = _nearest(peft, peft.wanted)
        peft.base_model.update_and_allocate(step)
        peft.is_settled = step >= settles

    def finished(self, model: nn.Module) -> dict[str, int]:
        if not model.is_settled:
            raise ValueError(
                "training ended before AdaLoRA had settled its ranks; give it the time for all its steps, or use "
                "method=lora"
            )
        pattern = {_full(name): kept for name, kept in _config(model).rank_pattern.items()}
        model.base_model.resize_modules_by_rank_pattern(pattern, _NAME)  # type: ignore[operator, union-attr]
        return {name.removesuffix(f".lora_E.{_NAME}"): sum(kept) for name, kept in pattern.items()}

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        allocator, pattern = model.base_model.rankallocator, _config(model).rank_pattern or {}  # type: ignore[union-attr]
        weights = {name: value.detach() for name, value in _weights(model).items()}
        return (
            weights
            | {f"{_IMPORTANCE}{name}": value for name, value in allocator.exp_avg_ipt.items()}  # type: ignore[union-attr]
            | {f"{_UNCERTAINTY}{name}": value for name, value in allocator.exp_avg_unc.items()}  # type: ignore[union-attr]
            | {_SETTLED: torch.tensor(model.is_settled)}
            | {f"{_KEPT}{_full(name)}": torch.tensor(kept) for name, kept in pattern.items()}
        )

    def restore(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        own = _weights(model)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

        with torch.no_grad():
            for name, value in own.items():
                value.copy_(weights[name])
        device = {name: value.device for name, value in own.items()}
        allocator: Any = model.base_model.rankallocator  # type: ignore[union-attr]
        allocator.exp_avg_ipt = {name: value.to(device[name]) for name, value in part(_IMPORTANCE).items()}
        allocator.exp_avg_unc = {name: value.to(device[name]) for name, value in part(_UNCERTAINTY).items()}
        allocator.ipt = {name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()}
        kept = {name: value.tolist() for name, value in part(_KEPT).items()}
        _config(model).rank_pattern = kept or None
        model.is_settled = bool(weights[_SETTLED])  # type: ignore[assignment]

    def _first_rank(self, allocation: Allocation) -> int:
        values = allocation.by_name().values()
        if max(values) - min(values) > 1 or not min(values):
            raise ValueError(
                f"method=adalora finds ranks by itself, and this allocation gives {min(values)} to {max(values)}; use "
                "estimator=uniform allocator=rank"
            )
        return math.ceil(self.more * sum(values) / len(values))


def orthogonality(model: nn.Module) -> Tensor:
    """Computes how far A and B of every matrix are from orthogonal rows and columns: the mean of ‖P·Pᵀ − 1‖."""
    found = []
    for name, weight in model.named_parameters():
        if f"lora_A.{_NAME}" in name or f"lora_B.{_NAME}" in name:
            gram = weight @ weight.T if "lora_A" in name else weight.T @ weight
            found.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return torch.stack(found).mean()


def _nearest(model: Any, wanted: int) -> int:
    """Finds the sum of ranks whose matrices come nearest to a number of parameters, by halving."""
    allocator, layers = model.base_model.rankallocator, _layers(model)
    saved = {name: layer.lora_E[_NAME].detach().clone() for name, layer in layers.items()}

    def size(budget: int) -> int:
        pattern = allocator.mask_to_budget(model.base_model.model, budget)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_E[_NAME].copy_(saved[name])
        return sum(sum(kept) * _size(layers[name.removesuffix(f".lora_E.{_NAME}")]) for name, kept in pattern.items())

    low, high = 1, allocator.init_bgt - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    return min((low, high), key=lambda budget: abs(size(budget) - wanted))


def _size(layer: Any) -> int:
    return layer.in_features + layer.out_features + 1


def _layers(model: Any) -> dict[str, Any]:
    inner = model.base_model.model
    return {name: layer for name, layer in inner.named_modules() if hasattr(layer, "lora_E")}


def _weights(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.base_model.model.named_parameters() if ".lora_" in name}


def _config(model: Any) -> Any:
    return model.peft_config[_NAME]


def _full(name: str) -> str:
    """Gives the name with the adapter's, which PEFT leaves out once it has saved."""
    return name if name.endswith(f".{_NAME}") else f"{name}.{_NAME}"
