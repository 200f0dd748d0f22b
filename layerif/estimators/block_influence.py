"""Block influence (ShortGPT, Men et al., 2024): how far a block turns the hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.evidence import LayerActivations
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class BlockInfluence:
    """1 − E_t cos(x_in, x_out), between the block's own input and output, in [0, 2]; 0 for a block that does nothing.

    A block that changes its input is important.
    """

    needs: ClassVar[str] = "activations"

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        values = tuple(
            max(0.0, 1 - cosine) for cosine in evidence.cosines.tolist()
        )  # rounding may exceed a cosine of 1
        return LayerScores(evidence.layers.names, values, "important", "block_influence", evidence.fingerprint)
