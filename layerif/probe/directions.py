"""The arithmetic of directions, as functions of one matrix's factors.

The gradient of sample s is G_s = Σ_t δ_st a_stᵀ (O×I), with a the matrix's inputs and δ the gradient at its output.

Letters in shape suffixes: S samples, T tokens, V the positions that are not padding, I inputs and O outputs of a linear
layer, R directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MORE = 8  # directions that the search takes beside those that are asked for


def leading_directions(gradient_OI: Tensor, number: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gives the leading singular directions of a matrix.

    A small matrix, or most of a matrix's directions, is decomposed exactly in float64. Otherwise a random projection
    with one power iteration finds the space of the leading ones (Halko, Martinsson and Tropp, 2011).

    Args:
        gradient_OI: the matrix.
        number: R, at most the smaller side.
        seed: of the projection.

    Returns:
        U (O×R), σ (R, descending) and Vᵀ (R×I), in the dtype of the matrix.
    """
    num_searched = number + _MORE
    if 2 * num_searched >= min(gradient_OI.shape):
        left_OR, strengths_R, right_RI = torch.linalg.svd(gradient_OI.double(), full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        random_IR = torch.randn(gradient_OI.shape[1], num_searched, generator=generator).to(gradient_OI)
        space_OR = torch.linalg.qr(gradient_OI @ random_IR).Q
        space_OR = torch.linalg.qr(gradient_OI @ torch.linalg.qr(gradient_OI.mT @ space_OR).Q).Q
        inside_RR, strengths_R, right_RI = torch.linalg.svd(space_OR.mT @ gradient_OI, full_matrices=False)
        left_OR = space_OR @ inside_RR
    found = left_OR[:, :number], strengths_R[:number], right_RI[:number]
    return found[0].to(gradient_OI), found[1].to(gradient_OI), found[2].to(gradient_OI)


def mean_gradient(input_STI: Tensor, delta_STO: Tensor, places_V: Tensor, rows: int) -> Tensor:
    """Computes the mean of G_s over the samples (O×I).

    Args:
        input_STI: a.
        delta_STO: δ.
        places_V: the positions that are not padding, among all S·T.
        rows: the positions that are multiplied at once.
    """
    input_PI, delta_PO = input_STI.flatten(0, 1), delta_STO.flatten(0, 1)
    total_OI = input_PI.new_zeros(delta_PO.shape[1], input_PI.shape[1])
    for some_V in places_V.split(rows):
        total_OI.addmm_(delta_PO[some_V].mT, input_PI[some_V])
    return total_OI.div_(len(input_STI))


def projections(
    input_STI: Tensor, delta_STO: Tensor, left_OR: Tensor, right_RI: Tensor, places_V: Tensor, rows: int
) -> Tensor:
    """Computes u_kᵀ G_s v_k of every sample and direction (S×R), in float64.

    Args:
        input_STI: a.
        delta_STO: δ.
        left_OR: the u_k.
        right_RI: the v_k.
        places_V: the positions that are not padding, among all S·T.
        rows: the positions that are multiplied at once.
    """
    input_PI, delta_PO = input_STI.flatten(0, 1), delta_STO.flatten(0, 1)
    found_SR = torch.zeros(len(input_STI), left_OR.shape[1], dtype=torch.float64, device=left_OR.device)
    for some_V in places_V.split(rows):
        of_positions = (delta_PO[some_V] @ left_OR).mul_(input_PI[some_V] @ right_RI.mT)
        found_SR.index_add_(0, some_V // input_STI.shape[1], of_positions.double())
    return found_SR


def squared_norms(input_STI: Tensor, delta_STO: Tensor, tile_bytes: float) -> Tensor:
    """Computes ‖G_s‖² of every sample (S), in float64, by pairs of tokens or from G_s itself, whichever costs less.

    Args:
        input_STI: a.
        delta_STO: δ.
        tile_bytes: working memory.
    """
    num_tokens, num_in, num_out = input_STI.shape[1], input_STI.shape[2], delta_STO.shape[2]
    by_pairs = num_tokens * (num_in + num_out) < num_in * num_out
    each = 2 * num_tokens**2 if by_pairs else num_in * num_out
    at_once = max(1, int(tile_bytes / (each * input_STI.itemsize)))
    found = []
    for some_STI, some_STO in zip(input_STI.split(at_once), delta_STO.split(at_once), strict=True):
        if by_pairs:
            products_STT = torch.bmm(some_STI, some_STI.mT).mul_(torch.bmm(some_STO, some_STO.mT))
            found.append(products_STT.sum((1, 2), dtype=torch.float64))
        else:
            found.append(torch.bmm(some_STO.mT, some_STI).square_().sum((1, 2), dtype=torch.float64))
    return torch.cat(found)
