"""The measured rise of the loss where one block alone is pruned: the dear rival of loss curves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from layerif.allocate.curves import Curves, sizes_of
from layerif.checks import Seed, check_fields
from layerif.estimators._base import CurveEstimator, described
from layerif.estimators.loss_curve import check_levels
from layerif.layers import MatrixOrBlock
from layerif.probe.curves.request import WINDOWS, hash_of_windows, max_positions, source_of
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import Request
from layerif.probe.store import MeasurementKind
from layerif.pruning import Pruner
from layerif.pruning.calibration import Calibration
from layerif.pruning.trials import loss_by_block
from layerif.pruning.wanda import Wanda
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)

MEASURED_LOSS: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("measured_loss", "measured losses")


@dataclass(frozen=True)
class LossByBlock(Request):
    """A request for the loss with one block pruned, for every block and level; the first process takes it alone.

    Attributes:
        pruner: chooses the weights.
        calibration: the windows that the pruner reads, and that the loss is measured on.
        levels: the sparsities above 0, ascending.
        granularity: the units of the curves.
    """

    needs_dense_weights: ClassVar[bool] = True
    kind: ClassVar[Literal["sparsity"]] = "sparsity"
    reads_windows: ClassVar[bool] = True

    pruner: Pruner
    calibration: Calibration
    levels: Sequence[float]
    granularity: MatrixOrBlock = "block"

    @property
    def is_stepped(self) -> bool:
        """Tells if only the levels themselves can be had: n of m."""
        return bool(self.pruner.levels())

    def windows(self, measurements: Measurements) -> list[Tensor]:
        """Cuts the windows (B×T each)."""
        return self.calibration.batches(measurements.tokenizer, max_positions(measurements))

    def source(self, measurements: Measurements) -> dict[str, str]:
        """Says what the curves belong to, see `layerif.pruning.source`."""
        return source_of(measurements, self.pruner, self.windows(measurements), WINDOWS)

    def take(self, measurements: Measurements, load: Load) -> tuple[Curves, bool]:
        windows = self.windows(measurements)
        layers = measurements.layers().without(self.pruner.skip)

        def compute() -> dict[str, Tensor]:
            log.info("measured loss: %d blocks, %d levels", len(layers.names), len(self.levels))
            return {"costs": loss_by_block(measurements.whole(load), self.pruner, self.levels, windows)}

        tensors, key, reused = measurements.by_the_first(
            MEASURED_LOSS,
            compute,
            measured_loss=VERSIONS["measured_loss"],
            pruner=self.pruner.called,
            skip=list(self.pruner.skip),
            levels=list(self.levels),
            windows=hash_of_windows(windows),
        )
        units, numel = sizes_of(layers, "block")
        levels = (0.0, *self.levels)
        sizes_UK = torch.tensor(numel, dtype=torch.float64)[:, None] * torch.tensor(levels, dtype=torch.float64)
        costs_UK = torch.cat([torch.zeros(len(units), 1, dtype=torch.float64), tensors["costs"].clamp(min=0)], dim=1)
        if falls := int((tensors["costs"] < 0).sum()):
            trials = tensors["costs"].numel()
            warnings.warn(
                f"pruning one block alone lowered the loss in {falls} of {trials} trials; this counts as no cost",
                RuntimeWarning,
                stacklevel=2,
            )
        source = self.source(measurements)
        curves = Curves(
            units, levels, costs_UK, sizes_UK, unit="block", source=source, fingerprint=key, is_stepped=self.is_stepped
        )
        return curves, reused


@dataclass(frozen=True, kw_only=True)
class MeasuredLoss(CurveEstimator):
    """Prices a sparsity of a block by the loss that is measured with this block alone pruned to it.

    It takes a forward pass over all windows for every block and level. A measured fall of the loss counts as none.

    Attributes:
        pruner: the pruner that the curves are for.
        calibration: the windows that it reads, and that the loss is measured on; None: 16 windows of 256 tokens of the
            embedded documentation.
        levels: the sparsities that are measured, ascending. None: 0.3, 0.5, 0.7 and 0.9, or all n of m.
        seed: chooses the windows where `calibration` is None.
    """

    pruner: Pruner = field(default_factory=Wanda)
    calibration: Calibration | None = None
    levels: Sequence[Annotated[float, Gt(0), Lt(1)]] | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")
        check_levels(self.levels, self.pruner)

    @property
    def needs(self) -> LossByBlock:
        levels = self.levels or self.pruner.levels() or (0.3, 0.5, 0.7, 0.9)
        return LossByBlock(self.pruner, self.calibration or Calibration(seed=self.seed), tuple(levels))

    @property
    def source(self) -> str:
        return described(self, pruner=self.pruner.called, calibration=(self.calibration or Calibration()).text)

    def curves(self, evidence: Curves, /) -> Curves:
        return evidence
