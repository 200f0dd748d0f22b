"""Commands that are killed with SIGKILL at a chosen point of their writing, to be given again.

What a kill leaves depends on the last change of the file system before it. So the points are counted in such changes
below one folder, seen by an audit hook, and neither the clock nor the load of the machine has a part in it. A file that
is opened for writing has two points: before, and as soon as it is there and empty (or, to be continued, half a line
longer).

Every command is a fork of one warm process (multiprocessing's forkserver), because a start costs seconds. A fork
takes over memory and open files, but no thread except the one that forks: a pool of OpenMP, of BLAS or of a tokenizer
would be missing, and a lock that another thread holds would stay locked. So the warm process imports, computes nothing,
and has one thread, which every fork checks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
from safetensors.torch import load_file

import layerif.app.run
import layerif.moe
import layerif.pruning.sparsegpt  # noqa: F401 - all of them are imported once, for every fork
from tests.command import layerif_here
from tests.damage import flip

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.kills"])
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
_FORKS_ITSELF = "jemalloc_bg_thd"  # Arrow's allocator, which has handlers for a fork
_LONGEST = 3600  # seconds, of a machine that many share


@dataclass(frozen=True)
class Ended:
    """How a command ended: killed or with an exit code, what it said, and how many points it passed."""

    killed: bool
    code: int = -1
    said: str = ""
    points: int = 0


def command(arguments: Sequence[str], folder: Path, *, kill_at: int | None = None) -> Ended:
    """Runs `layerif` in a fork, and kills it at a point of its changes below `folder`."""
    report = folder.with_name(f"{folder.name}.json")
    report.unlink(missing_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the first fork's server
    fork = _FORKS.Process(target=_run, args=(list(arguments), folder, kill_at, report))
    fork.start()
    fork.join(_LONGEST)
    assert fork.exitcode is not None, f"still at work after {_LONGEST} s"
    if fork.exitcode == -signal.SIGKILL:
        return Ended(killed=True)
    assert fork.exitcode == 0, fork.exitcode
    return Ended(killed=False, **json.loads(report.read_text()))


def _run(arguments: list[str], folder: Path, kill_at: int | None, report: Path) -> None:
    threads = [task.read_text().strip() for task in Path(f"/proc/{os.getppid()}/task").glob("*/comm")]
    assert len([name for name in threads if name != _FORKS_ITSELF]) == 1, (
        f"the process that forks has threads: {threads}"
    )
    if Path("/dev/shm").is_dir():  # a move from there to the outputs is a copy, which a kill can cut off
        tempfile.tempdir = "/dev/shm"
    points = _Points(str(folder), kill_at)
    sys.addaudithook(points)
    done = layerif_here(arguments, folder)
    points.kill_at = None
    report.write_text(json.dumps({"code": done.returncode, "said": done.stdout + done.stderr, "points": points.passed}))


class _Points:
    """Counts the changes below a folder, and kills the process at one of them."""

    def __init__(self, folder: str, kill_at: int | None) -> None:
        self.folder, self.kill_at = folder, kill_at
        self.passed = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[0], str | os.PathLike) and args[2] & _WRITES
        if not (writes or event in _CHANGES):
            return
        path = os.path.abspath(os.fspath(args[0]))
        if not path.startswith(self.folder):
            return
        self._pass()
        if writes:
            if self.passed + 1 == self.kill_at:
                self.folder = "\0"  # no other path begins so: this is the last change
                opened = os.open(path, args[2], 0o666)
                os.write(opened, b"half a line" if args[2] & os.O_APPEND else b"")
            self._pass()

    def _pass(self) -> None:
        self.passed += 1
        if self.passed == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Work:
    """A command that is worth killing.

    Attributes:
        overrides: the command, without its folders.
        swept: it is a sweep.
    """

    overrides: Sequence[str]
    swept: bool = False

    def arguments(self, folder: Path) -> list[str]:
        """The command with its outputs in `folder`."""
        where = ["-m", "name=mine"] if self.swept else [f"hydra.run.dir={folder / 'run'}"]
        return [*where, *self.overrides, f"outputs={folder}"]

    def undisturbed(self, folder: Path) -> tuple[dict[str, Any], int]:
        """Runs it without a kill. Returns its result and the number of its points."""
        folder.mkdir()
        ended = command(self.arguments(folder), folder)
        assert ended.code == 0, ended.said
        return result(folder), ended.points

    def killed(
        self, folder: Path, points: int, chosen: Random, *, damage: bool, most: int
    ) -> tuple[dict[str, Any], list[Any]]:
        """Kills it once or more often, then lets it finish.

        Args:
            folder: where it works.
            points: how many an undisturbed run has.
            chosen: chooses the kills.
            damage: also flips a bit of one file that the killed run left for the next.
            most: the most times that it is killed.

        Returns:
            Its result, and the points of the kills with the files that were damaged after them.
        """
        folder.mkdir()
        kills: list[Any] = []
        ended = command(self.arguments(folder), folder, kill_at=chosen.randint(1, points))
        while ended.killed:
            kills.append(flipped(folder, chosen) if damage else "")
            again = len(kills) < most and chosen.random() < 0.5
            ended = command(self.arguments(folder), folder, kill_at=chosen.randint(1, points) if again else None)
        assert ended.code == 0, (kills, ended.said)
        return result(folder), kills


def flipped(folder: Path, chosen: Random) -> str:
    """Flips a bit of a file that only a resume reads; returns the name of the file, or nothing where there is none."""
    files = [file for part in _RESUMED for file in sorted(folder.rglob(f"{part}/**/*")) if file.is_file()]
    files = [file for file in files if file.stat().st_size]
    if not files:
        return ""
    file = chosen.choice(files)
    flip(file, chosen.randrange(file.stat().st_size), chosen.randrange(8))
    return str(file.relative_to(folder))


_RESUMED = ("checkpoints", "blocks", "store")
_PRUNING = [f"method.calibration.{setting}" for setting in ("num_windows=3", "window=40", "batch_size=2")]
WORKS = {
    "fit": Work(
        (
            "estimator=uniform",
            "trainer.max_steps=7",
            "trainer.max_epochs=-1",
            "trainer.val_check_interval=2",
            "fit.checkpoint_steps=2",
            "fit.keep=best",
            "fit.patience=9",
        )
    ),
    "prune": Work(
        (
            "method=prune",
            "allocator=sparsity",
            "allocator.smoothing=false",
            "estimator=uniform",
            "pruner=sparsegpt",
            "method.offload=disk",
            "evaluation.num_windows=4",
            *_PRUNING,
        )
    ),
    "diagnose": Work(
        (
            "method=diagnose",
            "logger=none",
            "method.num_train=12",
            "method.num_validation=6",
            "method.subsets=4",
            "method.seeds=1",
            "method.steps=2",
            "method.batch_size=4",
            "method.resamples=20",
        )
    ),
    "probe": Work(("method=none", "probe.scope=all", "probe.offload=disk", "probe.batch_size=4")),
    "sweep": Work(("trainer.max_steps=2", "seed=0,1"), swept=True),
}


def result(folder: Path) -> dict[str, Any]:
    """Everything below a folder that two runs of a job have in common, to the bit, by its path."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name, read = str(file.relative_to(folder)), _READ.get(file.name) or _READ.get(file.suffix)
        if read and file.is_file() and ".hydra" not in file.parts:
            found[name] = read(file)
    return found


def _record(file: Path) -> Any:
    record = json.loads(file.read_text())
    return {key: value for key, value in record.items() if key not in _OF_ONE_RUN}


def _tensors(file: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in sorted(load_file(file).items())}


def _curves(file: Path) -> str:
    return pd.read_csv(file).drop(columns="train/seconds").to_csv()


_OF_ONE_RUN = ("overrides", "seconds", "training", "measurements", "memory_gb", "notes")
_READ: dict[str, Callable[[Path], Any]] = {
    "record.json": _record,
    "metrics.csv": _curves,
    ".safetensors": _tensors,
    ".csv": Path.read_text,
    ".json": Path.read_text,
    ".md": Path.read_text,
}
