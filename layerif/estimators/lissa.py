"""LiSSA (Agarwal et al., 2017): the inverse of the damped Fisher, F + λ, F = GᵀG/N, as a truncated Neumann series.

With u (M×N) for the products of the iterates with the train gradients, T steps of size α are

    u₀ = C;    u ← C + (1 − αλ)·u − (α/N)·u·K;    I = −α·u.

In K's eigenbasis, where F + λ has the eigenvalues s = σ/N + λ, they are the filter (1 − (1 − αs)^(T+1))/s, so that any
number of steps costs one eigendecomposition, that of `exact`. N, M, P, K, C: see `_base.py`.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from layerif.checks import check_value
from layerif.estimators._base import DampedEstimator, damping_lambda, eigenbasis
from layerif.evidence import CrossGram, MatrixGram

Steps = Annotated[int, Ge(1), "the reference uses 10"]
StepSize = Annotated[float, Gt(0), "null derives it from the spectrum"]

_TOLERATED = 0.1  # residual above which an influence is called unconverged


def lissa(
    train_train: Tensor,
    val_train: Tensor,
    *,
    numel: int,
    damping: float,
    num_steps: int,
    step_size: float | None = None,
) -> Tensor:
    """Gives I after T steps, −C·(1 − (1 − α(K/N + λ))^(T+1))·(K/N + λ)⁻¹ with λ = damping · tr K/(N·P).

    Args:
        train_train: K (N×N).
        val_train: C (M×N).
        numel: P, the number of parameters behind the Gram.
        damping: above 0, in units of the mean squared gradient entry.
        num_steps: T.
        step_size: α. The series converges, to `exact`, if and only if 0 < α < 2/(σmax/N + λ). None takes half of that
            bound: every factor 1 − αs then lies in [0, 1), so that no direction oscillates and the rounding of σmax
            cannot make it diverge.

    Returns:
        I (M×N) in float64; negative is helpful. Zero train gradients (λ = 0) give zero.

    Raises:
        Diverges: a ValueError that names the bound.
    """
    return _solve(train_train, val_train, numel, damping, num_steps, step_size)[0]


def step_bound(train_train: Tensor, *, numel: int, damping: float) -> float:
    """Gives 2/(σmax/N + λ); every converging step size lies below it. It is infinite for zero gradients."""
    lam = damping_lambda(train_train, numel=numel, damping=damping)
    curvature = float(eigenbasis(train_train)[0][-1]) / len(train_train) + lam
    return 2 / curvature if curvature > 0 else math.inf


class Diverges(ValueError):
    """A step size that is not below the bound of some matrix. Grams of other samples have another bound."""


@dataclass(frozen=True, kw_only=True)
class Lissa(DampedEstimator):
    """LiSSA in closed form. Where more than a tenth of the influence is left out, a RuntimeWarning names the matrix.

    Attributes:
        num_steps: T. Steps cost nothing here, and the 10 of the reference leave 97 % of the influence out on the
            attention weights of SmolLM2-135M; 100,000 leave 10 % in the worst of its matrices.
        step_size: α, the same for every matrix; None: half of the largest converging one, matrix by matrix.
    """

    num_steps: Steps = 100_000
    step_size: StepSize | None = None

    def influence(self, gram: MatrixGram) -> Tensor:
        return self.solve(gram)[0]

    def influence_of(self, gram: MatrixGram, others: CrossGram) -> Tensor:
        damping = self.relative_damping(gram)
        settings = gram.numel, damping, self.num_steps, self.step_size
        return _solve_others(gram.train_train, gram.val_train, others, *settings)

    def influences(self, grams: Mapping[str, MatrixGram]) -> dict[str, Tensor]:
        self._refuse_divergence(grams)
        solved = {name: self.solve(gram) for name, gram in grams.items()}
        self._warn_of_residual({name: residual for name, (_, residual) in solved.items()})
        return {name: influence_MN for name, (influence_MN, _) in solved.items()}

    def solve(self, gram: MatrixGram) -> tuple[Tensor, float]:
        """Gives `lissa` and its residual ‖I − I_exact‖/‖I_exact‖ (Frobenius), which the steps after T would still add.

        A residual of 0 is converged, and 1 is as far from exact as zero influence is. Zero influence has residual 0.
        """
        damping = self.relative_damping(gram)
        return _solve(gram.train_train, gram.val_train, gram.numel, damping, self.num_steps, self.step_size)

    def _refuse_divergence(self, grams: Mapping[str, MatrixGram]) -> None:
        """Refuses a diverging step before anything is solved, by the matrix with the smallest bound."""
        if self.step_size is None:
            return
        bounds = {
            name: step_bound(gram.train_train, numel=gram.numel, damping=self.relative_damping(gram))
            for name, gram in grams.items()
        }
        tightest = min(bounds, key=bounds.__getitem__)
        _check_converges(self.step_size, bounds[tightest], f" of {tightest!r}, the smallest of {len(bounds)}")

    def _warn_of_residual(self, residuals: Mapping[str, float]) -> None:
        worst = max(residuals, key=residuals.__getitem__)
        if residuals[worst] > _TOLERATED:
            warnings.warn(
                f"LiSSA is unconverged after estimator.num_steps={self.num_steps}: its influence is off the exact one "
                f"by {residuals[worst]:.0%} in {worst!r} ({statistics.median(residuals.values()):.0%} in the median "
                f"of {len(residuals)}); take more steps, which cost no time, or estimator=exact",
                RuntimeWarning,
                stacklevel=3,
            )


def _solve(
    train_train: Tensor, val_train: Tensor, numel: int, damping: float, num_steps: int, step_size: float | None
) -> tuple[Tensor, float]:
    _check_steps(num_steps, step_size)
    lam = damping_lambda(train_train, numel=numel, damping=damping)
    gram_MN = val_train.double()
    if lam == 0:
        return torch.zeros_like(gram_MN), 0.0
    spectrum_N, basis_NN = eigenbasis(train_train)
    curvature_N = spectrum_N / len(train_train) + lam
    bound = 2 / float(curvature_N[-1])
    step = bound / 2 if step_size is None else step_size
    _check_converges(step, bound)
    exact_MN = gram_MN @ basis_NN / curvature_N  # in the eigenbasis
    taken_N, left_N = _filter(step * curvature_N, num_steps)
    size = float(exact_MN.norm())
    residual = float((exact_MN * left_N).norm()) / size if size else 0.0
    return -(exact_MN * taken_N) @ basis_NN.T, residual


def _solve_others(
    train_train: Tensor,
    val_train: Tensor,
    others: CrossGram,
    numel: int,
    damping: float,
    num_steps: int,
    step_size: float | None,
) -> Tensor:
    """Gives the influence of further gradients (M×T).

    The filter f acts as f(λ) across the train gradients and as f(s) along their directions r_a = Gᵀu_a/√σ_a, so that
    I = −[f(λ)·V Hᵀ + Σ_a (f(s_a) − f(λ))·(C u_a)(u_aᵀ G Hᵀ)/σ_a].
    """
    lam = damping_lambda(train_train, numel=numel, damping=damping)
    cross_MT = others.validation.double()
    if lam == 0:
        return torch.zeros_like(cross_MT)
    spectrum_N, basis_NN = eigenbasis(train_train)
    curvature_N = spectrum_N / len(train_train) + lam
    step = 1 / float(curvature_N[-1]) if step_size is None else step_size
    _check_converges(step, 2 / float(curvature_N[-1]))
    values_N = torch.cat([curvature_N, curvature_N.new_tensor([lam])])
    filter_N = _filter(step * values_N, num_steps)[0] / values_N
    is_direction_N = spectrum_N > spectrum_N[-1] * torch.finfo(torch.float64).eps * len(spectrum_N)
    weight_N = ((filter_N[:-1] - filter_N[-1]) / spectrum_N).where(is_direction_N, 0.0)
    along_MT = (val_train.double() @ basis_NN * weight_N) @ (basis_NN.T @ others.train.double())
    return -(filter_N[-1] * cross_MT + along_MT)


def _filter(step_N: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Gives 1 − (1 − x)^(T+1) and (1 − x)^(T+1) for 0 < x = αs < 2.

    It works with logarithms: x is about the damping over the largest eigenvalue, and 1 − x would round it away.
    """
    log_N = torch.where(step_N <= 1, (-step_N.clamp(max=1)).log1p(), (step_N - 1).clamp(min=0).log())
    power_N = (num_steps + 1) * log_N
    alternates_N = (step_N > 1) & (num_steps % 2 == 0)  # a negative base to an odd power
    taken_N = torch.where(alternates_N, 1 + power_N.exp(), -power_N.expm1())
    return taken_N, torch.where(alternates_N, -power_N.exp(), power_N.exp())


def _check_steps(num_steps: int, step_size: float | None) -> None:
    check_value("estimator.num_steps", num_steps, Steps)
    check_value("estimator.step_size", step_size, StepSize | None)


def _check_converges(step_size: float, bound: float, whose: str = "") -> None:
    if step_size >= bound:
        raise Diverges(
            f"estimator.step_size={step_size} makes LiSSA diverge: it must be below {bound:.6g}, "
            f"the bound 2/(σmax/N + λ){whose}; use a smaller one, or null for half of the bound"
        )
