"""Wanda (Sun et al., ICLR 2024) removes the weights that add least to the output, by |W_ij|·‖X_j‖₂.

Letters in shape suffixes: O outputs and I inputs of a linear layer, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from layerif.checks import check_choice
from layerif.pruning.mask import (
    check_target,
    lowest,
    lowest_per_group,
    lowest_per_row,
    lowest_per_row_at_counts,
    num_removed,
)
from layerif.pruning.swaps import MaskPruner

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
    """Marks the weights with the lowest |W_ij|·‖X_j‖₂ as those to remove.

    A sparsity removes round(sparsity·O·I) weights. With `row` the lowest fraction of every output row goes, and the
    rows whose next weight is lowest lose the remainder. With `cumulative`, a variant of the paper, each row loses its
    lowest weights up to a share α of the row's sum of the metric, with one α for the matrix; here the weights with the
    smallest running share are removed, so that the sparsity is exact.

    Args:
        weight: the weight (O×I).
        input_sq_norm: ‖X_j‖² (I), in any unit.
        sparsity: the fraction of the weights to remove; None where n and m are given.
        n: the number of weights to keep of every m consecutive inputs of a row.
        m: the size of such a group.
        compare: the way to compare weights of different rows.

    Returns:
        A mask (O×I), true where a weight is to be removed.
    """
    check_target(sparsity, n, m)
    check_choice("pruner.compare", compare, get_args(Compare))
    if input_sq_norm.shape != weight.shape[1:]:
        raise ValueError(
            f"input_sq_norm must have one entry for each of the weight's {weight.shape[1]} inputs, got "
            f"shape {tuple(input_sq_norm.shape)}"
        )
    metric_OI = _metric(weight, input_sq_norm)
    if n is not None and m is not None:
        return lowest_per_group(metric_OI, n, m)
    assert sparsity is not None
    count = num_removed(sparsity, weight.numel())
    if compare == "row":
        return lowest_per_row(metric_OI, count)
    ascending_OI, order_OI = metric_OI.double().sort(dim=1)
    share_OI = ascending_OI.cumsum(dim=1) / ascending_OI.sum(dim=1, keepdim=True).clamp(min=1e-300)
    return lowest(torch.empty_like(share_OI).scatter_(1, order_OI, share_OI), count)


def _metric(weight: Tensor, input_sq_norm: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype).abs() * input_sq_norm.to(dtype).sqrt()


@dataclass(frozen=True, kw_only=True)
class Wanda(MaskPruner):
    """Prunes by `wanda_mask`.

    Args:
        compare: compare weights within a `row`, or by the `cumulative` share of the row's metric.
    """

    compare: Compare = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare == "cumulative" and self.m is not None:
            raise ValueError(f"pruner.compare=cumulative has no meaning with pruner.m={self.m}; use compare=row")

    def observe(self, so_far: Tensor | None, input_TI: Tensor) -> Tensor:
        if self.swaps:
            return super().observe(so_far, input_TI)
        dtype = torch.promote_types(input_TI.dtype, torch.float32)
        added_I = input_TI.to(dtype).square().sum(dim=0)
        return added_I if so_far is None else so_far.add_(added_I)

    def mask(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        input_sq_norm = shared.diagonal() if self.swaps else shared
        return wanda_mask(weight, input_sq_norm, sparsity, n=n, m=self.m if n else None, compare=self.compare)

    def masks_at(self, weight: Tensor, shared: Any, counts: Sequence[int]) -> Iterator[Tensor] | None:
        return None if self.compare != "row" else lowest_per_row_at_counts(_metric(weight, shared), counts)
