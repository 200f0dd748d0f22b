"""Layer significance in alignment (ILA, Shi et al., 2024): a gate on the change that a fine-tune makes in a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerif.checks import Count, Positive, check_fields
from layerif.estimators._base import layer_scores
from layerif.evidence import LayerGates
from layerif.probe.gates import Gates
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class Ila:
    """Scores a block by its gate σ(s), learned with the adapter Δθ of `model.adapter` frozen; a high gate is important.

    The loss should be the one that the adapter was trained with: `probe.loss_on` as `data.loss_on` was then.

    Attributes:
        num_steps: steps of gradient descent on the L scores s, over the train samples of the probe.
        samples_per_step: samples behind the gradient of one step.
        learning_rate: of the descent.
        start: the first value of every s; 0 is half of the change, where a gate moves most easily (4 is nearly the
            fine-tuned model, σ(4) = 0.982, and moves 14 times as slowly).
    """

    num_steps: Count = 50
    samples_per_step: Count = 8
    learning_rate: Positive = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    @property
    def needs(self) -> Gates:
        return Gates(self.num_steps, self.samples_per_step, self.learning_rate, self.start)

    def score(self, evidence: LayerGates, /) -> LayerScores:
        values = evidence.scores.double().sigmoid().tolist()
        rounded: dict[str, Any] = {"learning_rate": f"{self.learning_rate:g}", "start": f"{self.start:g}"}
        return layer_scores(self, evidence, values, "important", **rounded)
