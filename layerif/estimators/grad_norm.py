"""The norm of the task's mean gradient, a zero-cost proxy that the Grams hold already. N, K: see `_base.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from layerif.estimators._base import NormEstimator


def grad_norm(train_train: Tensor) -> float:
    """Gives ‖1/N Σ_i g_i‖ = √(1ᵀK1)/N."""
    return math.sqrt(max(0.0, float(train_train.double().sum()))) / len(train_train)


@dataclass(frozen=True, kw_only=True)
class GradNorm(NormEstimator):
    """Scores a block by the norm of its mean gradient; under `numel` this is its root mean square entry."""

    def size(self, train_train: Tensor, *, numel: int) -> float:
        return grad_norm(train_train) / math.sqrt(numel)
