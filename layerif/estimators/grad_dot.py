"""The gradient dot product: influence with the identity for the Hessian. M, N, C: see `_base.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerif.estimators._base import GramEstimator, Reads
from layerif.evidence import CrossGram, MatrixGram


def grad_dot(val_train: Tensor) -> Tensor:
    """Gives I = −C (M×N) in float64; negative is helpful."""
    return -val_train.double()


@dataclass(frozen=True, kw_only=True)
class GradDot(GramEstimator):
    """The first-order change of the validation loss under one gradient step."""

    reads: ClassVar[Reads] = "diagonal"

    def influence(self, gram: MatrixGram) -> Tensor:
        return grad_dot(gram.val_train)

    def influence_of(self, gram: MatrixGram, others: CrossGram) -> Tensor:
        return grad_dot(others.validation)
