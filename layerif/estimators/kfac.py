"""K-FAC (Martens and Grosse, 2015): the Fisher as a Kronecker product of two moments, with the labels of the rows.

It takes a layer's inputs and output gradients to be independent of one another. `layerif/probe/curvature/` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerif.estimators._curvature import CurvatureEstimator
from layerif.probe.curvature.request import Curvature


@dataclass(frozen=True, kw_only=True)
class Kfac(CurvatureEstimator):
    """Scores a block by the influence of its matrices under K-FAC, measured together with EK-FAC."""

    needs = Curvature(("kfac", "ekfac"))
