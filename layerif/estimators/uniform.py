"""Uniform scores: every layer the same, the baseline that measures nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.layers import LayerMap
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Score 1 for every layer."""

    needs: ClassVar[str] = "nothing"

    def score(self, evidence: LayerMap, /) -> LayerScores:
        return LayerScores(evidence.names, (1.0,) * len(evidence.names), "undertrained", "uniform", "none")
