"""The command line as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from layerif.record.record import RunRecord


def layerif(overrides: list[str], folder: Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "layerif", *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, **options)


def run_layerif(overrides: list[str], folder: Path) -> RunRecord:
    done = layerif([*overrides, f"hydra.run.dir={folder / 'run'}"], folder)
    assert done.returncode == 0, done.stderr
    return RunRecord.read(folder / "run")
