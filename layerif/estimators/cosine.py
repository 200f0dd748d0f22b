"""Gradient cosine: the agreement in direction of train and validation gradients. M, N, K, C: see `_base.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.estimators._base import GramEstimator
from layerif.evidence import MatrixGram


def cosine(train_train: Tensor, val_train: Tensor, val_norms: Tensor) -> Tensor:
    """Gives I_ji = −C_ji / (‖v_j‖·√k_i) with k = diag K. A sample with a zero gradient has no influence.

    Args:
        train_train: K (N×N).
        val_train: C (M×N).
        val_norms: ‖v_j‖ (M).

    Returns:
        I (M×N) in float64, in [−1, 1]; negative is helpful.
    """
    norms_MN = val_norms.double()[:, None] * train_train.double().diagonal().sqrt()
    return torch.where(norms_MN > 0, -val_train.double() / norms_MN, 0.0)


@dataclass(frozen=True, kw_only=True)
class Cosine(GramEstimator):
    """The gradient dot product without the gradients' lengths. It does not grow with the number of parameters."""

    def influence(self, gram: MatrixGram) -> Tensor:
        return cosine(gram.train_train, gram.val_train, gram.val_norms)
