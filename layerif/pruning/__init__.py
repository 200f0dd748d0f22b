"""Pruning: which weights go, and the walk over the blocks that decides it from their inputs.

Every pruner is a frozen keyword-only dataclass whose fields are its configuration (see `Pruner`). To add one: write
`layerif/prune/x.py` (the formula as a pure function of tensors, and the dataclass) and `conf/pruner/x.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """What the walk knows of a pruner.

    n, m: of every m consecutive inputs of an output, n are kept. m without n: every block gets an n of its own, from
    its allocated sparsity. Neither: any weights may go.
    """

    needs_inputs: ClassVar[bool] = True

    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        if self.n is not None and self.m is None:
            raise ValueError(f"pruner.n={self.n} needs pruner.m: n of every m weights are kept, for example n=2 m=4")
        if self.m is not None and self.m < 2:
            raise ValueError(f"pruner.m={self.m} must be at least 2, for example 4 or 8")
        if self.n is not None and self.m is not None and not 0 < self.n < self.m:
            raise ValueError(f"pruner.n={self.n} must lie in 1 to pruner.m-1={self.m - 1}: n of every m are kept")

    def observe(self, so_far: Tensor | None, input_TI: Tensor) -> Tensor:
        """Add T tokens' inputs of a linear layer to the statistic; in place where there is one."""
        raise NotImplementedError

    def prepare(self, statistic: Tensor, num_samples: int, *, name: str) -> Any:
        """What the matrices with these inputs share, from the statistic of all samples; name: of the first of them."""
        return statistic

    def __call__(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        """The pruned weight: `sparsity` of it removed, or all but n of every m. shared: what `prepare` gave."""
        raise NotImplementedError
