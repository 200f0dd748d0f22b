"""Layer significance in alignment (ILA, Shi et al., 2024): a gate per block on what a fine-tune changed there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerif.evidence import LayerGates
from layerif.scores import LayerScores


def gated(base: Tensor, adapted: Tensor, score: Tensor) -> Tensor:
    """base + σ(s)·(adapted − base): the output of a linear layer whose change Δθ counts by σ(s)."""
    return base + score.sigmoid().to(base.dtype) * (adapted - base)


@dataclass(frozen=True, kw_only=True)
class Ila:
    """The gates σ(s) learned with the adapter Δθ of `model.adapter` frozen: a block of a high gate is important.

    num_steps, learning_rate, samples_per_step: of gradient descent on the L scores s, over the train samples of the
    probe. Their loss is to be the one the adapter was trained with: `probe.loss_on` as `data.loss_on` was then.
    start: the first value of every s; 0 is half of the change, where a gate moves most easily (4 is nearly the
    fine-tuned model, σ(4) = 0.982, and moves 14 times as slowly).
    """

    needs: ClassVar[str] = "training"

    num_steps: int = 50
    samples_per_step: int = 8
    learning_rate: float = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        for setting in ("num_steps", "samples_per_step"):
            if getattr(self, setting) < 1:
                raise ValueError(f"estimator.{setting}={getattr(self, setting)} must be at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"estimator.learning_rate={self.learning_rate} must be finite and > 0")
        if not math.isfinite(self.start):
            raise ValueError(f"estimator.start={self.start} must be finite; 0 is half of the change")

    def score(self, evidence: LayerGates, /) -> LayerScores:
        values = tuple(evidence.scores.double().sigmoid().tolist())
        source = (
            f"ila(num_steps={self.num_steps}, samples_per_step={self.samples_per_step}, "
            f"learning_rate={self.learning_rate:g}, start={self.start:g})"
        )
        return LayerScores(evidence.layers.names, values, "important", source, evidence.fingerprint)
