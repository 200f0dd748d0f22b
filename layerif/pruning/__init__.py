"""Pruning: the choice of the weights to remove, and the walk over the blocks that makes it from their inputs.

A pruner is a frozen keyword-only dataclass whose fields are its settings (see `Pruner`). To add one, write
`layerif/pruning/x.py`, with the formula as a pure function of tensors and the dataclass, and `conf/pruner/x.yaml`.
"""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from torch import Tensor

from layerif.checks import Count, Share, check_choice, check_fields
from layerif.files import conf_folder
from layerif.scores import AllocationKind


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """The part of a pruner that the walk over the blocks uses.

    Without n and m any weights may be removed. m without n gives every block an n of its own, from its sparsity.

    Args:
        n: the number of weights kept of every m consecutive inputs of an output.
        m: the size of a group of inputs.
        skip: the matrices that stay dense, by name: of a matrix, of its end (`down_proj`) or of a block. Budgets do not
            count them.
        skip_unsupported: leave experts in a layout that is not known as they are, and prune the rest.
        paper_epsilon: the range of sparsities over the layers that LayerIF's paper used with this pruner. Nothing here
            reads it: experiments of the paper take it as `allocator.epsilon`.
    """

    inverts: ClassVar[bool] = False  # the Hessian of a layer, which takes as many tokens as the layer has inputs

    n: Count | None = None
    m: Annotated[int, Ge(2), "for example 4 or 8"] | None = None
    skip: Sequence[str] = ()
    skip_unsupported: bool = False
    paper_epsilon: Share = 0.1

    def __post_init__(self) -> None:
        check_fields(self, "pruner")
        if self.n is not None and self.m is None:
            raise ValueError(f"pruner.n={self.n} needs pruner.m: n of every m weights are kept, for example n=2 m=4")
        if self.n is not None and self.m is not None and self.n >= self.m:
            raise ValueError(f"pruner.n={self.n} must be below pruner.m={self.m}: n of every m weights are kept")

    @property
    def kind(self) -> AllocationKind:
        """The meaning of a level."""
        return "sparsity"

    @property
    def needs_inputs(self) -> bool:
        """Tells if the choice of weights looks at the inputs of a layer."""
        return True

    @property
    def observes_gram(self) -> bool:
        """Tells if the statistic of a layer is the Gram matrix of its inputs, which takes the most memory."""
        return False

    def observe(self, so_far: Tensor | None, input_TI: Tensor) -> Tensor:
        """Adds the inputs of T tokens to the statistic of a linear layer, in place where there is one.

        It is not called where `needs_inputs` is False, and defined by every pruner where it can be True.
        """
        raise NotImplementedError

    def prepare(self, statistic: Tensor, num_windows: int, *, name: str) -> Any:
        """Returns what the matrices with the same inputs share.

        Args:
            statistic: the sum over the tokens of all calibration windows.
            num_windows: the number of windows.
            name: the name of the first of these matrices, for messages.
        """
        return statistic

    def check_tokens(self, num_tokens: int, num_inputs: Mapping[str, int]) -> None:
        """Warns where the pruner inverts a matrix that so few calibration tokens leave singular.

        Args:
            num_tokens: of all calibration windows.
            num_inputs: of each linear layer, by its name.
        """
        widest = max(num_inputs, key=num_inputs.__getitem__)
        if self.inverts and num_tokens < num_inputs[widest]:
            warnings.warn(
                f"{type(self).__name__} has {num_tokens} calibration tokens for the {num_inputs[widest]} inputs of "
                f"{widest}, so that its Hessian is singular and pruner.damping decides about the rest; give more or "
                "longer calibration windows",
                RuntimeWarning,
                stacklevel=2,
            )

    @abstractmethod
    def __call__(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        """Returns the pruned weight.

        Args:
            weight: the weight (outputs × inputs).
            shared: the result of `prepare`; None where the pruner needs no inputs.
            sparsity: the fraction of the weights to remove; None where n is given.
            n: the number of weights to keep of every m.
        """

    def at_levels(self, weight: Tensor, shared: Any, sparsities: Sequence[float]) -> Iterator[Tensor]:
        """Yields the weight as pruned from scratch to each sparsity; with m, to the n of m that each one means."""
        for sparsity in sparsities:
            if self.m is None:
                yield self(weight, shared, sparsity, None)
            else:
                yield self(weight, shared, None, round(self.m * (1 - sparsity)))

    def changes_at(self, weight: Tensor, shared: Any, sparsities: Sequence[float]) -> Iterator[Tensor]:
        """Yields what `at_levels` changes in the weight."""
        yield from (pruned - weight for pruned in self.at_levels(weight, shared, sparsities))

    def levels(self) -> tuple[float, ...]:
        """Gives the sparsities that a pruner with m can reach; empty where it can reach any."""
        if self.m is None:
            return ()
        kept = range(self.m - 1, 0, -1) if self.n is None else (self.n,)
        return tuple(1 - n / self.m for n in kept)

    @property
    def called(self) -> str:
        """The name of its file, with the settings that its masks depend on: `wanda(compare=row)`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        unseen = {"paper_epsilon", "skip", "skip_unsupported", "n"}
        unseen |= set() if values.get("swaps") else {"swaps", "most_swaps"}
        shown = {name: value for name, value in values.items() if name not in unseen}
        inside = ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)
        return f"{name_of_pruner(self)}({inside})"


def name_of_pruner(pruner: Pruner) -> str:
    """Gives the name of a pruner's file, as `pruner=` takes it."""
    return type(pruner).__module__.rpartition(".")[2]


def pruner_called(name: str, **settings: Any) -> Pruner:
    """Makes the pruner of a name, with its default settings but for those that are given.

    Raises:
        ValueError: there is no such pruner.
    """
    check_choice("pruner", name, sorted(file.stem for file in (conf_folder() / "pruner").glob("*.yaml")))
    module = importlib.import_module(f"layerif.pruning.{name}")
    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    return next(each for each in own if is_dataclass(each) and issubclass(each, Pruner))(**settings)
