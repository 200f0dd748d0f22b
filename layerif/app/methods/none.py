"""`method=none`: score the layers and allocate, and do nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from layerif.app.methods import SpendsNothing
from layerif.app.methods._rows import check_selection, select_rows
from layerif.app.methods._steps import evaluate, join_processes, loader, record_decision
from layerif.app.setup import Setup
from layerif.record.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class ScoresOnly(SpendsNothing):
    """Scores the layers and allocates; with `evaluation.before=true` it also evaluates the untouched model.

    A `selection` is made and written down as fine-tuning would make it.
    """

    name: ClassVar[str] = "none"
    takes_parts: ClassVar[bool] = True
    selects_rows: ClassVar[bool] = True

    def check(self, setup: Setup) -> None:
        check_selection(setup)

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        join_processes(setup)
        load = loader(setup)
        setup = select_rows(setup, load, record, folder)
        record_decision(setup.decider(load), record)
        if setup.evaluation.before:
            evaluate(load(), setup, record, "before/")
