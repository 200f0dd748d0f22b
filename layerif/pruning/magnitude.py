"""Magnitude pruning removes the smallest weights of each matrix. It needs calibration windows only for swaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerif.pruning.mask import check_target, lowest, lowest_at_counts, lowest_per_group, num_removed
from layerif.pruning.swaps import MaskPruner


def magnitude_mask(
    weight: Tensor, sparsity: float | None = None, *, n: int | None = None, m: int | None = None
) -> Tensor:
    """Marks the weights to remove: the smallest |W_ij| of the matrix, or all but the n largest of every m.

    Args:
        weight: the weight (O×I).
        sparsity: the fraction of the weights to remove; None where n and m are given.
        n: the number of weights to keep of every m consecutive inputs.
        m: the size of such a group.

    Returns:
        A mask (O×I), true where a weight is to be removed.
    """
    check_target(sparsity, n, m)
    metric_OI = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
    if n is not None and m is not None:
        return lowest_per_group(metric_OI, n, m)
    assert sparsity is not None
    return lowest(metric_OI, num_removed(sparsity, weight.numel()))


@dataclass(frozen=True, kw_only=True)
class Magnitude(MaskPruner):
    """Prunes by |W_ij|, see `magnitude_mask`. It reads inputs only for its swaps."""

    @property
    def needs_inputs(self) -> bool:
        return self.swaps

    def mask(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        return magnitude_mask(weight, sparsity, n=n, m=self.m if n else None)

    def masks_at(self, weight: Tensor, shared: Any, counts: Sequence[int]) -> Iterator[Tensor]:
        metric_OI = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
        return lowest_at_counts(metric_OI, counts)
