"""`method=plan`: print what the probe would cost, and measure nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from layerif.app.methods import SpendsNothing
from layerif.app.setup import Setup
from layerif.probe.plan import estimate, show_plan
from layerif.record.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Plan(SpendsNothing):
    """Prints what the probe would cost under each strategy, and writes it to `plan.json`."""

    name: ClassVar[str] = "plan"

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        load, strategies = estimate(setup.decider)
        chosen = next(strategy for strategy in strategies if strategy.chosen)
        show_plan(setup.decider, load, strategies)
        (folder / "plan.json").write_text(json.dumps([asdict(strategy) for strategy in strategies], indent=1) + "\n")
        record.metrics = {"expected_seconds": chosen.seconds, "expected_memory_gb": chosen.device_gb}
