"""DataInf (Kwon et al., ICLR 2024): influence with the inverse moved inside the average over samples.

H⁻¹ ≈ (1/N) Σ_i (g_i g_iᵀ + λ)⁻¹, where Sherman–Morrison solves every term. N, M, P, K, C: see `_base.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerif.estimators._base import DampedEstimator, Reads, damping_lambdas
from layerif.evidence import CrossGram, MatrixGram


def datainf(
    train_train: Tensor, val_train: Tensor, *, numel: int, damping: float, others: CrossGram | None = None
) -> Tensor:
    """Gives I = −(1/λ)·[C − (1/N)·C·diag(1/(λ + k))·K] with k = diag K and λ = damping · tr K/(N·P).

    Args:
        train_train: K (N×N), or a batch of matrices of the same size (…×N×N).
        val_train: C (M×N), or a batch (…×M×N).
        numel: P, the number of parameters behind each Gram.
        damping: above 0, in units of the mean squared gradient entry.
        others: gives the influence of further gradients (M×T); then only the diagonal of K is read. None: of the train
            samples.

    Returns:
        I (…×M×N) in float64; negative is helpful. Zero train gradients (λ = 0) give zero.
    """
    lam_11 = damping_lambdas(train_train, numel=numel, damping=damping)[..., None, None]
    gram_MN, square_N = val_train.double(), train_train.diagonal(dim1=-2, dim2=-1).double()
    cross_NT = (train_train if others is None else others.train).double()
    cross_MT = gram_MN if others is None else others.validation.double()
    damped_1N = lam_11 + square_N[..., None, :]
    influence_MT = ((gram_MN / damped_1N) @ cross_NT / square_N.shape[-1] - cross_MT) / lam_11
    return influence_MT.where(lam_11 > 0, 0.0)


@dataclass(frozen=True, kw_only=True)
class DataInf(DampedEstimator):
    """The paper's estimator. It takes one product of small matrices and no eigendecomposition."""

    reads: ClassVar[Reads] = "columns"

    def influence(self, gram: MatrixGram) -> Tensor:
        return datainf(gram.train_train, gram.val_train, numel=gram.numel, damping=self.relative_damping(gram))

    def influence_of(self, gram: MatrixGram, others: CrossGram) -> Tensor:
        damping = self.relative_damping(gram)
        return datainf(gram.train_train, gram.val_train, numel=gram.numel, damping=damping, others=others)
