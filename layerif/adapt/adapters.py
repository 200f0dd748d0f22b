"""Kinds of adapters: LoRA-MoE, LoRA with a rank per block, LoRA as large as a LoRA-MoE."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
)
from torch import Tensor, nn

from layerif.adapt.module import AdapterModule
from layerif.allocate.rank import to_rank
from layerif.checks import did_you_mean
from layerif.models.blocks import blocks
from layerif.moe import LoraMoeConfig, balance_loss
from layerif.moe.model import linears_of_blocks


class LoRAMoEModule(AdapterModule):
    """A frozen model with as many LoRA experts per block as the allocation says.

    Loss: mean over the batch of the per-sample loss, plus `balance_coefficient` times the balance loss. keep_zeros: as
    in `LoraMoeConfig`. Everything else is as in `AdapterModule`.
    """

    allocates = "experts"

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.05,
        top_k: int = 2,
        target_modules: list[str] | None = None,
        balance_coefficient: float = 0.0,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        warmup_steps: int | None = None,
        gradient_checkpointing: bool = False,
        keep_zeros: bool = False,
        seed: int = 0,
        allocation: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run logs its whole configuration
        self.check()

    def adapter(self, base: nn.Module, allocation: Mapping[str, int]) -> PeftConfig:
        names = ("r", "lora_alpha", "lora_dropout", "top_k", "target_modules", "balance_coefficient", "keep_zeros")
        return LoraMoeConfig(
            num_experts=allocation, task_type="CAUSAL_LM", **{name: self.hparams[name] for name in names}
        )

    def extra_loss(self, num_samples: int) -> Tensor | float:
        coefficient = self.hparams["balance_coefficient"]
        if not coefficient:
            return 0.0
        assert self.model is not None
        balance = balance_loss(self.model)
        self.log("train/balance", balance, batch_size=num_samples)
        return coefficient * balance


class LoRAModule(AdapterModule):
    """A frozen model with plain PEFT LoRA, of the rank in each block that the allocation says.

    scaling: α/r, the same in every block whatever its rank, so that a block of a higher rank does not also learn with
    a larger factor (`alpha_pattern` follows `rank_pattern`); 2 is the paper's 16/8. Everything else is as in
    `AdapterModule`.
    """

    allocates = "rank"

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        scaling: float = 2.0,
        lora_dropout: float = 0.05,
        target_modules: list[str] | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        warmup_steps: int | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        allocation: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run logs its whole configuration
        self.check()

    def adapter(self, base: nn.Module, allocation: Mapping[str, int]) -> PeftConfig:
        return plain_lora(base, allocation, **{name: self.hparams[name] for name in _PLAIN})


class EqualLoRAModule(AdapterModule):
    """Plain LoRA as large as the LoRA-MoE that this allocation of experts would make: the same rank in every block,
    save that the first blocks have one more where that comes nearer to its number of trainable parameters.

    r: the rank of an expert of that LoRA-MoE, whose parameters, routers included, the record states as `lora_moe`
    beside the trainable ones here. scaling: as in `LoRAModule`.
    """

    allocates = "experts"

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        r: int = 8,
        scaling: float = 2.0,
        lora_dropout: float = 0.05,
        target_modules: list[str] | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        warmup_steps: int | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        allocation: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run logs its whole configuration
        self.check()

    def adapter(self, base: nn.Module, allocation: Mapping[str, int]) -> PeftConfig:
        ranks, self.compared = equal_ranks(
            base, allocation, r=self.hparams["r"], targets=self.hparams["target_modules"]
        )
        return plain_lora(base, ranks, **{name: self.hparams[name] for name in _PLAIN})


_PLAIN = ("scaling", "lora_dropout", "target_modules")


def plain_lora(
    base: nn.Module,
    ranks: Mapping[str, int],
    *,
    scaling: float,
    lora_dropout: float,
    target_modules: Sequence[str] | None,
) -> LoraConfig:
    """PEFT LoRA with rank r_l in block l and α_l = scaling·r_l, on all linear layers of the blocks or the named ones.

    Raises ValueError for a block the model does not have, or one without a rank.
    """
    known = list(blocks(base))
    for block in ranks:
        if block not in known:
            raise ValueError(f"the rank of {block!r} has no place in this model{did_you_mean(block, known)}")
    if missing := [block for block in known if block not in ranks]:
        raise ValueError(f"{len(missing)} of {len(known)} blocks have no rank, the first is {missing[0]!r}")
    pattern = {rf"{re.escape(block)}\..*": int(rank) for block, rank in ranks.items()}
    return LoraConfig(
        r=max(pattern.values()),
        lora_alpha=scaling * max(pattern.values()),  # type: ignore[arg-type] - PEFT divides, any number will do
        rank_pattern=pattern,
        alpha_pattern={block: scaling * rank for block, rank in pattern.items()},
        lora_dropout=lora_dropout,
        target_modules=list(target_modules) if target_modules else linears_of_blocks(base),
        task_type="CAUSAL_LM",
    )


def equal_ranks(
    base: nn.Module, experts: Mapping[str, int], *, r: int, targets: Sequence[str] | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Ranks by block of plain LoRA with as many parameters as the LoRA-MoE of these experts, and that number.

    A linear layer of I inputs and O outputs has E·r·(I + O) + E·I parameters with E > 1 experts and a router, r·(I + O)
    with one, and R·(I + O) in plain LoRA of rank R.
    """
    endings = tuple(f".{ending}" for ending in targets or linears_of_blocks(base))
    wanted, per_rank = 0, {}
    for block, module in blocks(base).items():
        sizes = [
            (linear.in_features, linear.out_features)
            for name, linear in module.named_modules()
            if isinstance(linear, nn.Linear) and f".{block}.{name}".endswith(endings)
        ]
        per_rank[block] = sum(map(sum, sizes))
        routers = sum(inputs for inputs, _ in sizes) * experts[block] if experts[block] > 1 else 0
        wanted += experts[block] * r * per_rank[block] + routers
    budget = max(len(per_rank), round(wanted * len(per_rank) / sum(per_rank.values())))
    ranks = to_rank([1.0] * len(per_rank), budget)
    return dict(zip(per_rank, ranks, strict=True)), {"lora_moe": wanted}
