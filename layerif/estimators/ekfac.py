"""EK-FAC (George et al., 2018): the Fisher in the eigenbasis of its Kronecker factors, with that basis' own spectrum.

It needs inputs and output gradients token by token, so that Grams are not enough: `layerif/ekfac.py` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from layerif.checks import check_choice
from layerif.estimators._base import DampingRule, InfluenceEstimator, Normalisation, by_block, check_damping
from layerif.evidence import LayerInfluences
from layerif.scores import Aggregation, LayerScores


@dataclass(frozen=True, kw_only=True)
class Ekfac(InfluenceEstimator):
    """damping, damping_rule: as for the damped estimators on Grams; λ is added to the corrected spectrum, whose mean is
    the mean squared gradient entry. Another damping is another measurement.
    """

    needs: ClassVar[str] = "curvature"

    aggregation: Aggregation = "all"
    normalisation: Normalisation = "none"
    damping: float = 0.1
    damping_rule: DampingRule = "relative"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        check_choice("estimator.damping_rule", self.damping_rule, get_args(DampingRule))

    def score(self, evidence: LayerInfluences, /) -> LayerScores:
        return self.scores(by_block(evidence.influences, evidence.layers), evidence.layers, evidence.fingerprint)
