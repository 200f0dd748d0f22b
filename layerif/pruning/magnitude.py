"""Magnitude pruning: the smallest weights of each matrix go. No calibration text is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerif.pruning import Pruner
from layerif.pruning.mask import check_target, lowest, lowest_per_group, num_removed


def magnitude_mask(
    weight: Tensor, sparsity: float | None = None, *, n: int | None = None, m: int | None = None
) -> Tensor:
    """True where a weight (O×I) is to be removed: the smallest |W_ij| of the matrix, or all but n of every m."""
    check_target(sparsity, n, m)
    metric_OI = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
    if n is not None and m is not None:
        return lowest_per_group(metric_OI, n, m)
    assert sparsity is not None
    return lowest(metric_OI, num_removed(sparsity, weight.numel()))


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner):
    """|W_ij|, by `magnitude_mask`."""

    needs_inputs: ClassVar[bool] = False

    def __call__(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        return weight.masked_fill(magnitude_mask(weight, sparsity, n=n, m=self.m if n else None), 0)
