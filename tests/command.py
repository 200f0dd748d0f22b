"""The command line as a user calls it: in a process of its own where that is the point, and in this one otherwise."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from layerif.app.main import main
from layerif.app.sweep import Sweep
from layerif.record.record import RunRecord


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def layerif(arguments: Sequence[str], folder: Path, **options) -> subprocess.CompletedProcess[str]:
    """Calls the command in a process of its own."""
    command = [sys.executable, "-m", "layerif", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600, **options)


def layerif_here(arguments: Sequence[str], folder: Path) -> Done:
    """Call the command in this process, which saves the seconds of a start."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with _as_a_command(arguments, folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
    return Done(code, out.getvalue(), err.getvalue())


def run_layerif(overrides: Sequence[str], folder: Path, *, apart: bool = False) -> RunRecord:
    """Run the command in `folder`/run and read its record; `apart`: in a process of its own."""
    call = layerif if apart else layerif_here
    done = call([*overrides, f"hydra.run.dir={folder / 'run'}"], folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return RunRecord.read(folder / "run")


@contextlib.contextmanager
def _as_a_command(arguments: Sequence[str], folder: Path) -> Iterator[None]:
    """Lets this process look like a new one to Hydra, and restores all that a command changes."""
    handlers, level, environment, argv, here = (
        list(logging.root.handlers),
        logging.root.level,
        dict(os.environ),
        list(sys.argv),
        Path.cwd(),
    )
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    Sweep.running = None
    sys.argv[:] = ["layerif", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "0"
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.chdir(here)
        sys.argv[:] = argv
        os.environ.clear()
        os.environ.update(environment)
        Sweep.running = None
        HydraConfig.instance().cfg = None
        GlobalHydra.instance().clear()
        for handler in set(logging.root.handlers) - set(handlers):
            handler.close()
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
