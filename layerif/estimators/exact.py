"""Exact influence under the damped empirical Fisher, F = GᵀG/N. N, M, P, K, C: see `gram.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.estimators._base import DampedEstimator, damping_lambda, eigenbasis
from layerif.evidence import MatrixGram


def exact(train_train: Tensor, val_train: Tensor, *, numel: int, damping: float) -> Tensor:
    """I = −V (F + λ)⁻¹ Gᵀ = −N·C·(K + Nλ)⁻¹, λ = damping · tr K/(N·P): (M×N), float64.

    Solved in the eigenbasis of K, which is remembered: all dampings share one eigendecomposition. train_train: K;
    val_train: C; numel: P.
    Negative: helpful. Zero train gradients (λ = 0) give zero.
    """
    lam = damping_lambda(train_train, numel=numel, damping=damping)
    num_train, gram_MN = len(train_train), val_train.double()
    if lam == 0:
        return torch.zeros_like(gram_MN)
    spectrum_N, basis_NN = eigenbasis(train_train)
    return -num_train * (gram_MN @ basis_NN / (spectrum_N + num_train * lam)) @ basis_NN.T


@dataclass(frozen=True, kw_only=True)
class Exact(DampedEstimator):
    """What DataInf and LiSSA approximate; on Grams it costs an eigendecomposition (N×N) per matrix."""

    def influence(self, gram: MatrixGram) -> Tensor:
        return exact(gram.train_train, gram.val_train, numel=gram.numel, damping=self.relative_damping(gram))
