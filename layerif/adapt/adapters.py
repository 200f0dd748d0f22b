"""Kinds of adapters: LoRA-MoE, LoRA with a rank per block, and LoRA as large as a LoRA-MoE.

A kind is a dataclass. Its fields are the settings of the method of the same name, and its methods turn an allocation
into an adapter of PEFT. Where an allocation of layers leaves a block out, the block gets no adapter.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from layerif.adapt.sizes import Capacity, Shapes, adapted_shapes, num_parameters, too_large_rank
from layerif.adapt.tuning import Tuning, check_blocks, trained_blocks
from layerif.allocate.allocation import Allocation
from layerif.allocate.rank import to_rank
from layerif.checks import Count, NonNegative, Positive
from layerif.models.blocks import blocks
from layerif.moe import LoraMoeConfig, balance_loss
from layerif.moe.lora import inside_of, lora_of_ranks
from layerif.moe.model import linears_of_blocks
from layerif.scores import AllocationKind

Scaling = Annotated[float, Gt(0), "it is α/r; the paper uses 16/8"]


@dataclass(frozen=True, kw_only=True)
class Adapter(Tuning):
    """Settings that every kind of adapter has.

    Attributes:
        lora_dropout: dropout on the adapter's input.
        target_modules: names of the linear layers that get an adapter; None: every linear layer of the blocks.
    """

    leaves: ClassVar[str] = "adapter"

    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.05
    target_modules: list[str] | None = None

    @abstractmethod
    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        """Returns the configuration of the adapter.

        Args:
            base: the bare model, or its skeleton.
            allocation: of a kind that this adapter spends.
        """

    @abstractmethod
    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        """Returns the experts and their rank by block, for `peft_config` of the same arguments."""

    def put_on(self, base: nn.Module, allocation: Allocation) -> nn.Module:
        config = self.peft_config(base, allocation)
        shapes = adapted_shapes(base, self.target_modules)
        if too_large := too_large_rank(shapes, self.capacities(base, allocation)):
            # Equal scores asked for less, so this is what these scores ask for: a waste and no error.
            warnings.warn(f"{too_large}; what the scores give it beyond that is wasted", RuntimeWarning, stacklevel=2)
        return get_peft_model(base, config)  # type: ignore[arg-type]

    def taken_off(self, model: nn.Module) -> nn.Module:
        return model.unload()  # type: ignore[operator]

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        return get_peft_model_state_dict(model)

    def restore(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        set_peft_model_state_dict(model, dict(weights))

    def write(self, model: nn.Module, tokenizer: Any, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class LoraMoeAdapter(Adapter):
    """A mixture of LoRA experts, with as many experts per block as the allocation says.

    Attributes:
        r, lora_alpha: rank and α of every expert.
        num_experts: the experts of a block that is trained, where the allocation is of layers; None: 5 there.
        equal_parameters: where the allocation is of layers, deal out more experts to the blocks that are trained, until
            they have the parameters that `num_experts` in every block would have.
        top_k: experts that a token takes.
        balance_coefficient: weight of the balance loss.
        keep_zeros: keep weights of the base that are zero at zero, see `LoraMoeConfig`.
    """

    kind: ClassVar[str] = "lora_moe"
    allocates: ClassVar[tuple[AllocationKind, ...]] = ("experts", "layers")

    r: Count = 8
    lora_alpha: Positive = 16
    num_experts: Count | None = None
    equal_parameters: bool = False
    top_k: Count = 2
    balance_coefficient: NonNegative = 0.0
    keep_zeros: bool = False

    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        names = ("r", "lora_alpha", "lora_dropout", "top_k", "target_modules", "balance_coefficient", "keep_zeros")
        settings = {name: getattr(self, name) for name in names}
        experts = self._experts(base, allocation)
        return LoraMoeConfig(
            num_experts={block: count for block, count in experts.items() if count},
            exclude_modules=inside_of([block for block, count in experts.items() if not count]),
            task_type="CAUSAL_LM",
            **settings,
        )

    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        return {block: Capacity(count, self.r) for block, count in self._experts(base, allocation).items()}

    def compared(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        return {"all_layers": self._wanted(base)} if self.equal_parameters else {}

    def penalties(self, model: nn.Module) -> dict[str, tuple[float, Tensor]]:
        return {"balance": (self.balance_coefficient, balance_loss(model))} if self.balance_coefficient else {}

    def _experts(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        if allocation.kind == "layers":
            wanted = self._wanted(base) if self.equal_parameters else None
            return _of_layers(base, allocation, self.target_modules, self._each, self._of_trained, wanted)
        _refuse_beside(allocation, num_experts=self.num_experts, equal_parameters=self.equal_parameters)
        return allocation.by_name()

    @property
    def _of_trained(self) -> int:
        return 5 if self.num_experts is None else self.num_experts

    def _each(self, experts: int) -> Capacity:
        return Capacity(experts, self.r)

    def _wanted(self, base: nn.Module) -> int:
        shapes = adapted_shapes(base, self.target_modules)
        return num_parameters(shapes, dict.fromkeys(shapes, self._each(self._of_trained)))


@dataclass(frozen=True, kw_only=True)
class PlainLora(Adapter):
    """PEFT's LoRA with ranks by block.

    Attributes:
        scaling: α/r, which is the same in every block, so that a block of a higher rank does not also learn with a
            larger factor (`alpha_pattern` follows `rank_pattern`).
    """

    scaling: Scaling = 2.0

    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        return plain_lora(
            base,
            self.ranks(base, allocation),
            scaling=self.scaling,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
        )

    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        return {block: _of_rank(rank) for block, rank in self.ranks(base, allocation).items()}

    @abstractmethod
    def ranks(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        """Returns the ranks by block; 0 for a block without an adapter."""


@dataclass(frozen=True, kw_only=True)
class LoraAdapter(PlainLora):
    """PEFT's LoRA, with the rank in each block that the allocation says.

    Attributes:
        r: the rank of a block that is trained, where the allocation is of layers; None: 8 there.
        equal_parameters: where the allocation is of layers, deal out more ranks to the blocks that are trained, until
            they have the parameters that rank `r` in every block would have.
    """

    kind: ClassVar[str] = "lora"
    allocates: ClassVar[tuple[AllocationKind, ...]] = ("rank", "layers")

    r: Count | None = None
    equal_parameters: bool = False

    def ranks(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        if allocation.kind == "layers":
            wanted = self._wanted(base) if self.equal_parameters else None
            return _of_layers(base, allocation, self.target_modules, _of_rank, self._of_trained, wanted)
        _refuse_beside(allocation, r=self.r, equal_parameters=self.equal_parameters)
        return allocation.by_name()

    def compared(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        return {"all_layers": self._wanted(base)} if self.equal_parameters else {}

    @property
    def _of_trained(self) -> int:
        return 8 if self.r is None else self.r

    def _wanted(self, base: nn.Module) -> int:
        shapes = adapted_shapes(base, self.target_modules)
        return num_parameters(shapes, dict.fromkeys(shapes, _of_rank(self._of_trained)))


@dataclass(frozen=True, kw_only=True)
class EqualLoraAdapter(PlainLora):
    """PEFT's LoRA, as large as the LoRA-MoE that this allocation of experts would make.

    Every block has the same rank, except that the first blocks have one more where that comes nearer to the number of
    trainable parameters of the LoRA-MoE, routers included.

    Attributes:
        r: rank of an expert of that LoRA-MoE.
    """

    kind: ClassVar[str] = "lora_equal"
    allocates: ClassVar[AllocationKind] = "experts"

    r: Count = 8

    def ranks(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        shapes = adapted_shapes(base, self.target_modules)
        return dealt_out(shapes, list(shapes), _of_rank, self._wanted(base, allocation), targets=self.target_modules)

    def compared(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        return {"lora_moe": self._wanted(base, allocation)}

    def _wanted(self, base: nn.Module, allocation: Allocation) -> int:
        capacities = {block: Capacity(count, self.r) for block, count in allocation.by_name().items()}
        return num_parameters(adapted_shapes(base, self.target_modules), capacities)


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
        ranks: by block name; a block of rank 0 gets no adapter.
        scaling: α/r of every block.
        lora_dropout: dropout on the adapter's input.
        target_modules: None takes all linear layers of the blocks.

    Raises:
        ValueError: a block is not one of the model's, or has no rank.
    """
    check_blocks(list(ranks), list(blocks(base)), value="rank")
    targets = list(target_modules) if target_modules else linears_of_blocks(base)
    return lora_of_ranks(ranks, targets, scaling=scaling, lora_dropout=lora_dropout)


def dealt_out(
    shapes: Shapes,
    among: Sequence[str],
    capacity: Callable[[int], Capacity],
    wanted: int,
    *,
    targets: Sequence[str] | None,
) -> dict[str, int]:
    """Deals out ranks, or experts, over blocks as evenly as can be, so that their parameters come nearest to a number.

    Blocks have the same count, except that the first ones have one more where that comes nearer. The parameters are off
    by at most half of what one more costs; the count never falls below one.

    Args:
        shapes: of the layers with an adapter.
        among: the blocks that get some; all others get none.
        capacity: turns a rank, or a number of experts, into a capacity.
        wanted: the number of parameters.
        targets: names of the linear layers with an adapter, for the message.

    Returns:
        The counts by block, 0 for a block that gets none.

    Raises:
        ValueError: none of the layers is inside a block.
    """

    def dealt(budget: int) -> dict[str, int]:
        counts = to_rank([1.0] * len(among), budget)
        return dict.fromkeys(shapes, 0) | dict(zip(among, counts, strict=True))

    def size(budget: int) -> int:
        return num_parameters(shapes, {block: capacity(count) for block, count in dealt(budget).items()})

    low = high = len(among)
    if not size(low):
        raise ValueError(
            f"method.target_modules={list(targets or ())} names only layers outside the blocks, over which "
            "capacity is dealt out; name a layer of the blocks, too"
        )
    while size(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    return dealt(min((low, high), key=lambda budget: abs(size(budget) - wanted)))


def _of_rank(rank: int) -> Capacity:
    return Capacity(1, rank)


def _of_layers(
    base: nn.Module,
    allocation: Allocation,
    targets: Sequence[str] | None,
    capacity: Callable[[int], Capacity],
    each: int,
    wanted: int | None,
) -> dict[str, int]:
    """Gives every block its rank or experts: `each` to one that is trained, or more, up to `wanted` parameters."""
    check_blocks(allocation.units, list(blocks(base)), value="value")
    trained = trained_blocks(allocation)
    if wanted is None:
        return {block: each if block in trained else 0 for block in allocation.units}
    _refuse_outside(base, targets or ())
    return dealt_out(adapted_shapes(base, targets), trained, capacity, wanted, targets=targets)


def _refuse_outside(base: nn.Module, targets: Sequence[str]) -> None:
    """Refuses targets outside the blocks, whose parameters nothing would make up for."""
    endings, inside = tuple(f".{target}" for target in targets), tuple(f"{block}." for block in blocks(base))
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and f".{name}".endswith(endings) and not name.startswith(inside):
            raise ValueError(
                f"method.equal_parameters=true deals out the parameters of the blocks, and method.target_modules names "
                f"{name}, which is outside them; leave that out, or use method.equal_parameters=false"
            )


def _refuse_beside(allocation: Allocation, **given: Any) -> None:
    """Refuses settings that only an allocation of layers leaves open."""
    for name, value in given.items():
        if value not in (None, False):
            shown = "true" if value is True else value
            raise ValueError(
                f"method.{name}={shown} is for allocator=layers, and this allocation of {allocation.kind} says itself "
                f"what every block gets; leave method.{name} out, or use allocator=layers"
            )
