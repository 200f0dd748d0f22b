"""Block influence (ShortGPT, Men et al., 2024): the angle by which a block turns the hidden state."""

from __future__ import annotations

from dataclasses import dataclass

from layerif.estimators._base import layer_scores
from layerif.evidence import LayerActivations
from layerif.probe.activations import Activations
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class BlockInfluence:
    """Scores a block by 1 − E_t cos(x_in, x_out) of its input and output; a block that turns it is important.

    The score lies in [0, 2] and is 0 for a block that does nothing.
    """

    needs = Activations()

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        values = (max(0.0, 1 - cosine) for cosine in evidence.cosines.tolist())  # rounding may exceed 1
        return layer_scores(self, evidence, values, "important")
