"""PEFT's own LoRA, with a rank for each block or matrix, or none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn

from layerif.compat import renamed_for_experts
from layerif.layers import block_of, within_block
from layerif.moe.model import linears_of_blocks


def lora_of_ranks(
    ranks: Mapping[str, int],
    target_modules: str | Sequence[str],
    *,
    scaling: float,
    lora_dropout: float,
    target_parameters: Sequence[str] = (),
) -> LoraConfig:
    """Configures PEFT's LoRA with rank r_l and α_l = scaling·r_l in block, or matrix, l.

    The keys of the patterns are regular expressions of module names: PEFT finds no module by the name of a block.

    Args:
        ranks: by the name of a block or of a matrix; one of rank 0 gets no adapter.
        target_modules: names of linear layers, or a text as PEFT takes it.
        scaling: α/r, everywhere the same.
        lora_dropout: dropout on the adapter's input.
        target_parameters: full names of the tensors of fused experts, each matrix of which gets the rank of its block.
    """
    tensors = [name for name in target_parameters if ranks.get(block_of(name))]
    pattern = {_pattern(unit): int(rank) for unit, rank in ranks.items() if rank}
    return LoraConfig(
        r=max(pattern.values()),
        lora_alpha=scaling * max(pattern.values()),  # type: ignore[arg-type] - PEFT divides, any number will do
        rank_pattern=pattern,
        alpha_pattern={unit: scaling * rank for unit, rank in pattern.items()},
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        target_parameters=tensors or None,
        exclude_modules=modules_of([unit for unit, rank in ranks.items() if not rank]),
        task_type="CAUSAL_LM",
    )


def lora_targets(model: nn.Module) -> list[str]:
    """Names the linear layers of the blocks that PEFT's LoRA can be put on, as `linears_of_blocks` does.

    In some families of experts PEFT takes names of dense layers (`down_proj` of a shared expert) for those of the fused
    experts, and puts its adapter there instead. Those layers are left out.
    """
    config: Any = getattr(model, "config", None)
    renamed = renamed_for_experts(getattr(config, "model_type", None) or "")
    found = linears_of_blocks(model)
    return [name for name in found if name.rpartition(".")[2] not in renamed] or found


def modules_of(units: Sequence[str]) -> str | None:
    """Gives the pattern of these matrices, and of all modules inside these blocks; None for no unit.

    PEFT's `exclude_modules` takes it.
    """
    return "|".join(map(_pattern, units)) or None


def _pattern(unit: str) -> str:
    return re.escape(unit) if within_block(unit) else rf"{re.escape(unit)}\..*"
