"""The arithmetic of loss curves, as functions of one matrix's factors.

Let Δ(s) be the change that a pruner makes to a weight W at the sparsity s, or a number format of s bits. With the
matrix's inputs a and the gradient δ at its output of a sample's mean loss, z_it(s) = δ_itᵀ Δ(s) a_it, and the predicted
rise of the loss is

    c(s) = ½ Σ_i p_i T_i Σ_t z_it(s)²      (exact form)
    c(s) = ½ Σ_oj Δ_oj(s)² Σ_i p_i T_i Σ_t δ_ito² a_itj²      (diagonal form)

with T_i counted tokens in sample i, the sum over all positions t, and weights p_i of the samples (1/S for S samples of
one text). This is the quadratic form of the empirical Fisher matrix with the positions of a sample taken as
independent: with a copy W_t of W at every position, c = ½ Σ_i p_i/T_i Σ_t ⟨∂(T_i L_i)/∂W_t, Δ⟩².

Letters in shape suffixes: V the positions that are looked at, H those of one half, P all positions, I inputs and O
outputs of a linear layer, K levels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def effects(input_VI: Tensor, delta_VO: Tensor, changes: Iterable[Tensor], rows: int = 4096) -> Tensor:
    """Computes z = δᵀ Δ a at every position, for every change of the weight.

    Args:
        input_VI: a.
        delta_VO: δ.
        changes: Δ (O×I), one for each level.
        rows: the positions that are multiplied at once.

    Returns:
        z (K×V).
    """
    # The larger side is multiplied by Δ, and the products with the smaller one are summed.
    is_wide = delta_VO.shape[1] > input_VI.shape[1]
    larger, smaller = (delta_VO, input_VI) if is_wide else (input_VI, delta_VO)
    tiles = list(zip(larger.split(rows), smaller.split(rows), strict=True))
    return torch.stack(
        [
            torch.cat([(many @ (change_OI if is_wide else change_OI.mT)).mul_(few).sum(1) for many, few in tiles])
            for change_OI in changes
        ]
    )


def costs_of(effects_KV: Tensor, weights_V: Tensor, is_second_V: Tensor) -> Tensor:
    """Gives Σ_V w z² of the positions of each half of the samples (2×K), in float64."""
    square_KV = effects_KV.double().square() * weights_V
    return torch.stack([square_KV[:, ~is_second_V].sum(1), square_KV[:, is_second_V].sum(1)])


def diagonal_costs(
    input_PI: Tensor,
    delta_PO: Tensor,
    weights_V: Tensor,
    is_second_V: Tensor,
    changes: Iterable[Tensor],
    places_V: Tensor | None = None,
) -> Tensor:
    """Computes Σ_oj Δ_oj² Σ_V w δ_o² a_j² of the positions of each half of the samples.

    Args:
        input_PI: a.
        delta_PO: δ.
        weights_V: w, in float64.
        is_second_V: true for positions of the second half.
        changes: Δ (O×I), one for each level. They are overwritten.
        places_V: the rows of a and δ that are looked at; None: all of them, in their order.

    Returns:
        The costs (2×K), in float64.
    """
    # The weights are scaled to 1, so that the squares of small gradients do not vanish in float32.
    scale = float(weights_V.max()) or 1.0
    largest = max(abs(float(end)) for end in torch.aminmax(delta_PO)) or 1.0
    root_V = (weights_V / scale).sqrt().div(largest).to(delta_PO.dtype)

    def fisher(is_mine_V: Tensor) -> Tensor:
        places_H = is_mine_V.nonzero()[:, 0] if places_V is None else places_V[is_mine_V]
        weighted_HO = delta_PO[places_H].mul_(root_V[is_mine_V, None]).square_()
        return weighted_HO.mT @ input_PI[places_H].square_()

    fisher_2OI = [fisher(is_mine_V) for is_mine_V in (~is_second_V, is_second_V)]
    costs = []
    for change_OI in changes:
        square_OI = change_OI.square_()
        costs.append(torch.stack([torch.dot(square_OI.flatten(), each.flatten()).double() for each in fisher_2OI]))
    return torch.stack(costs, dim=1) * scale * largest**2
