"""The base of every kind of fine-tuning: the settings they have in common, and what the module asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Lt
from torch import Tensor, nn

from layerif.allocate.allocation import Allocation
from layerif.checks import NonNegative, Positive, Seed, Whole, check_fields, did_you_mean
from layerif.scores import AllocationKind


@dataclass(frozen=True, kw_only=True)
class Tuning(ABC):
    """Settings that every kind of fine-tuning has, and the way a model is made ready for it, kept and written.

    Attributes:
        learning_rate, weight_decay: of AdamW.
        warmup_ratio: the share of the optimiser's steps over which the learning rate rises linearly. It falls linearly
            to zero afterwards.
        warmup_steps: the number of these steps, in place of the ratio.
        gradient_checkpointing: keep only the input of each block and run the block again in the backward pass.
        seed: decides the adapter's first weights and the dropout.
    """

    kind: ClassVar[str]  # its name in a checkpoint
    allocates: ClassVar[AllocationKind | tuple[AllocationKind, ...]]  # the kinds of allocation that it spends
    leaves: ClassVar[str]  # the folder that a run writes, below its own

    learning_rate: Positive = 3e-4
    weight_decay: NonNegative = 0.0
    warmup_ratio: Annotated[float, Ge(0), Lt(1), "for steps use method.warmup_steps"] = 0.03
    warmup_steps: Whole | None = None
    gradient_checkpointing: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "method")

    @property
    def is_written(self) -> bool:
        """Tells if a run writes the result."""
        return True

    @abstractmethod
    def put_on(self, base: nn.Module, allocation: Allocation) -> nn.Module:
        """Makes a bare model ready to be trained, in its place.

        Args:
            base: the bare model.
            allocation: of a kind that is spent.

        Returns:
            The model, in which only what is trained asks for gradients.
        """

    @abstractmethod
    def taken_off(self, model: nn.Module) -> nn.Module | None:
        """Gives the bare model back; None where it has to be loaded anew."""

    @abstractmethod
    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the trained weights alone, by name, for a checkpoint."""

    @abstractmethod
    def restore(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Puts the weights that `trained` returned into a model that is ready to be trained."""

    @abstractmethod
    def write(self, model: nn.Module, tokenizer: Any, folder: Path) -> None:
        """Writes the trained model or adapter in the form that its library loads."""

    def penalties(self, model: nn.Module) -> dict[str, tuple[float, Tensor]]:
        """Returns the terms that are added to the loss of the batch just run: by name, the weight and the value."""
        return {}

    def compared(self, base: nn.Module, allocation: Allocation) -> dict[str, int]:
        """Counts the parameters of the model that this one is a baseline of, by that model's name."""
        return {}

    def saved(self) -> dict[str, Any]:
        """Returns the settings in the form that a checkpoint holds; `layerif.adapt.kinds.tuning_of` is the inverse."""
        return {"kind": self.kind, **asdict(self)}


def trained_blocks(allocation: Allocation) -> list[str]:
    """Gives the names of the blocks that an allocation of layers trains.

    Raises:
        ValueError: there is none.
    """
    found = [block for block, value in allocation.by_name().items() if value]
    if not found:
        raise ValueError(
            f"the allocation trains none of {len(allocation.units)} layers; give at least one of them the value 1"
        )
    return found


def check_blocks(given: Sequence[str], known: Sequence[str], *, value: str) -> None:
    """Refuses values of blocks unless they name every block of the model and no other.

    Args:
        given: the names that have a value.
        known: the blocks of the model.
        value: what they have, for the message.
    """
    for block in given:
        if block not in known:
            raise ValueError(
                f"{block!r} has a {value} but is not a block of this model{did_you_mean(block, known)}; its blocks are "
                f"{known[0]} to {known[-1]}"
            )
    if missing := [block for block in known if block not in given]:
        raise ValueError(
            f"{len(missing)} of {len(known)} blocks have no {value}, the first is {missing[0]!r}; give each one"
        )
