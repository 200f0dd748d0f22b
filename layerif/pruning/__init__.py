"""Pruning: the choice of the weights to remove, and the walk over the blocks that makes it from their inputs.

A pruner is a frozen keyword-only dataclass whose fields are its settings (see `Pruner`). To add one, write
`layerif/pruning/x.py`, with the formula as a pure function of tensors and the dataclass, and `conf/pruner/x.yaml`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor

from layerif.checks import Count, Share, check_fields


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """The part of a pruner that the walk over the blocks uses.

    Without n and m any weights may be removed. m without n gives every block an n of its own, from its sparsity.

    Args:
        n: the number of weights kept of every m consecutive inputs of an output.
        m: the size of a group of inputs.
        paper_epsilon: the range of sparsities over the layers that LayerIF's paper used with this pruner. Nothing here
            reads it: experiments of the paper take it as `allocator.epsilon`.
    """

    n: Count | None = None
    m: Annotated[int, Ge(2), "for example 4 or 8"] | None = None
    paper_epsilon: Share = 0.1

    def __post_init__(self) -> None:
        check_fields(self, "pruner")
        if self.n is not None and self.m is None:
            raise ValueError(f"pruner.n={self.n} needs pruner.m: n of every m weights are kept, for example n=2 m=4")
        if self.n is not None and self.m is not None and self.n >= self.m:
            raise ValueError(f"pruner.n={self.n} must be below pruner.m={self.m}: n of every m weights are kept")

    @property
    def needs_inputs(self) -> bool:
        """True where the pruner reads the inputs of the layers, and so calibration windows."""
        return True

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

    @abstractmethod
    def __call__(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        """Returns the pruned weight.

        Args:
            weight: the weight (outputs × inputs).
            shared: the result of `prepare`; None where the pruner needs no inputs.
            sparsity: the fraction of the weights to remove; None where n is given.
            n: the number of weights to keep of every m.
        """
