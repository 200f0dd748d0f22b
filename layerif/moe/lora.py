"""PEFT's own LoRA, with a rank for each block or matrix, or none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from peft import LoraConfig

from layerif.layers import within_block


def lora_of_ranks(
    ranks: Mapping[str, int], target_modules: str | Sequence[str], *, scaling: float, lora_dropout: float
) -> LoraConfig:
    """Configures PEFT's LoRA with rank r_l and α_l = scaling·r_l in block, or matrix, l.

    The keys of the patterns are regular expressions of module names: PEFT finds no module by the name of a block.

    Args:
        ranks: by the name of a block or of a matrix; one of rank 0 gets no adapter.
        target_modules: names of linear layers, or a text as PEFT takes it.
        scaling: α/r, everywhere the same.
        lora_dropout: dropout on the adapter's input.
    """
    pattern = {_pattern(unit): int(rank) for unit, rank in ranks.items() if rank}
    return LoraConfig(
        r=max(pattern.values()),
        lora_alpha=scaling * max(pattern.values()),  # type: ignore[arg-type] - PEFT divides, any number will do
        rank_pattern=pattern,
        alpha_pattern={unit: scaling * rank for unit, rank in pattern.items()},
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        exclude_modules=modules_of([unit for unit, rank in ranks.items() if not rank]),
        task_type="CAUSAL_LM",
    )


def modules_of(units: Sequence[str]) -> str | None:
    """Gives the pattern of these matrices, and of all modules inside these blocks; None for no unit.

    PEFT's `exclude_modules` takes it.
    """
    return "|".join(map(_pattern, units)) or None


def _pattern(unit: str) -> str:
    return re.escape(unit) if within_block(unit) else rf"{re.escape(unit)}\..*"
