"""The trace of the empirical Fisher matrix, a zero-cost proxy that the Grams hold already. N, K: see `_base.py`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from layerif.estimators._base import NormEstimator


def fisher_trace(train_train: Tensor) -> float:
    """Gives tr F = tr K/N, the mean squared norm of the train gradients."""
    return float(train_train.double().trace()) / len(train_train)


@dataclass(frozen=True, kw_only=True)
class FisherTrace(NormEstimator):
    """Scores a block by tr F; under `numel` this is the mean squared gradient entry."""

    def size(self, train_train: Tensor, *, numel: int) -> float:
        return fisher_trace(train_train) / numel
