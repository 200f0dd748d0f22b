"""Wanda (Sun et al., ICLR 2024): weights by the size of what they add to the output, |W_ij|·‖X_j‖₂.

Letters in shape suffixes: O outputs and I inputs of a linear layer, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from layerif.checks import check_choice
from layerif.pruning import Pruner
from layerif.pruning.mask import check_target, lowest, lowest_per_group, lowest_per_row, num_removed

Compare = Literal["row", "cumulative"]


def wanda_mask(
    weight: Tensor,
    input_sq_norm: Tensor,
    sparsity: float | None = None,
    *,
    n: int | None = None,
    m: int | None = None,
    compare: Compare = "row",
) -> Tensor:
    """True where a weight (O×I) is to be removed; input_sq_norm: ‖X_j‖² (I), in any unit.

    row: the lowest fraction of every output row.
    cumulative (the Wanda paper's variant): a row loses its lowest weights up to a share α of the row's sum of the
        metric, with one α for the matrix. Here α is met exactly: the weights with the smallest running share go.
    Both remove round(sparsity·O·I) weights; what does not divide by rows goes to the rows whose next weight is lowest.
    With n and m all but n of every m consecutive inputs of a row go.
    """
    check_target(sparsity, n, m)
    check_choice("pruner.compare", compare, get_args(Compare))
    if input_sq_norm.shape != weight.shape[1:]:
        raise ValueError(
            f"input_sq_norm must have one entry for each of the weight's {weight.shape[1]} inputs, got "
            f"shape {tuple(input_sq_norm.shape)}"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    metric_OI = weight.to(dtype).abs() * input_sq_norm.to(dtype).sqrt()
    if n is not None and m is not None:
        return lowest_per_group(metric_OI, n, m)
    assert sparsity is not None
    count = num_removed(sparsity, weight.numel())
    if compare == "row":
        return lowest_per_row(metric_OI, count)
    ascending_OI, order_OI = metric_OI.double().sort(dim=1)
    share_OI = ascending_OI.cumsum(dim=1) / ascending_OI.sum(dim=1, keepdim=True).clamp(min=1e-300)
    return lowest(torch.empty_like(share_OI).scatter_(1, order_OI, share_OI), count)


@dataclass(frozen=True, kw_only=True)
class Wanda(Pruner):
    """By `wanda_mask`. compare: within a `row`, or by the `cumulative` share of the row's metric."""

    compare: Compare = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pruner.compare", self.compare, get_args(Compare))
        if self.compare == "cumulative" and self.m is not None:
            raise ValueError(f"pruner.compare=cumulative has no meaning with pruner.m={self.m}; use compare=row")

    def observe(self, so_far: Tensor | None, input_TI: Tensor) -> Tensor:
        dtype = torch.promote_types(input_TI.dtype, torch.float32)
        added_I = input_TI.to(dtype).square().sum(dim=0)
        return added_I if so_far is None else so_far.add_(added_I)

    def __call__(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        mask = wanda_mask(weight, shared, sparsity, n=n, m=self.m if n else None, compare=self.compare)
        return weight.masked_fill(mask, 0)
