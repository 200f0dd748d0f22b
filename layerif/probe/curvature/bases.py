"""The eigenbases and spectra that K-FAC, EK-FAC and Shampoo give the Fisher matrix of one weight matrix.

With inputs a and output gradients δ, the gradient of sample i's loss is G_i = Σ_t δ_it a_itᵀ (O×I), and the empirical
Fisher, which takes the labels of the rows and draws none, is F = mean_i vec(G_i) vec(G_i)ᵀ. With vec by rows:

    K-FAC      F ≈ κ · B ⊗ A        A = Σ a aᵀ and B = Σ δ δᵀ over the tokens of the train samples
    EK-FAC     the same eigenvectors U_B ⊗ U_A, with eigenvalues mean_i (U_Bᵀ G_i U_A)² entry by entry
    Shampoo    F ≈ κ · L^½ ⊗ R^½    L = Σ_i G_i G_iᵀ and R = Σ_i G_iᵀ G_i

κ makes the trace that of F, mean_i ‖G_i‖², which EK-FAC's spectrum has by itself. K-FAC: Martens and Grosse, 2015;
EK-FAC: George et al., 2018; Shampoo as a Kronecker product: Gupta et al., 2018, and Morwani et al., 2024.

Letters in shape suffixes: S samples, N train samples, B samples of a chunk, T tokens, I inputs and O outputs of the
layer, R output rows of a slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Spectrum = Literal["kfac", "ekfac", "shampoo"]
Basis = Literal["kronecker", "shampoo"]
BASES: dict[Spectrum, Basis] = {"kfac": "kronecker", "ekfac": "kronecker", "shampoo": "shampoo"}


@dataclass(frozen=True)
class Moments:
    """The sums over the train samples that both bases are taken from, in float64.

    Attributes:
        inputs, deltas: A (I×I) and B (O×O).
        rows, columns: L (O×O) and R (I×I); zero where Shampoo is not asked for.
        squares: ‖G_i‖² of every sample (N).
    """

    inputs: Tensor
    deltas: Tensor
    rows: Tensor
    columns: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Eigenbasis:
    """The eigenvectors and eigenvalues of both sides of a Kronecker product.

    Attributes:
        out_OO, in_II: the eigenvectors, in columns.
        spectrum_O, spectrum_I: the eigenvalues; the sum of their products is the trace of F.
    """

    out_OO: Tensor
    in_II: Tensor
    spectrum_O: Tensor
    spectrum_I: Tensor


def moments(input_NTI: Tensor, delta_NOT: Tensor, *, with_shampoo: bool, chunk: int) -> Moments:
    """Sums over the train samples without forming a gradient: G Gᵀ = δ (a aᵀ) δᵀ, with a sample's tokens inside.

    Args:
        input_NTI: inputs of the train samples.
        delta_NOT: output gradients of the train samples.
        with_shampoo: also sum L and R.
        chunk: the samples that are taken together.
    """
    num_in, num_out = input_NTI.shape[2], delta_NOT.shape[1]
    inputs_II, columns_II = (input_NTI.new_zeros(num_in, num_in, dtype=torch.float64) for _ in range(2))
    deltas_OO, rows_OO = (input_NTI.new_zeros(num_out, num_out, dtype=torch.float64) for _ in range(2))
    squares = []
    for input_BTI, delta_BOT in zip(input_NTI.split(chunk), delta_NOT.split(chunk), strict=True):
        inputs_BTT, deltas_BTT = torch.bmm(input_BTI, input_BTI.mT), torch.bmm(delta_BOT.mT, delta_BOT)
        squares.append((inputs_BTT * deltas_BTT).sum(dim=(1, 2)).double())
        inputs_II += torch.einsum("bti,btj->ij", input_BTI, input_BTI)
        deltas_OO += torch.einsum("bot,bpt->op", delta_BOT, delta_BOT)
        if with_shampoo:
            rows_OO += torch.einsum("bot,bpt->op", torch.bmm(delta_BOT, inputs_BTT), delta_BOT)
            columns_II += torch.einsum("bti,btj->ij", torch.bmm(deltas_BTT, input_BTI), input_BTI)
    return Moments(inputs_II, deltas_OO, rows_OO, columns_II, torch.cat(squares))


def moment_bytes(num_tokens: int, num_out: int, num_in: int, itemsize: int) -> float:
    """Counts the bytes that `moments` works in for each sample of a chunk."""
    return float(itemsize) * (3 * num_tokens**2 + 3 * num_tokens * (num_out + num_in))


def kronecker_eigenbasis(basis: Basis, found: Moments) -> Eigenbasis:
    """Decomposes both sides of a Kronecker product whose trace is not zero, and scales it to the trace of F."""
    if basis == "kronecker":
        (spectrum_O, out_OO), (spectrum_I, in_II) = _decomposed(found.deltas, 1.0), _decomposed(found.inputs, 1.0)
    else:
        (spectrum_O, out_OO), (spectrum_I, in_II) = _decomposed(found.rows, 0.5), _decomposed(found.columns, 0.5)
    scale = found.squares.mean() / (spectrum_O.sum() * spectrum_I.sum())
    return Eigenbasis(out_OO, in_II, spectrum_O * scale, spectrum_I)


def turn(input_STI: Tensor, delta_SOT: Tensor, out_OO: Tensor, in_II: Tensor, chunk: int) -> None:
    """Writes the factors of Uᵀ G_s V in place of those of G_s, for U = `out_OO` and V = `in_II`."""
    out_OO, in_II = out_OO.to(delta_SOT.dtype), in_II.to(input_STI.dtype)
    for part in delta_SOT.split(chunk):
        part.copy_(out_OO.mT @ part)
    for part in input_STI.split(chunk):
        part.copy_(part @ in_II)


def slabs(input_STI: Tensor, delta_SOT: Tensor, num_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields the gradients of all samples (S×R×I), some output rows after the others, with the place of these rows."""
    for start in range(0, delta_SOT.shape[1], num_rows):
        rows = slice(start, start + num_rows)
        yield rows, torch.bmm(delta_SOT[:, rows], input_STI)


def spectrum_of(spectrum: Spectrum, basis: Eigenbasis, rows: slice, turned_NRI: Tensor) -> Tensor:
    """Gives the eigenvalues (R×I) of some output rows, in float64.

    Args:
        spectrum: the approximation of F.
        basis: its eigenbasis.
        rows: the place of the rows.
        turned_NRI: the gradients of the train samples in this basis, there.
    """
    if spectrum == "ekfac":
        return turned_NRI.square().mean(dim=0).double()
    return torch.outer(basis.spectrum_O[rows], basis.spectrum_I)


def _decomposed(moment: Tensor, root: float) -> tuple[Tensor, Tensor]:
    """Gives the eigenvalues, raised to a power, and the eigenvectors; rounding may have left some below zero."""
    spectrum, basis = torch.linalg.eigh(moment)
    return spectrum.clamp(min=0) ** root, basis
