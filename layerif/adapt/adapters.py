"""Kinds of adapters: LoRA-MoE, LoRA with a rank per block, and LoRA as large as a LoRA-MoE.

A kind is a dataclass. Its fields are the settings of the method of the same name, and its methods turn an allocation
into an adapter of PEFT.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from layerif.adapt.sizes import Capacity, adapted_shapes, num_parameters
from layerif.allocate.allocation import Allocation
from layerif.allocate.rank import to_rank
from layerif.checks import Count, NonNegative, Positive, Seed, Whole, check_fields, did_you_mean
from layerif.models.blocks import blocks
from layerif.moe import LoraMoeConfig, balance_loss
from layerif.moe.lora import lora_of_ranks
from layerif.moe.model import linears_of_blocks
from layerif.scores import AllocationKind

Scaling = Annotated[float, Gt(0), "it is α/r; the paper uses 16/8"]


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """Settings that every kind of adapter has, and how it is trained.

    Attributes:
        lora_dropout: dropout on the adapter's input.
        target_modules: names of the linear layers that get an adapter; None: every linear layer of the blocks.
        learning_rate, weight_decay: of AdamW.
        warmup_ratio: the share of the optimiser's steps over which the learning rate rises linearly. It falls linearly
            to zero afterwards.
        warmup_steps: the number of these steps, in place of the ratio.
        gradient_checkpointing: keep only the input of each block and run the block again in the backward pass.
        seed: decides the adapter's first weights and the dropout.
    """

    kind: ClassVar[str]  # its name in a checkpoint
    allocates: ClassVar[AllocationKind]  # the kind of allocation that it spends

    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.05
    target_modules: list[str] | None = None
    learning_rate: Positive = 3e-4
    weight_decay: NonNegative = 0.0
    warmup_ratio: Annotated[float, Ge(0), Lt(1), "for steps use method.warmup_steps"] = 0.03
    warmup_steps: Whole | None = None
    gradient_checkpointing: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "method")

    @abstractmethod
    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        """Returns the configuration of the adapter.

        Args:
            base: the bare model, or its skeleton.
            allocation: of the kind that this adapter spends.
        """

    @abstractmethod
    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        """Returns the experts and their rank by block, for `peft_config` of the same arguments."""

    def penalties(self, model: nn.Module) -> dict[str, tuple[float, Tensor]]:
        """Returns the terms that are added to the loss of the batch just run: by name, the weight and the value."""
        return {}

    def compared(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        """Counts the parameters of the model that this one is a baseline of, by that model's name."""
        return {}

    def saved(self) -> dict[str, Any]:
        """Returns the settings in the form that a checkpoint holds; `adapter_of` is the inverse."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class LoraMoeAdapter(Adapter):
    """A mixture of LoRA experts, with as many experts per block as the allocation says.

    Attributes:
        r, lora_alpha: rank and α of every expert.
        top_k: experts that a token takes.
        balance_coefficient: weight of the balance loss.
        keep_zeros: keep weights of the base that are zero at zero, see `LoraMoeConfig`.
    """

    kind: ClassVar[str] = "lora_moe"
    allocates: ClassVar[AllocationKind] = "experts"

    r: Count = 8
    lora_alpha: Positive = 16
    top_k: Count = 2
    balance_coefficient: NonNegative = 0.0
    keep_zeros: bool = False

    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        names = ("r", "lora_alpha", "lora_dropout", "top_k", "target_modules", "balance_coefficient", "keep_zeros")
        settings = {name: getattr(self, name) for name in names}
        return LoraMoeConfig(num_experts=allocation.by_name(), task_type="CAUSAL_LM", **settings)

    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        return {block: Capacity(int(experts), self.r) for block, experts in allocation.by_name().items()}

    def penalties(self, model: nn.Module) -> dict[str, tuple[float, Tensor]]:
        return {"balance": (self.balance_coefficient, balance_loss(model))} if self.balance_coefficient else {}


@dataclass(frozen=True, kw_only=True)
class LoraAdapter(Adapter):
    """PEFT's LoRA, with the rank in each block that the allocation says.

    Attributes:
        scaling: α/r, which is the same in every block, so that a block of a higher rank does not also learn with a
            larger factor (`alpha_pattern` follows `rank_pattern`).
    """

    kind: ClassVar[str] = "lora"
    allocates: ClassVar[AllocationKind] = "rank"

    scaling: Scaling = 2.0

    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        return self.of_ranks(base, allocation.by_name())

    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        return {block: Capacity(1, int(rank)) for block, rank in allocation.by_name().items()}

    def of_ranks(self, base: nn.Module, ranks: Mapping[str, int]) -> PeftConfig:
        """Returns the configuration of LoRA with these ranks by block."""
        return plain_lora(
            base,
            ranks,
            scaling=self.scaling,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
        )


@dataclass(frozen=True, kw_only=True)
class EqualLoraAdapter(LoraAdapter):
    """PEFT's LoRA, as large as the LoRA-MoE that this allocation of experts would make.

    Every block has the same rank, except that the first blocks have one more where that comes nearer to the number of
    trainable parameters of the LoRA-MoE, routers included.

    Attributes:
        r: rank of an expert of that LoRA-MoE.
    """

    kind: ClassVar[str] = "lora_equal"
    allocates: ClassVar[AllocationKind] = "experts"

    r: Count = 8

    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        ranks, _ = self._equal(base, allocation)
        return self.of_ranks(base, ranks)

    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        ranks, _ = self._equal(base, allocation)
        return {block: Capacity(1, rank) for block, rank in ranks.items()}

    def compared(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        _, wanted = self._equal(base, allocation)
        return {"lora_moe": wanted}

    def _equal(self, base: nn.Module, allocation: Allocation) -> tuple[dict[str, int], int]:
        return equal_ranks(base, allocation.by_name(), r=self.r, targets=self.target_modules)


_KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (LoraMoeAdapter, LoraAdapter, EqualLoraAdapter)}


def adapter_of(saved: Mapping[str, Any]) -> Adapter:
    """Rebuilds an adapter's settings from the result of `Adapter.saved`."""
    settings = dict(saved)
    return _KINDS[settings.pop("kind")](**settings)


def plain_lora(
    base: nn.Module,
    ranks: Mapping[str, int],
    *,
    scaling: float,
    lora_dropout: float,
    target_modules: Sequence[str] | None,
) -> LoraConfig:
    """Configures PEFT's LoRA with rank r_l and α_l = scaling·r_l in block l.

    Args:
        base: the bare model, or its skeleton.
        ranks: by block name.
        scaling: α/r of every block.
        lora_dropout: dropout on the adapter's input.
        target_modules: None takes all linear layers of the blocks.

    Raises:
        ValueError: a block is not one of the model's, or has no rank.
    """
    known = list(blocks(base))
    for block in ranks:
        if block not in known:
            raise ValueError(
                f"{block!r} has a rank but is not a block of this model{did_you_mean(block, known)}; its blocks are "
                f"{known[0]} to {known[-1]}"
            )
    if missing := [block for block in known if block not in ranks]:
        raise ValueError(
            f"{len(missing)} of {len(known)} blocks have no rank, the first is {missing[0]!r}; give each one"
        )
    targets = list(target_modules) if target_modules else linears_of_blocks(base)
    return lora_of_ranks(ranks, targets, scaling=scaling, lora_dropout=lora_dropout)


def equal_ranks(
    base: nn.Module, experts: Mapping[str, int], *, r: int, targets: Sequence[str] | None
) -> tuple[dict[str, int], int]:
    """Finds the ranks of plain LoRA that come nearest to the size of a LoRA-MoE.

    Args:
        base: the bare model, or its skeleton.
        experts: the number of experts E by block.
        r: rank of every expert.
        targets: names of the linear layers with an adapter; None: every linear layer of the blocks.

    Returns:
        The ranks by block, and the number of parameters of the LoRA-MoE.

    Raises:
        ValueError: none of the layers is inside a block.
    """
    shapes = adapted_shapes(base, targets)
    wanted = num_parameters(shapes, {block: Capacity(count, r) for block, count in experts.items()})
    of_rank_one = num_parameters(shapes, dict.fromkeys(shapes, Capacity(1, 1)))
    if not of_rank_one:
        raise ValueError(
            f"method.target_modules={list(targets or ())} names only layers outside the blocks, over which ranks are "
            "dealt out; name a layer of the blocks, too"
        )
    budget = max(len(shapes), round(Fraction(wanted * len(shapes), of_rank_one)))
    ranks = to_rank([1.0] * len(shapes), budget)
    return dict(zip(shapes, ranks, strict=True)), wanted
