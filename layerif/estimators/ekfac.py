"""EK-FAC (George et al., 2018): the Fisher in the eigenbasis of its Kronecker factors, with that basis' own spectrum.

It needs inputs and output gradients token by token, so that Grams are not enough: `layerif/probe/ekfac.py` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerif.estimators._base import Damping, DampingRule, InfluenceEstimator, Normalisation, by_block
from layerif.evidence import LayerInfluences
from layerif.probe.ekfac import Curvature
from layerif.scores import Aggregation, LayerScores


@dataclass(frozen=True, kw_only=True)
class Ekfac(InfluenceEstimator):
    """Scores a block by the influence of its matrices under EK-FAC.

    Attributes:
        damping, damping_rule: as for the damped estimators on Grams. λ is added to the corrected spectrum, whose mean
            is the mean squared gradient entry. Another damping is another measurement.
    """

    aggregation: Aggregation = "all"
    normalisation: Normalisation = "none"
    damping: Damping = 0.1
    damping_rule: DampingRule = "relative"

    @property
    def needs(self) -> Curvature:
        return Curvature(self.damping, self.damping_rule)

    def score(self, evidence: LayerInfluences, /) -> LayerScores:
        return self.scores(by_block(evidence.influences, evidence.layers), evidence.layers, evidence.fingerprint)
