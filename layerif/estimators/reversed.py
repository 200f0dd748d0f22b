"""The scores of any other estimator upside down: if they mean something, this control must do worse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from layerif.estimators import Estimator
from layerif.probe.request import Request
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Reversed:
    """Turns scores round by s ↦ min s + (max s − s). Done twice, it changes nothing.

    The order is turned round; range, gaps, ties and direction are kept.

    Attributes:
        of: the estimator whose scores are turned round. It also decides on the evidence.
    """

    of: Estimator

    @property
    def needs(self) -> Request:
        return self.of.needs

    def score(self, evidence: Any, /) -> LayerScores:
        scores = self.of.score(evidence)
        low, high = min(scores.values), max(scores.values)
        values = tuple(low + (high - value) for value in scores.values)
        return replace(scores, values=values, source=f"reversed({scores.source})")
