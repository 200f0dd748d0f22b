"""`method=plan`: print what the evidence of the estimator would cost, and measure nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from layerif.app.methods import SpendsNothing
from layerif.app.setup import Setup
from layerif.estimators._base import name_of
from layerif.probe.plan import estimate, show_plan
from layerif.record.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Plan(SpendsNothing):
    """Prints what the evidence of the estimator would cost under each strategy, and writes it to `plan.json`."""

    name: ClassVar[str] = "plan"

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        decider = setup.decider
        needs = decider.estimator.needs
        is_measured = needs.is_measured and decider.allocator.spends != "nothing"
        known = estimate(decider, needs) if is_measured else None
        strategies = []
        if known is None:
            record.notes.append(_unplanned(name_of(decider.estimator), is_measured, decider.allocator.spends))
            print(record.notes[-1])
        else:
            planned, load, strategies = known
            chosen = next(strategy for strategy in strategies if strategy.chosen)
            show_plan(planned, load, strategies, decider.device)
            record.metrics = {"expected_seconds": chosen.seconds, "expected_memory_gb": chosen.device_gb}
        (folder / "plan.json").write_text(json.dumps([asdict(strategy) for strategy in strategies], indent=1) + "\n")


def _unplanned(estimator: str, is_measured: bool, spends: str) -> str:
    """Says why there is no plan."""
    if spends == "nothing":
        return "nothing to plan: the allocator spends neither scores nor curves, so nothing is measured for it"
    if not is_measured:
        return f"nothing to plan: estimator={estimator} measures nothing"
    return (
        f"no plan: the evidence of estimator={estimator} is neither the Grams nor the loss curves of a gradient pass; "
        "its passes, memory and seconds are not known beforehand"
    )
