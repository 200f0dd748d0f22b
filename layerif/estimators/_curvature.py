"""The way from a Fisher matrix in factors to the scores of all layers, which K-FAC, EK-FAC and Shampoo share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from layerif.estimators._base import (
    Damping,
    DampingRule,
    InfluenceEstimator,
    Normalisation,
    by_block,
    name_of,
    warn_of_zero,
)
from layerif.evidence import LEAST_DAMPING, MOST_DAMPING, LayerCurvature
from layerif.probe.request import Request
from layerif.scores import Aggregation, LayerScores


@dataclass(frozen=True, kw_only=True)
class CurvatureEstimator(InfluenceEstimator):
    """An estimator by an approximation of the Fisher matrix, under the name of its file in `MatrixCurvature`.

    A matrix whose train gradients are all zero has no influence; a RuntimeWarning names it.

    Attributes:
        damping, damping_rule: as for the damped estimators on Grams. λ is added to every eigenvalue, whose mean is the
            mean squared gradient entry.
    """

    aggregation: Aggregation = "all"
    normalisation: Normalisation = "none"
    damping: Damping = 0.1
    damping_rule: DampingRule = "relative"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping_rule == "relative" and not LEAST_DAMPING <= self.damping <= MOST_DAMPING:
            raise ValueError(
                f"estimator.damping={self.damping:g} is out of the range that is measured for {name_of(self)}, "
                f"{LEAST_DAMPING:g} to {MOST_DAMPING:g}; choose one inside, or an estimator on Grams, such as exact"
            )

    @property
    def needs_of_rows(self) -> Request:
        asked: dict[str, Any] = {"dampings": (self.damping,)} if self.damping_rule == "relative" else {}
        return replace(self.needs, spectra=(name_of(self),), queries="each", **asked)

    def by_layer(self, evidence: LayerCurvature, /) -> dict[str, Tensor]:
        return by_block(self.influences(evidence), evidence.layers)

    def influences(self, evidence: LayerCurvature) -> dict[str, Tensor]:
        """Gives I of every matrix on every query (Q×N), by its name."""
        is_relative, found = self.damping_rule == "relative", {}
        for param, matrix in evidence.matrices.items():
            try:
                found[param] = matrix.influence(name_of(self), self.damping, relative=is_relative)
            except ValueError as error:
                raise ValueError(f"{param}: {error}; or use estimator.damping_rule=relative") from None
        return found

    def score(self, evidence: LayerCurvature, /) -> LayerScores:
        zero = [param for param, matrix in evidence.matrices.items() if matrix.mean_square == 0]
        warn_of_zero(zero, len(evidence.matrices))
        return self.scores(self.by_layer(evidence), evidence.layers, evidence.fingerprint)
