"""The arithmetic of loss curves, as functions of one matrix's factors.

Let Δ(s) be the change that a pruner makes to a weight W at the sparsity s. With the matrix's inputs a and the gradient
δ at its output of a sample's mean loss, z_it(s) = δ_itᵀ Δ(s) a_it, and the predicted rise of the loss is

    c(s) = ½ Σ_i p_i T_i Σ_t z_it(s)²      (exact form)
    c(s) = ½ Σ_oj Δ_oj(s)² Σ_i p_i T_i Σ_t δ_ito² a_itj²      (diagonal form)

with T_i counted tokens in sample i, the sum over all positions t, and weights p_i of the samples (1/S for S samples of
one text). This is the quadratic form of the empirical Fisher matrix with the positions of a sample taken as
independent: with a copy W_t of W at every position, c = ½ Σ_i p_i/T_i Σ_t ⟨∂(T_i L_i)/∂W_t, Δ⟩².

Letters in shape suffixes: V the positions that are looked at, I inputs and O outputs of a linear layer, K levels.
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
    return torch.stack(
        [
            torch.cat(
                [
                    ((a_VI @ change_OI.mT) * d_VO).sum(1)
                    for a_VI, d_VO in zip(input_VI.split(rows), delta_VO.split(rows), strict=True)
                ]
            )
            for change_OI in changes
        ]
    )


def costs_of(effects_KV: Tensor, weights_V: Tensor, is_second_V: Tensor) -> Tensor:
    """Gives Σ_V w z² of the positions of each half of the samples (2×K), in float64."""
    square_KV = effects_KV.double().square() * weights_V
    return torch.stack([square_KV[:, ~is_second_V].sum(1), square_KV[:, is_second_V].sum(1)])


def diagonal_costs(
    input_VI: Tensor, delta_VO: Tensor, weights_V: Tensor, is_second_V: Tensor, changes: Iterable[Tensor]
) -> Tensor:
    """Gives Σ_oj Δ_oj² Σ_V w δ_o² a_j² of the positions of each half of the samples (2×K), in float64."""
    # The weights are scaled to 1, so that the squares of small gradients do not vanish in float32.
    scale = float(weights_V.max()) or 1.0
    largest = float(delta_VO.abs().max()) or 1.0
    weighted_VO = (delta_VO / largest).square_().mul_((weights_V / scale).to(delta_VO.dtype)[:, None])
    square_VI = input_VI.square()
    fisher_2OI = [weighted_VO[half].mT @ square_VI[half] for half in (~is_second_V, is_second_V)]
    costs = []
    for change_OI in changes:
        square_OI = change_OI.square_()
        costs.append(torch.stack([torch.dot(square_OI.flatten(), each.flatten()).double() for each in fisher_2OI]))
    return torch.stack(costs, dim=1) * scale * largest**2
