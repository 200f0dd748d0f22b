"""Gradient cosine: how far train and validation gradients point the same way. M, N, K, C: see `gram.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.estimators._base import GramEstimator
from layerif.evidence import MatrixGram


def cosine(train_train: Tensor, val_train: Tensor, val_norms: Tensor) -> Tensor:
    """I_ji = −C_ji / (‖v_j‖·√k_i), k = diag K: (M×N), float64, in [−1, 1]. Negative: helpful.

    train_train: K; val_train: C; val_norms: ‖v_j‖ (M). A sample with a zero gradient has influence zero.
    """
    norms_MN = val_norms.double()[:, None] * train_train.double().diagonal().sqrt()
    return torch.where(norms_MN > 0, -val_train.double() / norms_MN, 0.0)


@dataclass(frozen=True, kw_only=True)
class Cosine(GramEstimator):
    """Gradient dot without the gradients' lengths; it does not grow with the number of parameters."""

    def influence(self, gram: MatrixGram) -> Tensor:
        return cosine(gram.train_train, gram.val_train, gram.val_norms)
