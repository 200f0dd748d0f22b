"""Uniform scores: every layer the same, the baseline that measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from layerif.estimators._base import described
from layerif.layers import LayerMap
from layerif.probe.nothing import Nothing
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Gives every layer the score 1."""

    needs = Nothing()

    def score(self, evidence: LayerMap, /) -> LayerScores:
        return LayerScores(evidence.names, (1.0,) * len(evidence.names), "undertrained", described(self), "none")
