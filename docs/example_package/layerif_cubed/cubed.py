"""Cubed gradient dot product: an estimator that another package brings."""

from dataclasses import dataclass

from torch import Tensor

from layerif.estimators._base import GramEstimator
from layerif.evidence import MatrixGram


@dataclass(frozen=True, kw_only=True)
class Cubed(GramEstimator):
    """I = −C³."""

    def influence(self, gram: MatrixGram) -> Tensor:
        return -(gram.val_train.double() ** 3)
