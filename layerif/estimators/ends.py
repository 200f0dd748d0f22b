"""The first and the last blocks: the control that knows nothing but depth."""

from __future__ import annotations

from dataclasses import dataclass

from layerif.checks import Count, check_fields
from layerif.estimators._base import described
from layerif.layers import LayerMap, depths
from layerif.probe.nothing import Nothing
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Scores the first and the last blocks 1, as important, and all others 0.

    Attributes:
        number: the blocks at either end; they must leave others between them.
    """

    needs = Nothing()

    number: Count = 2

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerMap, /) -> LayerScores:
        between = len(evidence.names) - 2 * self.number
        if len(evidence.names) < 3:
            raise ValueError("estimator=ends needs a model of three layers or more; use estimator=uniform")
        if between < 1:
            raise ValueError(
                f"estimator.number={self.number} at either end leaves none of {len(evidence.names)} layers between "
                f"them; use estimator.number<={(len(evidence.names) - 1) // 2}"
            )
        depth = depths(evidence.names)
        by_depth = sorted(evidence.names, key=depth.__getitem__)
        ends = {*by_depth[: self.number], *by_depth[-self.number :]}
        values = tuple(float(name in ends) for name in evidence.names)
        return LayerScores(evidence.names, values, "important", described(self), "none")
