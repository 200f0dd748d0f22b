"""DataInf (Kwon et al., ICLR 2024): influence with the inverse moved inside the average over samples.

H⁻¹ ≈ (1/N) Σ_i (g_i g_iᵀ + λ)⁻¹, where Sherman–Morrison solves every term. N, M, P, K, C: see `gram.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.estimators.gram import DampedEstimator, damping_lambda
from layerif.layers import MatrixGram


def datainf(train_train: Tensor, val_train: Tensor, *, numel: int, damping: float) -> Tensor:
    """I = −(1/λ)·[C − (1/N)·C·diag(1/(λ + k))·K], k = diag K, λ = damping · tr K/(N·P): (M×N), float64.

    train_train: K; val_train: C; numel: P. Negative: helpful. Zero train gradients (λ = 0) give zero.
    """
    lam = damping_lambda(train_train, numel=numel, damping=damping)
    gram_NN, gram_MN = train_train.double(), val_train.double()
    if lam == 0:
        return torch.zeros_like(gram_MN)
    return ((gram_MN / (lam + gram_NN.diagonal())) @ gram_NN / len(gram_NN) - gram_MN) / lam


@dataclass(frozen=True, kw_only=True)
class DataInf(DampedEstimator):
    """The paper's estimator; one product of small matrices, no eigendecomposition."""

    def influence(self, gram: MatrixGram) -> Tensor:
        return datainf(gram.train_train, gram.val_train, numel=gram.numel, damping=self.relative_damping(gram))
