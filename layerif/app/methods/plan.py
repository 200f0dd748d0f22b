"""`method=plan`: print what the probe would cost, and measure nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from layerif.decide import Decider
    from layerif.record.record import RunRecord
from layerif.probe.plan import estimate, show


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Prints the plan and writes it to `plan.json`."""

    allocates: ClassVar[str | None] = None

    def __call__(self, decider: Decider, record: RunRecord, folder: Path) -> None:
        load, strategies = estimate(decider)
        chosen = next(strategy for strategy in strategies if strategy.chosen)
        show(decider, load, strategies)
        (folder / "plan.json").write_text(json.dumps([asdict(strategy) for strategy in strategies], indent=1) + "\n")
        record.metrics = {"expected_seconds": chosen.seconds, "expected_memory_gb": chosen.device_gb}
