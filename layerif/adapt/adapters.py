"""Kinds of adapters: LoRA-MoE, LoRA with a rank per block or matrix, and LoRA as large as a LoRA-MoE.

A kind is a dataclass. Its fields are the settings of the method of the same name, and its methods turn an allocation
into an adapter of PEFT. Where an allocation leaves a block or a matrix out, it gets no adapter.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from layerif.adapt.data import TaskDataModule
from layerif.adapt.directions import Init
from layerif.adapt.initial import (
    GRADIENT_ROWS,
    Initial,
    check_initial,
    ranks_of,
    restore_weights,
    start_eva,
    start_lora_ga,
    taken_out,
    trained_weights,
    write_adapter,
)
from layerif.adapt.sizes import (
    Capacity,
    Shapes,
    adapted_shapes,
    check_memory,
    names_of,
    num_parameters,
    too_large_rank,
)
from layerif.adapt.tuning import Tuning, check_blocks, check_matrices, trained_blocks
from layerif.allocate.allocation import Allocation
from layerif.allocate.rank import to_rank
from layerif.checks import Count, NonNegative, Positive, did_you_mean
from layerif.layers import within_block
from layerif.models.blocks import blocks
from layerif.models.quantised import note_quantisation
from layerif.models.stored import expert_tensors
from layerif.moe import LoraMoeConfig, balance_loss
from layerif.moe.lora import lora_of_ranks, lora_targets, modules_of
from layerif.moe.model import linears_of_blocks
from layerif.scores import AllocationKind

Scaling = Annotated[float, Gt(0), "it is α/r; the paper uses 16/8"]
Dropout = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class Adapter(Tuning):
    """Settings that every kind of adapter has.

    Attributes:
        lora_dropout: dropout on the adapter's input.
        target_modules: names of the linear layers that get an adapter; None: every linear layer of the blocks.
    """

    leaves: ClassVar[str] = "adapter"
    of_layers: ClassVar[tuple[str, ...]] = ()  # the settings that only an allocation of layers leaves open

    lora_dropout: Dropout = 0.05
    target_modules: list[str] | None = None

    @abstractmethod
    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        """Returns the configuration of the adapter.

        Args:
            base: the bare model, or its skeleton.
            allocation: of a kind that this adapter spends.
        """

    def targets(self, base: nn.Module) -> list[str] | None:
        """Returns the names of the linear layers that get an adapter; None: all that can be adapted."""
        return self.target_modules

    @abstractmethod
    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        """Returns the experts and their rank by block or matrix, for `peft_config` of the same arguments."""

    def check_fits(
        self,
        skeleton: nn.Module,
        allocation: Allocation,
        *,
        free: float = math.inf,
        where: str = "method",
        budget: str = "allocator.budget",
    ) -> None:
        """Refuses what cannot be trained like this, see `Tuning.check_fits`.

        PEFT itself leaves out a target that names nothing in silence.

        Args:
            skeleton: the bare model on the meta device; the adapter stays on it.
            allocation: of a kind that is spent.
            free: bytes of memory that the training may take.
            where: what the adapter's settings are called on the command line, before the dot.
            budget: the setting of the budget that is spent.
        """
        self._refuse_beside(allocation, where)
        known = [name for name, _ in skeleton.named_modules()]
        for target in self.target_modules or ():
            if not any(name == target or name.endswith(f".{target}") for name in known):
                linears = linears_of_blocks(skeleton)
                near = did_you_mean(target, [*linears, *(name.rpartition(".")[2] for name in linears)])
                raise ValueError(
                    f"{where}.target_modules holds {target!r}, which is not a layer of this model{near}; its blocks "
                    f"have {', '.join(linears)} (null: all of them)"
                )
        shapes, capacities = adapted_shapes(skeleton, self.targets(skeleton)), self.capacities(skeleton, allocation)
        rank = getattr(self, "r", None)
        larger_by = [budget] if allocation.kind != "layers" else [f"{where}.num_experts"] * hasattr(self, "num_experts")
        if rank is not None or allocation.kind == "layers":
            larger_by = [f"{where}.r", *larger_by]
        fewer = f"or name fewer layers in {where}.target_modules"
        if too_large := too_large_rank(shapes, capacities):
            is_given = {each.rank for each in capacities.values()} == {rank}
            raise ValueError(f"{too_large}; lower {' or '.join(larger_by[:1] if is_given else larger_by)}, {fewer}")
        advice = f"lower {' or '.join(larger_by)}, {fewer}"
        check_memory(num_parameters(shapes, capacities), free, advice=advice)
        with torch.device("meta"):
            get_peft_model(skeleton, self.peft_config(skeleton, allocation))  # type: ignore[arg-type]

    def put_on(self, base: nn.Module, allocation: Allocation) -> nn.Module:
        config = self.peft_config(base, allocation)
        shapes = adapted_shapes(base, self.targets(base))
        if note := self.left_alone(base):
            warnings.warn(note, RuntimeWarning, stacklevel=2)
        if too_large := too_large_rank(shapes, self.capacities(base, allocation)):
            # Equal scores asked for less, so this is what these scores ask for: a waste and no error.
            warnings.warn(f"{too_large}; what the scores give it beyond that is wasted", RuntimeWarning, stacklevel=2)
        return get_peft_model(base, config)  # type: ignore[arg-type]

    def left_alone(self, base: nn.Module) -> str | None:
        """Says that fused experts get no adapter; None where there are none or they get one."""
        if getattr(self, "experts", False) or not expert_tensors(base):
            return None
        advice = "; method.experts=true adapts them, too" if hasattr(self, "experts") else ""
        return f"{self.kind} adapts linear layers and leaves the fused experts of every block alone{advice}"

    def taken_off(self, model: nn.Module) -> nn.Module | None:
        return model.unload()  # type: ignore[operator]

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        return get_peft_model_state_dict(model)

    def restore(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        set_peft_model_state_dict(model, dict(weights))

    def write(self, model: nn.Module, tokenizer: Any, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
        note_quantisation(model, folder)

    def _refuse_beside(self, allocation: Allocation, where: str = "method") -> None:
        """Refuses settings that only an allocation of layers leaves open."""
        for name in () if allocation.kind == "layers" else self.of_layers:
            value = getattr(self, name)
            if value not in (None, False):
                shown = "true" if value is True else value
                raise ValueError(
                    f"{where}.{name}={shown} is for allocator=layers, and this allocation of {allocation.kind} says "
                    f"itself what every block gets; leave {where}.{name} out"
                )


@dataclass(frozen=True, kw_only=True)
class LayersAdapter(Adapter):
    """Settings of a kind of adapter that also spends an allocation of layers, which are all alike.

    Attributes:
        equal_parameters: where the allocation is of layers, deal out more ranks, or experts, to the blocks that are
            trained, until they have the parameters that all blocks would have.
    """

    equal_parameters: bool = False

    @property
    @abstractmethod
    def per_block(self) -> int:
        """The rank, or the experts, of a block that is trained."""

    @abstractmethod
    def capacity(self, count: int) -> Capacity:
        """Turns a rank, or a number of experts, into a capacity."""

    def counts(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        """Returns the rank, or the experts, of each block or matrix; 0 for one that gets no adapter."""
        self._refuse_beside(allocation)
        if allocation.kind != "layers":
            return counts_of_units(base, allocation, self.targets(base))
        check_blocks(allocation.units, list(blocks(base)), value="value")
        trained, targets = trained_blocks(allocation), self.targets(base)
        if not self.equal_parameters:
            return {block: self.per_block if block in trained else 0 for block in allocation.units}
        _refuse_outside(
            base, self.target_modules or (), "method.equal_parameters=true", "method.equal_parameters=false"
        )
        shapes = adapted_shapes(base, targets)
        return dealt_out(shapes, trained, self.capacity, self._of_all(shapes), targets=targets)

    def compared(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        return {"all_layers": self._of_all(adapted_shapes(base, self.targets(base)))} if self.equal_parameters else {}

    def _of_all(self, shapes: Shapes) -> int:
        return num_parameters(shapes, dict.fromkeys(shapes, self.capacity(self.per_block)))


@dataclass(frozen=True, kw_only=True)
class LoraMoeAdapter(LayersAdapter):
    """A mixture of LoRA experts, with as many experts per block, or matrix, as the allocation says.

    Attributes:
        r, lora_alpha: rank and α of every expert.
        num_experts: the experts of a block that is trained, where the allocation is of layers; None: 5 there.
        top_k: experts that a token takes.
        init: the first weights of the experts, see `layerif.adapt.directions`.
        balance_coefficient: weight of the balance loss.
        keep_zeros: keep weights of the base that are zero at zero, see `LoraMoeConfig`.
    """

    kind: ClassVar[str] = "lora_moe"
    allocates: ClassVar[tuple[AllocationKind, ...]] = ("experts", "layers")
    of_layers: ClassVar[tuple[str, ...]] = ("num_experts", "equal_parameters")

    r: Count = 8
    lora_alpha: Positive = 16
    num_experts: Count | None = None
    top_k: Count = 2
    init: Init = "default"
    balance_coefficient: NonNegative = 0.0
    keep_zeros: bool = False

    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        names = ("r", "lora_alpha", "lora_dropout", "top_k", "target_modules", "balance_coefficient", "keep_zeros")
        settings = {name: getattr(self, name) for name in names}
        experts = self.counts(base, allocation)
        return LoraMoeConfig(
            num_experts={unit: count for unit, count in experts.items() if count},
            exclude_modules=modules_of([unit for unit, count in experts.items() if not count]),
            task_type="CAUSAL_LM",
            **settings,
        )

    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        return {unit: self.capacity(count) for unit, count in self.counts(base, allocation).items()}

    def left_alone(self, base: nn.Module) -> str | None:
        return None  # `LoraMoeModel` says it

    def penalties(self, model: nn.Module) -> dict[str, tuple[float, Tensor]]:
        return {"balance": (self.balance_coefficient, balance_loss(model))} if self.balance_coefficient else {}

    @property
    def per_block(self) -> int:
        return 5 if self.num_experts is None else self.num_experts

    def capacity(self, count: int) -> Capacity:
        return Capacity(count, self.r)


@dataclass(frozen=True, kw_only=True)
class PlainLora(Adapter):
    """PEFT's LoRA with ranks by block or matrix.

    Attributes:
        scaling: α/r, which is the same everywhere, so that a block of a higher rank does not also learn with a larger
            factor (`alpha_pattern` follows `rank_pattern`).
    """

    scaling: Scaling = 2.0

    def targets(self, base: nn.Module) -> list[str] | None:
        return self.target_modules or lora_targets(base)

    def peft_config(self, base: nn.Module, allocation: Allocation) -> PeftConfig:
        return plain_lora(
            base,
            self.ranks(base, allocation),
            scaling=self.scaling,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            experts=getattr(self, "experts", False),
        )

    def capacities(self, base: nn.Module, allocation: Allocation) -> dict[str, Capacity]:
        return {unit: _of_rank(rank) for unit, rank in self.ranks(base, allocation).items()}

    @abstractmethod
    def ranks(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        """Returns the ranks by block or matrix; 0 for one without an adapter."""


@dataclass(frozen=True, kw_only=True)
class LoraAdapter(LayersAdapter, PlainLora):
    """PEFT's LoRA, with the rank in each block, or matrix, that the allocation says.

    Attributes:
        r: the rank of a block that is trained, where the allocation is of layers; None: 8 there.
        init: the first weights: PEFT's `default` (A random, B zero), directions of the mean gradient (`gradient`), or
            those that PEFT takes from train rows (`eva`, `lora_ga`), see `layerif.adapt.initial`.
        rho: the highest rank that EVA gives a matrix, as a multiple of its own; 1 moves no rank.
        experts: also adapt the fused experts, each with the rank of its block. PEFT adds the product of the factors to
            the whole tensor in every forward pass.
    """

    kind: ClassVar[str] = "lora"
    allocates: ClassVar[tuple[AllocationKind, ...]] = ("rank", "layers")
    of_layers: ClassVar[tuple[str, ...]] = ("r", "equal_parameters")

    r: Count | None = None
    init: Initial = "default"
    rho: Annotated[float, Ge(1), "1 moves no rank"] = 2.0
    experts: bool = False

    def targets(self, base: nn.Module) -> list[str] | None:
        found = super().targets(base)
        return [*found, *expert_tensors(base)] if self.experts and found else found

    def check_fits(self, skeleton: nn.Module, allocation: Allocation, **options: Any) -> None:
        if self.experts:
            self._check_experts(skeleton, allocation)
        super().check_fits(skeleton, allocation, **options)

    def _check_experts(self, skeleton: nn.Module, allocation: Allocation) -> None:
        """Refuses settings of adapters on fused experts that PEFT does not have."""
        if not expert_tensors(skeleton):
            raise ValueError("method.experts=true adapts fused experts, and this model has none; use experts=false")
        if self.lora_dropout or self.init != "default":
            raise ValueError(
                f"method.experts=true needs method.lora_dropout=0 and method.init=default, got {self.lora_dropout} and "
                f"{self.init}: PEFT adapts a tensor of experts without dropout and other first weights"
            )
        if any(map(within_block, allocation.units)):
            raise ValueError(
                "method.experts=true gives every expert the rank of its block, and this allocation is by matrix; use "
                "one by block"
            )

    def check_start(self, skeleton: nn.Module, allocation: Allocation, rows: TaskDataModule) -> None:
        shapes, capacities = adapted_shapes(skeleton, self.targets(skeleton)), self.capacities(skeleton, allocation)
        check_initial(self.init, self.rho, shapes, capacities, rows.train)

    def started(self, model: nn.Module, allocation: Allocation, rows: TaskDataModule) -> nn.Module:
        if self.init == "eva":
            start_eva(model, rows.first_rows(), rows.collate, rho=self.rho)
        elif self.init == "lora_ga":
            configured: Any = partial(self.peft_config, allocation=allocation)
            few, size = rows.first_rows(GRADIENT_ROWS), rows.batch_size
            batches = [rows.collate(few[at : at + size]) for at in range(0, len(few), size)]
            return start_lora_ga(model, configured, batches)
        return model

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        return trained_weights(model)

    def restore(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        restore_weights(model, weights, self.init)

    def taken_off(self, model: nn.Module) -> nn.Module | None:
        return None if taken_out(model) else super().taken_off(model)

    def write(self, model: nn.Module, tokenizer: Any, folder: Path) -> None:
        write_adapter(model, folder)
        note_quantisation(model, folder)

    def finished(self, model: nn.Module) -> dict[str, int]:
        return ranks_of(model, self.target_modules) if self.init == "eva" else {}

    @property
    def per_block(self) -> int:
        return 8 if self.r is None else self.r

    def capacity(self, count: int) -> Capacity:
        return _of_rank(count)

    def ranks(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        return self.counts(base, allocation)


@dataclass(frozen=True, kw_only=True)
class EqualLoraAdapter(PlainLora):
    """PEFT's LoRA, as large as the LoRA-MoE that this allocation of experts would make.

    Every block has the same rank, except that the first blocks have one more where that comes nearer to the number of
    trainable parameters of the LoRA-MoE, routers included.

    Attributes:
        r: rank of an expert of that LoRA-MoE.
        init: the first weights, see `layerif.adapt.directions`.
    """

    kind: ClassVar[str] = "lora_equal"
    allocates: ClassVar[AllocationKind] = "experts"

    r: Count = 8
    init: Init = "default"

    def ranks(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        shapes = adapted_shapes(base, self.targets(base))
        return dealt_out(shapes, list(shapes), _of_rank, self._wanted(base, allocation), targets=self.target_modules)

    def compared(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        return {"lora_moe": self._wanted(base, allocation)}

    def _wanted(self, base: nn.Module, allocation: Allocation) -> int:
        experts = counts_of_units(base, allocation, self.target_modules)
        capacities = {unit: Capacity(count, self.r) for unit, count in experts.items()}
        return num_parameters(adapted_shapes(base, self.target_modules), capacities)


def plain_lora(
    base: nn.Module,
    ranks: Mapping[str, int],
    *,
    scaling: float,
    lora_dropout: float,
    target_modules: Sequence[str] | None,
    experts: bool = False,
) -> LoraConfig:
    """Configures PEFT's LoRA with rank r_l and α_l = scaling·r_l in block, or matrix, l.

    Args:
        base: the bare model, or its skeleton.
        ranks: by the name of a block or of a matrix; one of rank 0 gets no adapter.
        scaling: α/r, everywhere the same.
        lora_dropout: dropout on the adapter's input.
        target_modules: None takes all linear layers of the blocks.
        experts: also adapt the fused experts.

    Raises:
        ValueError: a block or matrix is not one of the model's, or has no rank.
    """
    _check_units(base, list(ranks), target_modules, value="rank")
    targets = list(target_modules) if target_modules else lora_targets(base)
    tensors = expert_tensors(base) if experts else ()
    return lora_of_ranks(ranks, targets, scaling=scaling, lora_dropout=lora_dropout, target_parameters=tensors)


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


def counts_of_units(base: nn.Module, allocation: Allocation, targets: Sequence[str] | None) -> dict[str, int]:
    """Gives the counts of an allocation by block or matrix, and refuses those of other ones."""
    value = "rank" if allocation.kind == "rank" else "number of experts"
    _check_units(base, allocation.units, targets, value=value)
    return allocation.by_name()


def _check_units(base: nn.Module, units: Sequence[str], targets: Sequence[str] | None, *, value: str) -> None:
    if any(map(within_block, units)):
        check_matrices(units, names_of(adapted_shapes(base, targets)), value=value)
        _refuse_outside(base, targets or (), "an allocation by matrix", "an allocation by block")
    else:
        check_blocks(units, list(blocks(base)), value=value)


def _refuse_outside(base: nn.Module, targets: Sequence[str], what: str, instead: str) -> None:
    """Refuses targets outside the blocks, whose parameters nothing would make up for."""
    endings, inside = tuple(f".{target}" for target in targets), tuple(f"{block}." for block in blocks(base))
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and f".{name}".endswith(endings) and not name.startswith(inside):
            raise ValueError(
                f"{what} deals out the parameters of the blocks, and method.target_modules names {name}, which is "
                f"outside them; leave that out, or use {instead}"
            )
