"""Activation variance over activation sparsity (AVSS, Song et al., 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerif.evidence import LayerActivations
from layerif.scores import LayerScores


def avss(variances: Tensor, sparsities: Tensor, *, num_entries: int) -> Tensor:
    """(σ²_l/p_l) / Σ_k (σ²_k/p_k): (L), summing to 1 (to 0 where nothing varies).

    variances: σ² of the block's output; sparsities: the fraction of its `num_entries` entries near zero. One more entry
    near zero is counted, so that a block without any is not divided by zero: p = (count + 1)/(num_entries + 1).
    """
    ratios_L = variances / ((sparsities * num_entries + 1) / (num_entries + 1))
    total = ratios_L.sum()
    return ratios_L / total if total > 0 else ratios_L


@dataclass(frozen=True, kw_only=True)
class Avss:
    """epsilon: an entry of the block's output counts as zero where |a| < ε; in the unit of the hidden state.

    A block whose output varies much and is seldom zero is important.
    """

    needs: ClassVar[str] = "activations"

    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"estimator.epsilon={self.epsilon} must be finite and > 0")

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        if evidence.epsilon != self.epsilon:
            raise ValueError(
                f"the activations were counted below {evidence.epsilon}, not below estimator.epsilon={self.epsilon}; "
                "take them again"
            )
        values_L = avss(evidence.variances, evidence.sparsities, num_entries=evidence.num_entries)
        source = f"avss(epsilon={self.epsilon:g})"
        return LayerScores(evidence.layers.names, tuple(values_L.tolist()), "important", source, evidence.fingerprint)
