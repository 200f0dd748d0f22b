"""Exact influence under the damped empirical Fisher, F = GᵀG/N. N, M, P, K, C: see `_base.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.estimators._base import DampedEstimator, damping_lambda, eigenbasis
from layerif.evidence import CrossGram, MatrixGram


def exact(
    train_train: Tensor, val_train: Tensor, *, numel: int, damping: float, others: CrossGram | None = None
) -> Tensor:
    """Gives I = −V (F + λ)⁻¹ Gᵀ = −N·C·(K + Nλ)⁻¹ with λ = damping · tr K/(N·P).

    It is solved in the eigenbasis of K, which is remembered: all dampings share one eigendecomposition.

    Args:
        train_train: K (N×N).
        val_train: C (M×N).
        numel: P, the number of parameters behind the Gram.
        damping: above 0, in units of the mean squared gradient entry.
        others: gives the influence of further gradients, −(1/λ)·[V Hᵀ − C·(K + Nλ)⁻¹·G Hᵀ] (M×T); None: of the train
            samples.

    Returns:
        I (M×N) in float64; negative is helpful. Zero train gradients (λ = 0) give zero.
    """
    lam = damping_lambda(train_train, numel=numel, damping=damping)
    num_train, gram_MN = len(train_train), val_train.double()
    if lam == 0:
        return torch.zeros_like(gram_MN if others is None else others.validation.double())
    spectrum_N, basis_NN = eigenbasis(train_train)
    solved_MN = (gram_MN @ basis_NN / (spectrum_N + num_train * lam)) @ basis_NN.T
    if others is None:
        return -num_train * solved_MN
    return (solved_MN @ others.train.double() - others.validation.double()) / lam


@dataclass(frozen=True, kw_only=True)
class Exact(DampedEstimator):
    """The influence that DataInf and LiSSA approximate. On Grams it costs an eigendecomposition (N×N) per matrix."""

    def influence(self, gram: MatrixGram) -> Tensor:
        return exact(gram.train_train, gram.val_train, numel=gram.numel, damping=self.relative_damping(gram))

    def influence_of(self, gram: MatrixGram, others: CrossGram) -> Tensor:
        damping = self.relative_damping(gram)
        return exact(gram.train_train, gram.val_train, numel=gram.numel, damping=damping, others=others)
