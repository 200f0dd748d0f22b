"""Exact influence under the damped empirical Fisher, F = GᵀG/N. N, M, P, K, C: see `gram.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.estimators.gram import DampedEstimator, damping_lambda, eigenbasis
from layerif.layers import MatrixGram


def exact(train_train: Tensor, val_train: Tensor, *, numel: int, damping: float) -> Tensor:
    """I = −V (F + λ)⁻¹ Gᵀ = −N·C·(K + Nλ)⁻¹, λ = damping · tr K/(N·P): (M×N), float64.

    One eigendecomposition of K, solved in its eigenbasis. train_train: K; val_train: C; numel: P.
    Negative: helpful. Zero train gradients (λ = 0) give zero.
    """
    return exact_path(train_train, val_train, numel=numel, dampings=[damping])[0]


def exact_path(train_train: Tensor, val_train: Tensor, *, numel: int, dampings: Sequence[float]) -> list[Tensor]:
    """`exact` for every one of `dampings`, in their order, from the same one eigendecomposition of K."""
    lams = [damping_lambda(train_train, numel=numel, damping=damping) for damping in dampings]
    num_train, gram_MN = len(train_train), val_train.double()
    if 0 in lams:
        return [torch.zeros_like(gram_MN) for _ in lams]
    spectrum_N, basis_NN = eigenbasis(train_train)
    turned_MN = gram_MN @ basis_NN
    return [-num_train * (turned_MN / (spectrum_N + num_train * lam)) @ basis_NN.T for lam in lams]


@dataclass(frozen=True, kw_only=True)
class Exact(DampedEstimator):
    """What DataInf and LiSSA approximate; on Grams it costs an eigendecomposition (N×N) per matrix."""

    def influence(self, gram: MatrixGram) -> Tensor:
        return exact(gram.train_train, gram.val_train, numel=gram.numel, damping=self.relative_damping(gram))
