"""The accuracy of the damped estimators: do they solve their system I·(K/N + λ) = −C?

N, M, K and C are explained in `estimators/_base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.estimators._base import DampedEstimator, damping_lambda, eigenbasis
from layerif.estimators.exact import exact
from layerif.estimators.lissa import Lissa, step_bound
from layerif.evidence import LayerGrams, MatrixGram


@dataclass(frozen=True)
class Solved:
    """The error of one estimator on the system of one matrix.

    Attributes:
        matrix: the name of the matrix.
        residual: ‖I·(K/N + λ) + C‖/‖C‖.
        off: ‖I − I_exact‖/‖I_exact‖.
        condition: the condition number (σmax/N + λ)/λ of the system.
        rounding: the size of the most negative eigenvalue of K, over Nλ. K is positive semi-definite, so that an
            eigenvalue below zero is noise of float32, which adds to the damping.
        step: LiSSA's α; None for the other estimators.
    """

    matrix: str
    residual: float
    off: float
    condition: float
    rounding: float
    step: float | None = None


def residual(influence_MN: Tensor, gram: MatrixGram, *, damping: float) -> float:
    """Returns ‖I·(K/N + λ) + C‖/‖C‖ (Frobenius) with λ = damping · tr K/(N·P), and 0 for zero gradients.

    K is taken as the solvers take it: symmetric, and with negative eigenvalues set to zero.
    """
    lam = damping_lambda(gram.train_train, numel=gram.numel, damping=damping)
    wanted_MN = gram.val_train.double()
    size = float(wanted_MN.norm())
    if lam == 0 or size == 0:
        return 0.0
    spectrum_N, basis_NN = eigenbasis(gram.train_train)
    turned_MN = influence_MN.double() @ basis_NN * (spectrum_N / len(spectrum_N) + lam)
    return float((turned_MN + wanted_MN @ basis_NN).norm()) / size


def solver_residuals(estimator: DampedEstimator, grams: LayerGrams) -> list[Solved]:
    """Returns the error on every matrix that has a gradient, in the model's order."""
    solvable = estimator.solvable(grams).grams
    influences = estimator.influences(solvable)
    return [
        _solved(estimator, name, gram, influences)
        for name, gram in solvable.items()
        if gram.train_train.any() and gram.val_train.any()
    ]


def _solved(estimator: DampedEstimator, name: str, gram: MatrixGram, influences: Mapping[str, Tensor]) -> Solved:
    damping = estimator.relative_damping(gram)
    lam = damping_lambda(gram.train_train, numel=gram.numel, damping=damping)
    exact_MN = exact(gram.train_train, gram.val_train, numel=gram.numel, damping=damping)
    spectrum_N = torch.linalg.eigvalsh((gram.train_train + gram.train_train.T).double() / 2)
    num_train = len(spectrum_N)
    step = None
    if isinstance(estimator, Lissa):
        bound = step_bound(gram.train_train, numel=gram.numel, damping=damping)
        step = bound / 2 if estimator.step_size is None else estimator.step_size
    return Solved(
        matrix=name,
        residual=residual(influences[name], gram, damping=damping),
        off=float((influences[name] - exact_MN).norm() / exact_MN.norm()),
        condition=(float(spectrum_N[-1]) / num_train + lam) / lam,
        rounding=max(0.0, -float(spectrum_N[0])) / (num_train * lam),
        step=step,
    )
