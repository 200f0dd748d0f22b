"""PEFT's own LoRA, with a rank for each block, or none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from peft import LoraConfig


def lora_of_ranks(
    ranks: Mapping[str, int], target_modules: str | Sequence[str], *, scaling: float, lora_dropout: float
) -> LoraConfig:
    """Configures PEFT's LoRA with rank r_l and α_l = scaling·r_l in block l.

    The keys of the patterns are regular expressions of module names: PEFT finds no module by the name of a block.

    Args:
        ranks: by block name; a block of rank 0 gets no adapter.
        target_modules: names of linear layers, or a text as PEFT takes it.
        scaling: α/r of every block.
        lora_dropout: dropout on the adapter's input.
    """
    pattern = {rf"{re.escape(block)}\..*": int(rank) for block, rank in ranks.items() if rank}
    return LoraConfig(
        r=max(pattern.values()),
        lora_alpha=scaling * max(pattern.values()),  # type: ignore[arg-type] - PEFT divides, any number will do
        rank_pattern=pattern,
        alpha_pattern={block: scaling * rank for block, rank in pattern.items()},
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        exclude_modules=inside_of([block for block, rank in ranks.items() if not rank]),
        task_type="CAUSAL_LM",
    )


def inside_of(blocks: Sequence[str]) -> str | None:
    """Gives the pattern of all modules inside these blocks, for PEFT's `exclude_modules`; None for no block."""
    return rf"({'|'.join(map(re.escape, blocks))})\..*" if blocks else None
