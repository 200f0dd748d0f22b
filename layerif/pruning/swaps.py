"""Exact 1-swaps of a mask (SparseSwaps, arXiv 2512.10922) lower the error of a layer's outputs, row by row.

Removing the weights P of a row w changes its output by e = Σ_{j∈P} w_j x_j, where x_j holds input j of all tokens. With
the Gram matrix G_ij = ⟨x_i, x_j⟩ and r_j = ⟨e, x_j⟩, removing the kept k in place of p changes ‖e‖² by

    a_k + b_p − 2·w_k·w_p·G_kp,  a_k = 2·w_k·r_k + w_k²·G_kk,  b_p = −2·w_p·r_p + w_p²·G_pp.

The lowest change is searched for in float32 or better, and judged in float64 before the swap is made.
Letters in shape suffixes: O outputs and I inputs of a linear layer, R rows of a tile, K kept weights that are looked at
together, Q points of a grid, G groups of M consecutive inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerif.checks import Count
from layerif.pruning import Pruner
from layerif.pruning.mask import check_width, num_removed

_TOGETHER = 8  # kept weights of a row that are looked at together; the best swap is mostly one of the first eight
_GRID = 8  # points of a row where the bound is calculated; between them it is interpolated

# Gives the kept and the removed weight (both R×1) of the best swap of every row, from weight, mask and r (all R×I).
# Where a row has none, the result is not a swap.
Search = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def swapped(
    weight: Tensor, mask: Tensor, gram: Tensor, *, most: int, m: int | None = None, tile: int | None = None
) -> Tensor:
    """Swaps kept weights for removed ones of the same row, the best swap first, as long as the row's error falls.

    Every row keeps its number of removed weights, and with m every group does. Weights that are zero already take no
    part, so that the number of zeros does not change either.

    Args:
        weight: W (O×I).
        mask: true where a weight is to be removed (O×I).
        gram: G (I×I), the sum over tokens of the products of two inputs.
        most: the most swaps of a row.
        m: the size of the groups of consecutive inputs that a swap stays in; None where it may leave them.
        tile: the number of rows that are worked on together; None derives it. No result depends on it.

    Returns:
        The mask after the swaps (O×I).

    Raises:
        ValueError: the shapes do not fit, or m does not divide the number of inputs.
    """
    num_rows, num_inputs = weight.shape
    if mask.shape != weight.shape or gram.shape != (num_inputs, num_inputs):
        raise ValueError(
            f"a weight {tuple(weight.shape)} needs a mask of its shape and a gram of {num_inputs}×{num_inputs}, got "
            f"{tuple(mask.shape)} and {tuple(gram.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(weight.dtype, gram.dtype), torch.float32)
    gram_II = gram.to(dtype)
    search = _anywhere(gram_II) if m is None else _in_groups(gram_II, m)
    # On a CPU the largest intermediate result stays in the cache.
    tile = tile or max(1, (2**20 if weight.device.type == "cpu" else 2**26) // (num_inputs * (m or _TOGETHER)))
    found = mask.clone()
    for start in range(0, num_rows, tile):
        _swap(weight[start : start + tile].to(dtype), found[start : start + tile], gram_II, search, most)
    return found


@dataclass(frozen=True, kw_only=True)
class MaskPruner(Pruner):
    """The part that pruners share which leave the kept weights as they are, and so can swap them for removed ones.

    Args:
        swaps: lower the error of the outputs by exact swaps, see `swapped`. The pruner then observes the Gram matrix of
            the inputs.
        most_swaps: the most swaps of a row. In four matrices of SmolLM2 at 60 % the first 25 bring 0.82 to all of what
            100 bring on other text; the time grows with their number.
    """

    swaps: bool = False
    most_swaps: Count = 25

    @abstractmethod
    def mask(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        """Marks the weights to remove before any swap (O×I); the arguments are those of `__call__`."""

    @property
    def observes_gram(self) -> bool:
        return self.swaps

    def observe(self, so_far: Tensor | None, input_TI: Tensor) -> Tensor:
        input_TI = input_TI.to(torch.promote_types(input_TI.dtype, torch.float32))
        if so_far is None:
            so_far = input_TI.new_zeros(input_TI.shape[1], input_TI.shape[1])
        return so_far.addmm_(input_TI.t(), input_TI)

    def __call__(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        mask = self.mask(weight, shared, sparsity, n)
        if self.swaps:
            mask = swapped(weight, mask, shared, most=self.most_swaps, m=self.m if n else None)
        return weight.masked_fill(mask, 0)

    def masks_at(self, weight: Tensor, shared: Any, counts: Sequence[int]) -> Iterator[Tensor] | None:
        """Yields the masks of several counts of weights, of one sorting; None where each has to be made by itself."""
        return None

    def at_levels(self, weight: Tensor, shared: Any, sparsities: Sequence[float]) -> Iterator[Tensor]:
        for change in self.changes_at(weight, shared, sparsities):
            yield weight + change  # exact: a change is 0, or the weight turned round

    def changes_at(self, weight: Tensor, shared: Any, sparsities: Sequence[float]) -> Iterator[Tensor]:
        counts = [num_removed(sparsity, weight.numel()) for sparsity in sparsities]
        masks = None if self.m is not None or self.swaps else self.masks_at(weight, shared, counts)
        if masks is None:
            yield from (pruned - weight for pruned in Pruner.at_levels(self, weight, shared, sparsities))
            return
        turned_OI = -weight
        for mask in masks:
            yield turned_OI * mask  # on a CPU this is several times as fast as torch.where


def _swap(weight_RI: Tensor, found_RI: Tensor, gram_II: Tensor, search: Search, most: int) -> None:
    """Does the work of `swapped` for the rows of one tile, in place. A row drops out after its last swap."""
    mask_RI, rows_R = found_RI.clone(), torch.arange(len(found_RI), device=found_RI.device)
    error_dot_RI = (weight_RI * mask_RI) @ gram_II
    for _ in range(most):
        kept_R1, removed_R1 = search(weight_RI, mask_RI, error_dot_RI)
        is_swap_R = (~mask_RI.gather(1, kept_R1) & mask_RI.gather(1, removed_R1))[:, 0]
        falls_R = is_swap_R & (_change(weight_RI, mask_RI, gram_II, kept_R1, removed_R1) < 0)
        if not bool(falls_R.all()):
            rows_R, kept_R1, removed_R1 = rows_R[falls_R], kept_R1[falls_R], removed_R1[falls_R]
            weight_RI, mask_RI, error_dot_RI = weight_RI[falls_R], mask_RI[falls_R], error_dot_RI[falls_R]
            if not len(rows_R):
                return
        mask_RI.scatter_(1, kept_R1, True).scatter_(1, removed_R1, False)
        error_dot_RI += weight_RI.gather(1, kept_R1) * gram_II[kept_R1[:, 0]]
        error_dot_RI -= weight_RI.gather(1, removed_R1) * gram_II[removed_R1[:, 0]]
        found_RI[rows_R] = mask_RI


def _change(weight_RI: Tensor, mask_RI: Tensor, gram_II: Tensor, kept_R1: Tensor, removed_R1: Tensor) -> Tensor:
    """Returns the change of ‖e‖² of every row (R) by its swap, in float64."""
    error_RI = (weight_RI * mask_RI).double()
    kept_gram_RI, removed_gram_RI = gram_II[kept_R1[:, 0]].double(), gram_II[removed_R1[:, 0]].double()
    w_k, w_p = weight_RI.gather(1, kept_R1).double(), weight_RI.gather(1, removed_R1).double()
    r_k, r_p = ((error_RI * gram_RI).sum(1, keepdim=True) for gram_RI in (kept_gram_RI, removed_gram_RI))
    a_k = 2 * w_k * r_k + w_k**2 * kept_gram_RI.gather(1, kept_R1)
    b_p = -2 * w_p * r_p + w_p**2 * removed_gram_RI.gather(1, removed_R1)
    return (a_k + b_p - 2 * w_k * w_p * kept_gram_RI.gather(1, removed_R1))[:, 0]


def _terms(weight_RI: Tensor, mask_RI: Tensor, error_dot_RI: Tensor, diagonal_I: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a (R×I), infinite where no weight can be removed, and b (R×I), infinite where none can come back."""
    square_RI, product_RI = weight_RI.square() * diagonal_I, 2 * weight_RI * error_dot_RI
    # On a CPU a division is many times faster than masked_fill.
    is_weight_RI = weight_RI != 0
    kept_RI, removed_RI = ((mask & is_weight_RI).to(weight_RI.dtype) for mask in (~mask_RI, mask_RI))
    return square_RI + product_RI + (1 / kept_RI - 1), square_RI - product_RI + (1 / removed_RI - 1)


def _in_groups(gram_II: Tensor, m: int) -> Search:
    """Makes the search for swaps inside groups of m inputs, which calculates all of them."""
    num_inputs = len(gram_II)
    check_width(num_inputs, m)
    groups = torch.arange(num_inputs, device=gram_II.device).view(-1, m)
    gram_GMM = gram_II[groups[:, :, None], groups[:, None, :]]

    def search(weight_RI: Tensor, mask_RI: Tensor, error_dot_RI: Tensor) -> tuple[Tensor, Tensor]:
        kept_RI, removed_RI = _terms(weight_RI, mask_RI, error_dot_RI, gram_II.diagonal())
        shape = len(weight_RI), -1, m
        weight_RGM = weight_RI.view(shape)
        change_RGMM = (-2 * weight_RGM)[..., :, None] * weight_RGM[..., None, :] * gram_GMM
        change_RGMM += kept_RI.view(shape)[..., :, None]
        change_RGMM += removed_RI.view(shape)[..., None, :]
        kept_R1 = change_RGMM.amin(3).flatten(1).argmin(1, keepdim=True)
        change_RM = change_RGMM.flatten(1, 2)[torch.arange(len(kept_R1), device=kept_R1.device), kept_R1[:, 0]]
        return kept_R1, kept_R1 // m * m + change_RM.argmin(1, keepdim=True)

    return search


def _anywhere(gram_II: Tensor) -> Search:
    """Makes the search for swaps between any two inputs, which looks only at kept weights that can be the best.

    It begins with those of the lowest bound (see `_bounds`), and ends where no bound is below the best swap found.
    """
    norm_I = gram_II.diagonal().sqrt()
    reach_I = _largest_correlation(gram_II, norm_I)
    together = min(_TOGETHER, len(gram_II))

    def search(weight_RI: Tensor, mask_RI: Tensor, error_dot_RI: Tensor) -> tuple[Tensor, Tensor]:
        kept_RI, removed_RI = _terms(weight_RI, mask_RI, error_dot_RI, gram_II.diagonal())
        bound_RI = _bounds(kept_RI, removed_RI, weight_RI.abs() * norm_I, reach_I)
        rows_R = torch.arange(len(weight_RI), device=weight_RI.device)
        best_R, best_kept_R1 = weight_RI.new_zeros(len(weight_RI)), torch.zeros_like(rows_R)[:, None]
        while True:
            lowest_RK, kept_RK = bound_RI.topk(together, dim=1, largest=False)
            is_open_R = lowest_RK[:, 0] < best_R[rows_R]
            if not bool(is_open_R.all()):
                rows_R, bound_RI, kept_RK = rows_R[is_open_R], bound_RI[is_open_R], kept_RK[is_open_R]
            if not len(rows_R):
                change_R1I = _changes(weight_RI, kept_RI, removed_RI, gram_II, best_kept_R1)
                return best_kept_R1, change_R1I.argmin(dim=2)
            bound_RI.scatter_(1, kept_RK, torch.inf)
            terms = (each.index_select(0, rows_R) for each in (weight_RI, kept_RI, removed_RI))
            change_R, place_R = _changes(*terms, gram_II, kept_RK).amin(dim=2).min(dim=1)
            is_better_R = change_R < best_R[rows_R]
            better_R = rows_R[is_better_R]
            best_R[better_R] = change_R[is_better_R]
            best_kept_R1[better_R] = kept_RK[is_better_R].gather(1, place_R[is_better_R, None])

    return search


def _changes(weight_RI: Tensor, kept_RI: Tensor, removed_RI: Tensor, gram_II: Tensor, kept_RK: Tensor) -> Tensor:
    """Returns the change by every swap of some kept weights (R×K×I), infinite where the other weight is kept."""
    weight_RK1, kept_RK1 = (each.gather(1, kept_RK)[:, :, None] for each in (weight_RI, kept_RI))
    change_RKI = gram_II.index_select(0, kept_RK.flatten()).view(*kept_RK.shape, -1)
    change_RKI *= weight_RI[:, None, :]
    torch.addcmul(removed_RI[:, None, :], weight_RK1, change_RKI, value=-2, out=change_RKI)
    change_RKI += kept_RK1
    return change_RKI


def _bounds(kept_RI: Tensor, removed_RI: Tensor, size_RI: Tensor, reach_I: Tensor) -> Tensor:
    """Returns for every kept weight a change (R×I) that is not above that of its swaps, as far as it is negative.

    With q_j = |w_j|·√G_jj and ρ_k the largest correlation of input k with another, no swap of k is better than
    a_k + f(ρ_k·q_k), f(t) = min_p (b_p − 2·t·q_p). As f is concave, its chords are below it.

    Args:
        kept_RI: a.
        removed_RI: b.
        size_RI: q.
        reach_I: ρ.
    """
    reached_RI = size_RI * reach_I
    largest_R1 = (size_RI * removed_RI.isfinite()).amax(1, keepdim=True)
    is_possible_RI = kept_RI + (removed_RI.amin(1, keepdim=True) - 2 * largest_R1 * reached_RI) < 0
    end_R1 = (reached_RI * is_possible_RI).amax(1, keepdim=True)
    grid_Q = torch.linspace(0, 1, _GRID, dtype=size_RI.dtype, device=size_RI.device).square()
    point_RQ = end_R1 * grid_Q
    value_RQ = torch.addcmul(removed_RI[:, None, :], point_RQ[:, :, None], size_RI[:, None, :], value=-2).amin(2)
    tiny = torch.finfo(size_RI.dtype).tiny
    place_RI = ((reached_RI / end_R1.clamp(min=tiny)).sqrt() * (_GRID - 1)).clamp(max=_GRID - 2).long()
    slope_RQ = value_RQ.diff(dim=1) / point_RQ.diff(dim=1).clamp(min=tiny)
    start_RI, value_RI, slope_RI = (each.gather(1, place_RI) for each in (point_RQ, value_RQ, slope_RQ))
    return kept_RI + torch.addcmul(value_RI, slope_RI, reached_RI - start_RI)


def _largest_correlation(gram_II: Tensor, norm_I: Tensor) -> Tensor:
    """Returns the largest |G_kj|/√(G_kk·G_jj) of every input k with another j (I); 0 for inputs that never act."""
    inverse_I = torch.where(norm_I > 0, 1 / norm_I, 0)
    found = []
    for start, rows_NI in zip(range(0, len(gram_II), 1024), gram_II.split(1024), strict=True):
        correlation_NI = rows_NI.abs() * inverse_I
        correlation_NI.diagonal(start).zero_()
        found.append(correlation_NI.amax(1))
    return torch.cat(found) * inverse_I
