"""The base of every kind of fine-tuning: the settings they have in common, and what the module asks of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Lt
from torch import Tensor, nn

from layerif.adapt.data import TaskDataModule
from layerif.adapt.protect import Protection
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
    def check_fits(self, skeleton: nn.Module, allocation: Allocation, *, free: float = math.inf) -> None:
        """Refuses what cannot be trained like this, before any pass over the data.

        Args:
            skeleton: the bare model on the meta device; it is changed.
            allocation: of a kind that is spent.
            free: bytes of memory that the training may take.

        Raises:
            ValueError: names the setting; the training does not fit into the memory that is free, or the kind of tuning
                cannot do it with this model.
        """

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

    def check_start(self, skeleton: nn.Module, allocation: Allocation, rows: TaskDataModule) -> None:
        """Refuses train rows that the first weights cannot be taken from, before any work."""
        del skeleton, allocation, rows

    def started(self, model: nn.Module, allocation: Allocation, rows: TaskDataModule) -> nn.Module:
        """Gives a model that is ready to be trained its first weights, where they come from train rows.

        A run that resumes has its weights from the checkpoint instead.
        """
        del allocation, rows
        return model

    def scheduled(self, model: nn.Module, num_steps: int) -> None:
        """Says how many steps of the optimiser the training has, before the first."""
        del model, num_steps

    def stepped(self, model: nn.Module, step: int) -> None:
        """Follows a step of the optimiser, while its gradients are still there; the first is 1."""
        del model, step

    def finished(self, model: nn.Module) -> dict[str, int]:
        """Ends the training, and returns the rank of each matrix where the training has chosen ranks by itself."""
        del model
        return {}

    def penalties(self, model: nn.Module) -> dict[str, tuple[float, Tensor]]:
        """Returns the terms that are added to the loss of the batch just run: by name, the weight and the value."""
        return {}

    def protection(self, model: nn.Module) -> Protection | None:
        """Makes what keeps weights near their pretrained values; None where nothing does.

        Args:
            model: as `put_on` returns it.
        """
        return None

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
    _check_all(given, known, "a block of this model", "blocks", value)


def check_matrices(given: Sequence[str], known: Sequence[str], *, value: str) -> None:
    """Refuses values of matrices unless they name every linear layer with an adapter and no other.

    Args:
        given: the names that have a value.
        known: the linear layers of the blocks that get an adapter.
        value: what they have, for the message.
    """
    what = "a linear layer that method.target_modules gives an adapter"
    _check_all(given, known, what, "linear layers with an adapter", value)


def _check_all(given: Sequence[str], known: Sequence[str], what: str, several: str, value: str) -> None:
    allowed, named = set(known), set(given)
    for unit in given:
        if unit not in allowed:
            raise ValueError(
                f"{unit!r} has a {value} but is not {what}{did_you_mean(unit, known)}; its {several} are "
                f"{known[0]} to {known[-1]}"
            )
    if missing := [unit for unit in known if unit not in named]:
        raise ValueError(
            f"{len(missing)} of {len(known)} {several} have no {value}, the first is {missing[0]!r}; give each one"
        )
