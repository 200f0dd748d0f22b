"""DataInf (Kwon et al., ICLR 2024): influence with the inverse moved inside the average over samples.

H⁻¹ ≈ (1/N) Σ_i (g_i g_iᵀ + λ)⁻¹, where Sherman–Morrison solves every term. N, M, P, K, C: see `_base.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from layerif.estimators._base import DampedEstimator, damping_lambdas
from layerif.evidence import MatrixGram


def datainf(train_train: Tensor, val_train: Tensor, *, numel: int, damping: float) -> Tensor:
    """Gives I = −(1/λ)·[C − (1/N)·C·diag(1/(λ + k))·K] with k = diag K and λ = damping · tr K/(N·P).

    Args:
        train_train: K (N×N), or a batch of matrices of the same size (…×N×N).
        val_train: C (M×N), or a batch (…×M×N).
        numel: P, the number of parameters behind each Gram.
        damping: above 0, in units of the mean squared gradient entry.

    Returns:
        I (…×M×N) in float64; negative is helpful. Zero train gradients (λ = 0) give zero.
    """
    lam_11 = damping_lambdas(train_train, numel=numel, damping=damping)[..., None, None]
    gram_NN, gram_MN = train_train.double(), val_train.double()
    damped_1N = lam_11 + gram_NN.diagonal(dim1=-2, dim2=-1)[..., None, :]
    influence_MN = ((gram_MN / damped_1N) @ gram_NN / gram_NN.shape[-1] - gram_MN) / lam_11
    return influence_MN.where(lam_11 > 0, 0.0)


@dataclass(frozen=True, kw_only=True)
class DataInf(DampedEstimator):
    """The paper's estimator. It takes one product of small matrices and no eigendecomposition."""

    def influence(self, gram: MatrixGram) -> Tensor:
        return datainf(gram.train_train, gram.val_train, numel=gram.numel, damping=self.relative_damping(gram))
