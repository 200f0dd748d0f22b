"""The parts of `method=prune` between a decision and the walk: curves, trials and verified swaps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layerif.allocate.allocation import Allocation
from layerif.allocate.depth import Depth
from layerif.app.setup import Setup
from layerif.checks import Count, Share, check_fields
from layerif.decide import Decider, Decision
from layerif.estimators._base import CurveEstimator
from layerif.probe.curves.request import source_of
from layerif.pruning import Pruner
from layerif.pruning.levels import Levels
from layerif.pruning.refine import refined
from layerif.pruning.source import check_source
from layerif.pruning.trials import least_loss
from layerif.record.record import RunRecord

STATE = "refine.json"  # in the run's folder, which a killed search carries on from


@dataclass(frozen=True, kw_only=True)
class Refine:
    """The settings of verified swaps of levels, see `layerif.pruning.refine.refined`.

    Attributes:
        forwards: the number of candidates; each takes at most one forward over the windows.
        num_windows: the calibration windows that candidates are judged on.
        step: the fraction of a matrix that moves.
    """

    forwards: Count = 256
    num_windows: Count = 4
    step: Share = 0.05

    def __post_init__(self) -> None:
        check_fields(self, "method.swaps")

    def __call__(
        self, decision: Decision, model: nn.Module, pruner: Pruner, windows: Sequence[Tensor], seed: int, folder: Path
    ) -> Decision:
        """Improves the allocation of a decision on some of the windows.

        Args:
            decision: starts the search.
            model: dense, on its device; it comes back as it was.
            pruner: chooses the weights.
            windows: of the calibration text (B×T each). The pruner reads all of them.
            seed: chooses the pairs of matrices.
            folder: of the run.
        """
        rows = [row for batch in windows for row in batch.split(1)][: self.num_windows]
        found = refined(
            model,
            Levels(model, pruner, windows),
            decision.allocation,
            rows,
            forwards=self.forwards,
            step=self.step,
            seed=seed,
            state=folder / STATE,
        )
        note = (
            f"method.refine=swaps: {found.accepted} of {found.tried} swaps of levels were kept; KL to the dense model "
            f"on {len(rows)} windows {found.kl_before:.4f} before and {found.kl:.4f} after, in nats a token"
        )
        allocation = replace(found.allocation, source=decision.allocation.source)
        seconds = {**decision.seconds, "refine": found.seconds}
        return replace(decision, allocation=allocation, seconds=seconds, notes=(*decision.notes, note))


def reads_windows(decider: Decider, pruner: Pruner) -> bool:
    """Tells if the calibration windows decide about the weights to prune: by their inputs, their loss or in trials."""
    allocator = decider.allocator
    if pruner.needs_inputs or (isinstance(allocator, Depth) and allocator.slope is None):
        return True
    return decider.reads_windows


def check_spent_here(setup: Setup, pruner: Pruner, windows: Sequence[Tensor], allocation: Allocation) -> None:
    """Refuses an allocation by curves of another model, pruner or calibration text.

    Args:
        setup: of the run.
        pruner: prunes.
        windows: its calibration windows (B×T each).
        allocation: a preview of the one that is decided.
    """
    decider, source = setup.decider, allocation.source
    if decider.allocator.spends == "curves" and isinstance(decider.estimator, CurveEstimator) and not source:
        needs: Any = decider.estimator.needs
        source = needs.source(decider)
    if source:
        check_source(source, source_of(decider, pruner, windows, ""))


def with_tried_slope(
    setup: Setup, allocator: Depth, model: nn.Module, pruner: Pruner, windows: Sequence[Tensor], record: RunRecord
) -> Depth:
    """Gives an allocator that leaves its slope open the one that does best in trials on the calibration windows."""
    decider = setup.decider
    tried = allocator.with_each_slope(decider.units())
    start = time.perf_counter()
    candidates = [each.by_name() for each in allocator.candidates(decider.units())]
    best, losses = least_loss(model.to(decider.device), pruner, candidates, windows)
    record.seconds["trials"] = time.perf_counter() - start
    found = ", ".join(f"{one.slope:.4f}: {loss:.4f}" for one, loss in zip(tried, losses, strict=True))
    record.notes.append(f"allocator.slope={tried[best].slope:.4f} by the loss on the calibration windows ({found})")
    return tried[best]
