"""AVSS on right answers less AVSS on wrong answers, a measure of our own.

Song et al. call an extension of AVSS to hallucinations EAVSS. No text that can be found gives its equations, so this is
not EAVSS.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from layerif.estimators._base import layer_scores
from layerif.estimators.avss import Avss, avss
from layerif.evidence import LayerActivations
from layerif.scores import LayerScores


def avss_contrast(right: Tensor, wrong: Tensor) -> Tensor:
    """Gives AVSS over the tokens of right answers less AVSS over those of wrong answers.

    A sample counts where it has tokens of both.

    Args:
        right: the moments of the right answers (L×S×4), see `LayerActivations.moments`.
        wrong: those of the wrong answers (L×S×4).

    Returns:
        Numbers (L) in [−1, 1] that sum to 0.

    Raises:
        ValueError: no sample has both answers.
    """
    has_both_S = (right[0, :, 0] > 0) & (wrong[0, :, 0] > 0)
    if not bool(has_both_S.any()):
        raise ValueError(
            f"none of {len(has_both_S)} samples has a right and a wrong answer to compare; use a task whose rows have "
            "options, or raise probe.max_length if their answers are cut off"
        )
    first_L, second_L = (_avss_of(moments_LS4[:, has_both_S].sum(1)) for moments_LS4 in (right, wrong))
    return first_L - second_L


def _avss_of(moments_L4: Tensor) -> Tensor:
    entries_L, sums_L, squares_L, near_L = moments_L4.unbind(1)
    variances_L = (squares_L / entries_L - (sums_L / entries_L).square()).clamp(min=0)
    return avss(variances_L, near_L / entries_L, num_entries=int(entries_L[0]))


@dataclass(frozen=True, kw_only=True)
class AvssContrast(Avss):
    """Scores a block by its AVSS contrast, from the lowest one upwards. A block with more of it is important."""

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        evidence.check_epsilon(self.epsilon)
        contrasts_L = avss_contrast(evidence.moments["right"], evidence.moments["wrong"])
        # Scores are not negative, so the lowest contrast becomes 0; order and differences stay.
        values_L = contrasts_L - contrasts_L.min()
        return layer_scores(self, evidence, values_L.tolist(), "important", epsilon=f"{self.epsilon:g}")
