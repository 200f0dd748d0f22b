"""Activation variance over activation sparsity (AVSS, Song et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from layerif.checks import Positive, check_fields
from layerif.estimators._base import layer_scores
from layerif.evidence import LayerActivations
from layerif.probe.activations import EPSILON, Activations
from layerif.scores import LayerScores


def avss(variances: Tensor, sparsities: Tensor, *, num_entries: int) -> Tensor:
    """Gives (σ²_l/p_l) / Σ_k (σ²_k/p_k) of every block.

    One more entry near zero is counted, so that nothing is divided by zero: p = (count + 1)/(num_entries + 1).

    Args:
        variances: σ² of each block's output (L).
        sparsities: the fraction of its entries near zero (L).
        num_entries: the number of its entries.

    Returns:
        Numbers (L) that sum to 1, or to 0 where nothing varies.
    """
    ratios_L = variances / ((sparsities * num_entries + 1) / (num_entries + 1))
    total = ratios_L.sum()
    return ratios_L / total if total > 0 else ratios_L


@dataclass(frozen=True, kw_only=True)
class Avss:
    """Scores a block by AVSS. A block whose output varies much and is seldom zero is important.

    Attributes:
        epsilon: an entry of the block's output counts as zero where |a| < ε; in the unit of the hidden state.
    """

    epsilon: Positive = EPSILON

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    @property
    def needs(self) -> Activations:
        return Activations(self.epsilon)

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        evidence.check_epsilon(self.epsilon)
        values_L = avss(evidence.variances, evidence.sparsities, num_entries=evidence.num_entries)
        return layer_scores(self, evidence, values_L.tolist(), "important", epsilon=f"{self.epsilon:g}")
