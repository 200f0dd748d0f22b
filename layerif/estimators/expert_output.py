"""The part of the hidden state that an expert adds, from one forward pass (`layerif/probe/expert_outputs.py`)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

from layerif.checks import Seed, check_fields, listed
from layerif.estimators._base import layer_scores
from layerif.evidence import LayerExperts
from layerif.probe.expert_outputs import ExpertOutputs
from layerif.pruning.calibration import Calibration
from layerif.scores import LayerScores


@dataclass(frozen=True, kw_only=True)
class ExpertOutput:
    """Scores every expert by the mean of g·‖f‖₂, with g the weight that the router gives it and f its output.

    Attributes:
        mean_over: `all` tokens, which is the frequency of the expert times the mean over its own, or the `routed` ones
            alone, as REAP (Lasby et al., ICLR 2026) takes it.
        calibration: the windows that are read; None: 16 windows of 256 tokens of the embedded documentation.
        seed: chooses the windows where `calibration` is None.
    """

    mean_over: Literal["all", "routed"] = "all"
    calibration: Calibration | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    @property
    def needs(self) -> ExpertOutputs:
        return ExpertOutputs(self.calibration or Calibration(seed=self.seed))

    def score(self, evidence: LayerExperts, /) -> LayerScores:
        names = evidence.layers.names
        unreached = [name for name, count in zip(names, evidence.counts.tolist(), strict=True) if not count]
        if len(unreached) == len(names):
            raise ValueError("no calibration token is sent to any expert; look at the routers of this model")
        if unreached:
            warnings.warn(
                f"no calibration token reaches {listed(unreached, 4)} ({len(unreached)} of {len(names)} experts), so "
                "that their score is 0",
                RuntimeWarning,
                stacklevel=2,
            )
        counts = evidence.counts.clamp(min=1) if self.mean_over == "routed" else evidence.num_tokens
        values = (evidence.sums / counts).tolist()
        return layer_scores(self, evidence, values, "important", calibration=(self.calibration or Calibration()).text)
