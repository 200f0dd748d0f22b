"""Exact influence under the damped empirical Fisher, F = GᵀG/N. N, M, P, K, C: see `gram.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.estimators.gram import GramEstimator, check_damping, damping_lambda
from layerif.layers import MatrixGram


def exact(train_train: Tensor, val_train: Tensor, *, numel: int, damping: float) -> Tensor:
    """I = −V (F + λ)⁻¹ Gᵀ = −N·C·(K + Nλ)⁻¹, λ = damping · tr K/(N·P): (M×N), float64.

    One eigendecomposition of K, solved in its eigenbasis. train_train: K; val_train: C; numel: P.
    Negative: helpful. Zero train gradients (λ = 0) give zero.
    """
    lam = damping_lambda(train_train, numel=numel, damping=damping)
    gram_NN, gram_MN = train_train.double(), val_train.double()
    if lam == 0:
        return torch.zeros_like(gram_MN)
    num_train = len(gram_NN)
    spectrum_N, basis_NN = torch.linalg.eigh((gram_NN + gram_NN.T) / 2)
    # A Gram built in float32 has noise eigenvalues below zero that can cancel the far smaller damping.
    damped_N = spectrum_N.clamp(min=0) + num_train * lam
    return -num_train * ((gram_MN @ basis_NN) / damped_N) @ basis_NN.T


@dataclass(frozen=True, kw_only=True)
class Exact(GramEstimator):
    """damping: λ in units of the matrix's mean squared gradient entry."""

    damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)

    def influence(self, gram: MatrixGram) -> Tensor:
        return exact(gram.train_train, gram.val_train, numel=gram.numel, damping=self.damping)
