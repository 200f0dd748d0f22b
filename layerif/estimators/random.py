"""Random scores: the control that any measurement has to beat."""

from __future__ import annotations

import random
from dataclasses import dataclass

from layerif.checks import Seed, check_fields
from layerif.estimators._base import described
from layerif.layers import LayerMap
from layerif.probe.nothing import Nothing
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Random:
    """Draws a score from [0, 1) for every layer, a function of the seed and the layer's name alone."""

    needs = Nothing()

    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerMap, /) -> LayerScores:
        values = tuple(random.Random(f"{self.seed} {layer}").random() for layer in evidence.names)
        return LayerScores(evidence.names, values, "undertrained", described(self), "none")
