"""The gain that a block's mean gradient promises under its own curvature (MDL, Amaefuna et al., 2026).

N train samples, P parameters of a matrix, G (N×P) its per-sample gradients, K = G Gᵀ: see `_base.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from layerif.checks import check_fields
from layerif.estimators._base import (
    Damping,
    DampingRule,
    damping_lambda,
    eigenbasis,
    layer_scores,
    relative_damping,
    warn_of_zero_gradients,
)
from layerif.evidence import LayerGrams
from layerif.probe.grams.request import Grams
from layerif.scores import LayerScores

_SATURATED = 0.99


def quadratic_gain(train_train: Tensor, *, numel: int, damping: float) -> float:
    """Gives q = ḡᵀ(λ + GᵀG/N)⁻¹ḡ = (1/N²)·1ᵀK(K/N + λ)⁻¹1 with ḡ = Gᵀ1/N and λ = damping · tr K/(N·P).

    q/2 is the most that the quadratic model of the loss, with the damped Fisher for its Hessian, can fall. GᵀG/N is at
    least ḡḡᵀ, so that q lies in [0, 1). Where a matrix has more parameters than samples, q comes near 1 as the damping
    falls; for a large damping it is ‖ḡ‖²/λ.

    Args:
        train_train: K (N×N).
        numel: P, the number of parameters behind the Gram.
        damping: above 0, in units of the mean squared gradient entry.

    Returns:
        q; zero train gradients (λ = 0) give zero.
    """
    lam, num_train = damping_lambda(train_train, numel=numel, damping=damping), len(train_train)
    if lam == 0:
        return 0.0
    spectrum_N, basis_NN = eigenbasis(train_train)
    return float((basis_NN.sum(dim=0).square() * spectrum_N / (spectrum_N / num_train + lam)).sum()) / num_train**2


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """Scores a block by the sum of its matrices' gains q; a block of high gain is important.

    `allocator=water_filling` spends them as published.

    Attributes:
        damping, damping_rule: as for the damped estimators, see `quadratic_gain` for what the damping does.
    """

    needs = Grams()

    damping: Damping = 0.1
    damping_rule: DampingRule = "relative"

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerGrams, /) -> LayerScores:
        grams = evidence.in_float64.grams
        warn_of_zero_gradients(grams)
        gains = {
            name: quadratic_gain(
                gram.train_train, numel=gram.numel, damping=relative_damping(gram, self.damping, self.damping_rule)
            )
            for name, gram in grams.items()
        }
        _warn_of_saturation(gains)
        values = (math.fsum(gains[param] for param in params) for params in evidence.layers.params)
        return layer_scores(self, evidence, values, "important")


def _warn_of_saturation(gains: Mapping[str, float]) -> None:
    """Warns where the gains of all matrices come so near 1 that they tell none apart."""
    least = min(gains.values())
    if least > _SATURATED:
        warnings.warn(
            f"the gains hardly differ: q is at least {least:.4f} in each of {len(gains)} matrices, and below 1; it "
            "comes near 1 wherever a matrix has more parameters than there are samples; raise estimator.damping",
            RuntimeWarning,
            stacklevel=3,
        )
