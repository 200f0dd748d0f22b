"""A pruning run in this process, without the command line around it."""

from __future__ import annotations

from pathlib import Path

from layerif.app.setup import Setup
from layerif.record.record import RunRecord


def pruned(setup: Setup, folder: Path) -> RunRecord:
    """Checks and runs the method in a folder, and returns the record."""
    folder.mkdir(exist_ok=True)
    record = RunRecord(name="test", seed=0, config={}, overrides=[])
    setup.method.check(setup)
    setup.method.run(setup, record, folder)
    return record
