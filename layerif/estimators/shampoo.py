"""Shampoo (Gupta et al., 2018): the Fisher as a Kronecker product of the roots of the gradients' two moments.

The Fisher is the empirical one, with the labels of the rows. `layerif/probe/curvature/` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerif.estimators._curvature import CurvatureEstimator
from layerif.probe.curvature.request import Curvature


@dataclass(frozen=True, kw_only=True)
class Shampoo(CurvatureEstimator):
    """Scores a block by the influence of its matrices under Shampoo's curvature."""

    needs = Curvature(("shampoo",))
