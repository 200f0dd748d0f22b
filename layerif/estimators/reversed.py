"""Any other estimator's scores upside down: if they mean something, this control must do worse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from layerif.estimators import Estimator
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Reversed:
    """s ↦ min s + (max s − s): order turned round, range, gaps, ties and direction kept; done twice it changes nothing.

    of: the estimator whose scores are turned round; the evidence is what that one needs.
    """

    needs: ClassVar[Any] = property(lambda self: self.of.needs)

    of: Estimator

    def score(self, evidence: Any, /) -> LayerScores:
        scores = self.of.score(evidence)
        low, high = min(scores.values), max(scores.values)
        values = tuple(low + (high - value) for value in scores.values)
        return replace(scores, values=values, source=f"reversed({scores.source})")

    def __getattr__(self, name: str) -> Any:
        """What the shell asks of an estimator besides its scores (path, checkpoints) is the wrapped one's."""
        if name == "of" or name.startswith("__"):  # not set yet, as in a copy being made
            raise AttributeError(name)
        return getattr(self.of, name)
