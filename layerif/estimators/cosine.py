"""Gradient cosine: the agreement in direction of train and validation gradients. M, N, K, C: see `_base.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerif.estimators._base import GramEstimator, Reads
from layerif.evidence import CrossGram, MatrixGram


def cosine(train_train: Tensor, val_train: Tensor, val_norms: Tensor) -> Tensor:
    """Gives I_ji = −C_ji / (‖v_j‖·√k_i) with k = diag K. A sample with a zero gradient has no influence.

    Args:
        train_train: K (N×N).
        val_train: C (M×N).
        val_norms: ‖v_j‖ (M).

    Returns:
        I (M×N) in float64, in [−1, 1]; negative is helpful.
    """
    return _by_length(val_train, val_norms, train_train.diagonal().double().sqrt())


@dataclass(frozen=True, kw_only=True)
class Cosine(GramEstimator):
    """The gradient dot product without the gradients' lengths. It does not grow with the number of parameters."""

    reads: ClassVar[Reads] = "diagonal"

    def influence(self, gram: MatrixGram) -> Tensor:
        return cosine(gram.train_train, gram.val_train, gram.val_norms)

    def influence_of(self, gram: MatrixGram, others: CrossGram) -> Tensor:
        return _by_length(others.validation, gram.val_norms, others.norms.double())


def _by_length(product_MT: Tensor, norms_M: Tensor, norms_T: Tensor) -> Tensor:
    norms_MT = norms_M.double()[:, None] * norms_T
    return torch.where(norms_MT > 0, -product_MT.double() / norms_MT, 0.0)
