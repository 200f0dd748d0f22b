"""Masks of the lowest entries of a metric, in a whole matrix, in every row or in every group of m.

A mask is true where a weight is to be removed. Counts are exact, also among equal entries. Letters in shape suffixes:
O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


def lowest(metric_OI: Tensor, count: int) -> Tensor:
    """Marks the `count` lowest entries of a matrix; among equal ones the first."""
    flat = metric_OI.flatten()
    if count == 0:
        return torch.zeros_like(metric_OI, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    mask[(flat == threshold).nonzero()[: count - int(mask.sum()), 0]] = True
    return mask.view_as(metric_OI)


def lowest_per_row(metric_OI: Tensor, count: int) -> Tensor:
    """Marks the lowest entries of every row, `count` in all.

    Each row gets ⌊count/O⌋; the rows whose next entry is lowest get one of the rest each.
    """
    num_rows = len(metric_OI)
    each, rest = divmod(count, num_rows)
    mask = torch.zeros_like(metric_OI, dtype=torch.bool)
    if count == 0:
        return mask
    values, indices = metric_OI.topk(each + (rest > 0), dim=1, largest=False, sorted=False)
    mask.scatter_(1, indices, True)
    if rest:
        highest, where = values.max(dim=1, keepdim=True)
        spared = highest[:, 0].topk(num_rows - rest).indices
        mask[spared, indices.gather(1, where)[spared, 0]] = False
    return mask


def lowest_at_counts(metric_OI: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """Yields the masks of `lowest` for several counts, of one sorting."""
    ascending = _sorted(metric_OI.flatten())
    for count in counts:
        if count == 0:
            yield torch.zeros_like(metric_OI, dtype=torch.bool)
            continue
        flat, threshold = metric_OI.flatten(), ascending[count - 1]
        mask = flat < threshold
        mask[(flat == threshold).nonzero()[: count - int(mask.sum()), 0]] = True
        yield mask.view_as(metric_OI)


def lowest_per_row_at_counts(metric_OI: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """Yields the masks of `lowest_per_row` for several counts, of one sorting; equal entries may change places."""
    num_rows, width = metric_OI.shape
    ascending_OI = _sorted(metric_OI)
    for count in counts:
        each, rest = divmod(count, num_rows)
        counted_O = torch.full((num_rows,), each, device=metric_OI.device)
        if rest:
            counted_O[ascending_OI[:, each].topk(rest, largest=False).indices] += 1
        threshold_O1 = ascending_OI.gather(1, (counted_O - 1).clamp(min=0)[:, None])
        next_O1 = ascending_OI.gather(1, counted_O.clamp(max=width - 1)[:, None])
        mask = metric_OI <= threshold_O1.masked_fill(counted_O[:, None] == 0, -math.inf)
        tied = ((threshold_O1 == next_O1)[:, 0] & (counted_O > 0) & (counted_O < width)).nonzero()[:, 0]
        if len(tied):
            below, is_equal = metric_OI[tied] < threshold_O1[tied], metric_OI[tied] == threshold_O1[tied]
            missing_O1 = (counted_O[tied] - below.sum(1))[:, None]
            mask[tied] = below | (is_equal & (is_equal.cumsum(1) <= missing_O1))
        yield mask


def _sorted(values: Tensor) -> Tensor:
    """Sorts the last axis, ascending. On a CPU numpy is several times as fast as torch."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.sort(values.detach().contiguous().numpy(), axis=-1))
    return values.sort(dim=-1).values


def lowest_per_group(metric_OI: Tensor, n: int, m: int) -> Tensor:
    """Marks all but the `n` highest of every `m` consecutive entries of a row."""
    num_rows, width = metric_OI.shape
    check_width(width, m)
    groups = metric_OI.reshape(num_rows, width // m, m)
    indices = groups.topk(m - n, dim=2, largest=False, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, indices, True).view(num_rows, width)


def check_target(sparsity: float | None, n: int | None, m: int | None) -> None:
    """Refuses a call that asks neither for a sparsity in [0, 1] nor for n of m, or for two different sparsities."""
    if (n is None) != (m is None) or (n is None and sparsity is None):
        raise ValueError(f"give a sparsity, or n and m; got sparsity={sparsity}, n={n}, m={m}")
    if n is not None and m is not None:
        if not 0 <= n <= m or m < 1:
            raise ValueError(f"n={n} of every m={m} weights cannot be kept; use 0 <= n <= m")
        if sparsity is not None and not math.isclose(sparsity, 1 - n / m, abs_tol=1e-9):
            raise ValueError(f"sparsity={sparsity} is not the {1 - n / m} of {n}:{m}; leave the sparsity out")
    elif sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} is not allowed; allowed: a number from 0 to 1, the share to remove")


def check_width(width: int, m: int, name: str = "a matrix") -> None:
    """Refuses a number of inputs that m does not divide."""
    if width % m:
        raise ValueError(f"{name} with {width} inputs cannot be cut into groups of m={m}; use an m that divides it")


def num_removed(sparsity: float, numel: int) -> int:
    """Rounds sparsity·numel to a whole number of weights, half up."""
    return math.floor(sparsity * numel + 0.5)


def counts(sparsities: Mapping[str, float], numel: Mapping[str, int]) -> dict[str, int]:
    """Returns the number of weights that each matrix loses.

    It is within one of sparsity·numel for each matrix, and within a half of the sum for all of them together, because
    the remainder of rounding is carried to the next matrix.
    """
    total, given, found = Fraction(0), 0, {}
    for name, sparsity in sparsities.items():
        total += Fraction(sparsity) * numel[name]
        found[name] = math.floor(total + Fraction(1, 2)) - given
        given += found[name]
    return found


def kept_of_m(sparsities: Mapping[str, float], numel: Mapping[str, int], m: int) -> dict[str, int]:
    """Returns per block the number of weights to keep of every `m`, as near to the sparsities ρ_l as possible.

    A block loses ⌊m·ρ_l⌋ of every m. Then the blocks with the largest fractions lose one more, as long as that brings
    the parameter-weighted mean nearer to that of the sparsities. At least one of m stays.
    """
    removed = {name: min(m - 1, math.floor(m * sparsity + 1e-9)) for name, sparsity in sparsities.items()}
    missing = math.fsum((m * sparsities[name] - removed[name]) * numel[name] for name in sparsities)
    for name in sorted(sparsities, key=lambda name: removed[name] - m * sparsities[name]):
        if removed[name] < m - 1 and missing > numel[name] / 2:
            removed[name] += 1
            missing -= numel[name]
    return {name: m - removed[name] for name in sparsities}
