"""Power-law exponents of the weights' spectra (AlphaLoRA, AlphaPruning): without data and without a pass.

Letters: λ_1 ≤ … ≤ λ_N the non-zero eigenvalues of WᵀW, i the start of the tail, n = N − i + 1 its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from layerif.checks import check_choice, check_fields
from layerif.estimators._base import layer_scores
from layerif.evidence import LayerSpectra
from layerif.probe.spectra import Spectra
from layerif.scores import LayerScores

Tail = Literal["mid", "peak", "peak_upstream"]

LEAST = 10  # non-zero eigenvalues an exponent may be fitted to
_BINS = 100


def hill(eigenvalues: Tensor, start: int) -> float:
    """Gives α = 1 + n/(Σ_{j≥i} ln λ_j − n·ln λ_i), Hill's estimate for a density ∝ λ^−α above λ_i.

    Args:
        eigenvalues: ascending, all above zero.
        start: i, counted from 0.

    Returns:
        The exponent; infinite where the tail is a single value, repeated.
    """
    logs_n = eigenvalues[start:].double().log()
    excess = float((logs_n - logs_n[0]).sum())
    return 1 + len(logs_n) / excess if excess > 0 else float("inf")


def distance(eigenvalues: Tensor, start: int) -> float:
    """Gives the Kolmogorov–Smirnov distance max_j |1 − (λ_j/λ_i)^(1−α) − (j−i)/n| of a tail to its Hill estimate."""
    tail_n = eigenvalues[start:].double()
    fitted_n = 1 - (tail_n / tail_n[0]) ** (1 - hill(eigenvalues, start))
    empirical_n = torch.arange(len(tail_n), dtype=torch.float64, device=tail_n.device) / len(tail_n)
    return float((fitted_n - empirical_n).abs().max())


def alpha(eigenvalues: Tensor, fit: Tail = "mid") -> float:
    """Fits the exponent of one matrix.

    Args:
        eigenvalues: those of WᵀW, in any order.
        fit: the start of the tail. `mid` takes the median, i = N/2. `peak` takes the start between 0.95 and 1.5 times
            the mode of log₁₀ λ (the left edge of the fullest of 100 bins) whose tail fits best by `distance`, the lower
            of equals. `peak_upstream` is the code released with AlphaLoRA and AlphaPruning, whose lower bound is
            log₁₀(0.95·mode), compared with the eigenvalues themselves, so that it tries starts far below the mode.

    Raises:
        ValueError: for fewer than ten non-zero eigenvalues, and where no tail has any spread.
    """
    check_choice("estimator.fit", fit, get_args(Tail))
    sorted_N = eigenvalues.double().sort().values
    if not bool(sorted_N.isfinite().all()):
        raise ValueError("the eigenvalues are not finite, so the weights are not; look at the checkpoint")
    # Singular values below N·eps·σ_max are the rounding of zero in a float32 decomposition.
    noise = float(sorted_N[-1]) * (len(sorted_N) * torch.finfo(torch.float32).eps) ** 2
    positive_N = sorted_N[sorted_N > noise]
    if len(positive_N) < LEAST:
        raise ValueError(
            f"an exponent needs at least {LEAST} non-zero eigenvalues, got {len(positive_N)} of {len(sorted_N)}; "
            "leave such models to another estimator"
        )
    starts = [len(positive_N) // 2] if fit == "mid" else _near_mode(positive_N, upstream=fit == "peak_upstream")
    exponents = {start: found for start in starts if (found := hill(positive_N, start)) < float("inf")}
    if not exponents:
        raise ValueError("the eigenvalues have no spread to fit an exponent to: all are equal; use another estimator")
    return exponents[min(exponents, key=lambda start: (distance(positive_N, start), start))]


@dataclass(frozen=True, kw_only=True)
class Alpha:
    """Scores a block by the mean α of its matrices: all its linear layers, under every `probe.scope`.

    A large α, a light tail, marks a block that training changed little: it is undertrained. AlphaLoRA's experts are α^β
    without shift, `allocator.shift=none`; AlphaPruning's sparsities are the linear map of `allocator=sparsity` without
    smoothing.

    Attributes:
        fit: see `alpha`.
    """

    needs = Spectra()

    fit: Tail = "mid"

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerSpectra, /) -> LayerScores:
        values = []
        for params in evidence.layers.params:
            exponents = [self._exponent(param, evidence.eigenvalues[param]) for param in params]
            values.append(sum(exponents) / len(exponents))
        return layer_scores(self, evidence, values, "undertrained")

    def _exponent(self, param: str, eigenvalues: Tensor) -> float:
        try:
            return alpha(eigenvalues, self.fit)
        except ValueError as error:
            raise ValueError(f"{param}: {error}") from error


def _near_mode(positive_N: Tensor, *, upstream: bool) -> list[int]:
    logs_N = positive_N.log10()
    low, high = float(logs_N[0]), float(logs_N[-1])
    counts = torch.histc(logs_N, _BINS, min=low, max=high)
    mode = 10 ** float(torch.linspace(low, high, _BINS + 1, dtype=torch.float64)[int(counts.argmax())])
    least = torch.tensor(0.95 * mode).log10() if upstream else 0.95 * mode
    near = (positive_N >= least) & (positive_N <= 1.5 * mode)
    near[-1] = False  # a tail of one value has no spread
    return near.nonzero().flatten().tolist()
