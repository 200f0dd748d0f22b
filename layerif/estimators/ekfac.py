"""EK-FAC (George et al., 2018): the eigenvectors of K-FAC, with the Fisher's own eigenvalues there.

The Fisher is the empirical one, with the labels of the rows. `layerif/probe/curvature/` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerif.estimators._curvature import CurvatureEstimator
from layerif.probe.curvature.request import Curvature


@dataclass(frozen=True, kw_only=True)
class Ekfac(CurvatureEstimator):
    """Scores a block by the influence of its matrices under EK-FAC, measured together with K-FAC."""

    needs = Curvature(("kfac", "ekfac"))
