"""The angular distance over spans of blocks (Gromov et al., 2024): a span that turns the hidden state little can go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from layerif.allocate.spans import Spans
from layerif.checks import Seed, check_fields
from layerif.estimators._base import CurveEstimator, described
from layerif.layers import LayerMap
from layerif.probe.spans import SpanAngles
from layerif.pruning.calibration import Calibration
from layerif.scores import AllocationKind


@dataclass(frozen=True, kw_only=True)
class Angular(CurveEstimator):
    """Measures (1/π)·arccos cos(x_l, x_{l+n}) for every span of n blocks from block l on, as a mean over tokens.

    Attributes:
        calibration: the windows that are read; None: 16 windows of 256 tokens of the embedded documentation.
        seed: chooses the windows where `calibration` is None.
    """

    kind: ClassVar[AllocationKind] = "blocks"

    calibration: Calibration | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    @property
    def needs(self) -> SpanAngles:
        return SpanAngles(self.calibration or Calibration(seed=self.seed))

    @property
    def source(self) -> str:
        return described(self, calibration=(self.calibration or Calibration()).text)

    def equal(self, layers: LayerMap) -> Spans:
        number = len(layers.names) + 1
        return Spans(layers.names, torch.zeros(2, number, number, dtype=torch.float64), (1, 0))

    def curves(self, evidence: Spans, /) -> Spans:
        return evidence
