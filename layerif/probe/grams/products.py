"""Inner products of per-sample gradients of one linear layer, from its inputs and output gradients.

The gradient of sample s is g_s = Σ_t δ_st a_stᵀ (O×I). Two exact ways to ⟨g_s, g_n⟩ for every sample s and train sample
n, equal up to rounding:

    materialised   form g_s in slabs of output rows, then multiply them       2·O·I·(S·T + pairs) operations
    pairwise       Σ_{t,t'} (δ_st·δ_nt')(a_st·a_nt'), the "ghost" form        2·(O + I)·T²·pairs operations

Pairwise wins for few short samples and wide layers, materialised otherwise; `cheaper` chooses. Both work in tiles, so
that memory beyond the factors themselves is bounded by `tile_bytes`.

Letters in shape suffixes: S samples (N train, then M validation), T tokens, I inputs and O outputs of the layer, R the
entries of a slab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from layerif.models.contexts import full_precision

Form = Literal["materialised", "pairwise"]
FORMS: tuple[Form, ...] = get_args(Form)

_COLUMNS = 128  # computed at a time; the part above the Gram's diagonal is mirrored
# Multiplying and summing one entry of the two token-by-token products costs about as much as so many operations of a
# matrix product: it waits for memory.
_ENTRY = 64


def operations(form: Form, num_train: int, num_val: int, num_tokens: int, num_out: int, num_in: int) -> float:
    """Counts the floating-point operations of one layer's Gram; a multiplication and an addition are two."""
    pairs = _num_pairs(num_train, num_val)
    if form == "materialised":
        return 2.0 * num_out * num_in * ((num_train + num_val) * num_tokens + pairs + num_val)
    return 2.0 * (num_out + num_in + 1) * num_tokens**2 * (pairs + num_val)


def cheaper(num_train: int, num_val: int, num_tokens: int, num_out: int, num_in: int) -> Form:
    """Gives the form that takes less time."""
    sizes = num_train, num_val, num_tokens, num_out, num_in
    waiting = _ENTRY * num_tokens**2 * (_num_pairs(num_train, num_val) + num_val)
    return (
        "pairwise" if operations("pairwise", *sizes) + waiting < operations("materialised", *sizes) else "materialised"
    )


def gram(form: Form, input_STI: Tensor, delta_SOT: Tensor, num_train: int, tile_bytes: float) -> tuple[Tensor, Tensor]:
    """Multiplies the factors of one layer.

    On a GPU float32 products are taken in full precision (without TF32), even where the program around allows less.

    Args:
        form: the way of taking inner products.
        input_STI: inputs of all samples, train first.
        delta_SOT: output gradients of all samples.
        num_train: N.
        tile_bytes: working memory.

    Returns:
        ⟨g_s, g_n⟩ (S×N) and ‖g_m‖² of the validation samples (M), in the dtype of the factors.
    """
    num_samples = len(input_STI)
    gram_SN = input_STI.new_zeros(num_samples, num_train)
    with full_precision():
        if form == "materialised":
            square_M = _materialised(input_STI, delta_SOT, gram_SN, tile_bytes)
        else:
            square_M = _pairwise(input_STI, delta_SOT, gram_SN, tile_bytes)
    lower_NN = gram_SN[:num_train].tril()
    gram_SN[:num_train] = lower_NN + lower_NN.tril(-1).mT
    return gram_SN, square_M


def tile_bytes_of(
    form: Form, size: int, num_samples: int, num_tokens: int, num_out: int, num_in: int, itemsize: int
) -> float:
    """Counts the bytes of a tile of `size`: output rows of every sample, or the side of a square of sample pairs."""
    if form == "materialised":
        return float(itemsize) * num_samples * num_in * size
    return float(itemsize) * 2 * (size**2 * num_tokens**2 + size * num_tokens * (num_out + num_in))


def _materialised(input_STI: Tensor, delta_SOT: Tensor, gram_SN: Tensor, tile_bytes: float) -> Tensor:
    """Adds G_SR G_NRᵀ with G_SR = δᵀa to the Gram, one slab of output rows after the other; returns ‖g_m‖²."""
    (num_samples, num_train), num_out, num_in = gram_SN.shape, delta_SOT.shape[1], input_STI.shape[2]
    num_rows = min(num_out, max(1, int(tile_bytes / (num_samples * num_in * input_STI.itemsize))))
    square_M = gram_SN.new_zeros(num_samples - num_train)
    memory = input_STI.new_empty(num_samples * num_rows * num_in)  # one slab's, used again for each
    for rows_SRT in delta_SOT.split(num_rows, dim=1):
        size = num_samples * rows_SRT.shape[1] * num_in
        slab_SR = torch.bmm(rows_SRT, input_STI, out=memory[:size].view(num_samples, -1, num_in)).flatten(1)
        for start, stop in _columns(num_train):
            gram_SN[start:, start:stop].addmm_(slab_SR[start:], slab_SR[start:stop].mT)
        square_M += torch.linalg.vector_norm(slab_SR[num_train:], dim=1).square()
    return square_M


def _pairwise(input_STI: Tensor, delta_SOT: Tensor, gram_SN: Tensor, tile_bytes: float) -> Tensor:
    """Sets the Gram, square of samples by square, to the summed products of token-by-token products; returns ‖g_m‖²."""
    (num_samples, num_train), num_tokens = gram_SN.shape, input_STI.shape[1]
    # The largest side whose two tiles and copied rows fit, see `tile_bytes_of`.
    area, edge = num_tokens**2, num_tokens * (delta_SOT.shape[1] + input_STI.shape[2])
    room = tile_bytes / (2 * input_STI.itemsize)
    side = max(1, int((math.sqrt(edge**2 + 4 * area * room) - edge) / (2 * area)))

    def rows(start: int) -> tuple[Tensor, Tensor]:
        samples = slice(start, start + side)
        return delta_SOT[samples].mT.flatten(0, 1), input_STI[samples].flatten(0, 1)

    for column in range(0, num_train, side):
        delta_KO, input_KI = (part[: (num_train - column) * num_tokens] for part in rows(column))
        for row in range(column, num_samples, side):
            delta_LO, input_LI = rows(row)
            product_LK = (delta_LO @ delta_KO.mT).mul_(input_LI @ input_KI.mT)
            product_ATBT = product_LK.unflatten(1, (-1, num_tokens)).unflatten(0, (-1, num_tokens))
            gram_SN[row : row + side, column : column + side] = product_ATBT.sum((1, 3))
    squares = [
        torch.bmm(delta_AOT.mT, delta_AOT).mul_(torch.bmm(input_ATI, input_ATI.mT)).sum((1, 2))
        for delta_AOT, input_ATI in zip(
            delta_SOT[num_train:].split(side**2), input_STI[num_train:].split(side**2), strict=True
        )
    ]
    return torch.cat(squares) if squares else gram_SN.new_zeros(0)


def _columns(num_train: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_train, _COLUMNS):
        yield start, min(start + _COLUMNS, num_train)


def _num_pairs(num_train: int, num_val: int) -> int:
    """Counts the entries of the Gram that are computed."""
    return sum((num_train + num_val - start) * (stop - start) for start, stop in _columns(num_train))
