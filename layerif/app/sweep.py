"""Sweeps: a job that fails does not stop the others, and a balance of all jobs is printed at the end.

Each job leaves its outcome in its folder (`record.json` or `failure.json`). The balance is read from there, so it does
not depend on the launcher, and a sweep that was stopped carries on. This module imports nothing heavy, because
`layerif --help` must answer at once.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerif.app.messages import explain, of_the_user
from layerif.app.schema import check_root
from layerif.files import InUse
from layerif.record.job import choices_of_run, identity, is_same_job, settings_of, tracking_of
from layerif.record.record import FAILURE, FILE, Failure, RunRecord

log = logging.getLogger(__name__)


class Sweep(Callback):
    """Hydra's callback for the start of a sweep, which keeps the sweep's folder and the time of its start.

    Hydra calls nothing when a sweep ends by an error. The command line therefore draws the balance itself, and
    `on_multirun_end` does not.

    Attributes:
        running: the sweep of this process; None where there is none.
        folder: the jobs' folders lie below it.
        since: the start, in nanoseconds by the clock of the folder's disk.
    """

    running: ClassVar[Sweep | None] = None

    def __init__(self) -> None:
        self.folder = Path()
        self.since = 0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            check_root(config)
            check_launcher(config.hydra.launcher)
            check_paths(config)
        except ValueError as error:  # Hydra would turn it into a warning
            print(f"layerif: {error}", file=sys.stderr)
            sys.exit(1)
        if config.dry_run:
            return
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)  # the jobs' files are dated by this disk's clock
        self.since = self.folder.stat().st_mtime_ns
        Sweep.running = self

    def balance(self) -> Balance:
        """Returns the balance of the jobs that this sweep has started so far."""
        return balance(self.folder, self.since)


def check_launcher(launcher: DictConfig) -> None:
    """Refuses a launcher that cannot work here, where its own error would not say why.

    Raises:
        ValueError: the launcher would run no job, or it needs Slurm and there is none.
    """
    if launcher.get("n_jobs") == 0:
        raise ValueError(
            "hydra.launcher.n_jobs=0 is not allowed; allowed: 1 or more at once, or -1 for as many as there are cores"
        )
    if launcher._target_.endswith(".SlurmLauncher") and not shutil.which("srun"):
        raise ValueError(
            "launcher=submitit finds no Slurm (srun) here; call it on a login node of a cluster, or use "
            "launcher=submitit_local or joblib"
        )


def check_paths(config: DictConfig) -> None:
    """Refuses a folder of the model or the task that all jobs would miss, so that it fails once and at once.

    Raises:
        ValueError: as each job would.
    """
    model, task = (OmegaConf.select(config, f"{group}.path") for group in ("model", "task"))
    if isinstance(model, str) and not Path(model, "config.json").is_file():
        from layerif.models.pretrained import LocalModel

        LocalModel(path=model).location()
    if isinstance(task, str) and not Path(task).expanduser().is_dir():
        from layerif.data.source import Folder

        next(Folder(path=task).rows("train"))


def is_swept() -> bool:
    """Returns True if the current job is one of a sweep."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def attempt(run: Callable[[DictConfig], float | None], config: DictConfig) -> float | None:
    """Runs one job of a sweep, turns its error into `failure.json`, and frees its memory.

    A job that failed before with the same settings and the same logger is not tried again unless `rerun` asks for it.

    Args:
        run: does the work of a job and returns its objective.
        config: of the job.

    Returns:
        What `run` returns; None where the job failed.

    Raises:
        ValueError: the job failed and somebody waits for its answer: a sweeper that searches, or the user of a dry
            run.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    said = _failed_before(config, folder)
    if said:
        log.error("failed before and not run again (rerun=failed would run it): %s", said)
    else:
        try:
            return _in_own_process(config, folder) if _needs_own_process(config) else run(config)
        except Exception as error:
            said = note(error, config, folder)
            log.error("failed: %s", said, exc_info=None if of_the_user(error) else error)
        finally:
            free_memory()
    if config.dry_run or HydraConfig.get().runtime.choices["hydra/sweeper"] != "basic":
        raise ValueError(said)
    return None


def note(error: Exception, config: DictConfig, folder: Path) -> str:
    """Writes the failure of a job into its folder, once for all of its processes, and returns the error in one line.

    Nothing is written where another process works in that folder.
    """
    overrides = list(HydraConfig.get().overrides.task)
    cause = of_the_user(error)
    said = explain(cause, overrides) if cause else f"{type(error).__name__}: {error}"
    said = " ".join(said.split())
    if isinstance(error, _Reported | InUse) or config.dry_run or not folder.is_dir() or not _is_first_process():
        return said
    try:
        failure = Failure(
            name=config.name,
            seed=config.seed,
            config=json.loads(json.dumps(settings_of(config)), parse_constant=str),
            overrides=overrides,
            choices=choices_of_run(),
            error=said,
            traceback="".join(traceback.format_exception(error)),
        )
        failure.write(folder)
    except (OSError, ValueError, OmegaConfBaseException) as unwritten:
        log.error("no %s can be written: %s", FAILURE, unwritten)
    return said


def free_memory() -> None:
    """Frees the memory of a job's model: Lightning's objects refer to one another, and torch keeps what it had."""
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()  # the survivors of the first job are the program itself, which later collections need not search
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass(kw_only=True)
class Balance:
    """The outcome of a sweep's jobs. A job is called by the overrides that not all jobs share.

    Attributes:
        run: jobs that were run now.
        already_done: jobs that had been run before.
        failed: the error of each job that failed now.
        failed_before: the error of each job that failed before and was not tried again.
        unfinished: jobs that were killed or are still at work.
        measurements: the requests of the jobs in `run` to the store, see `layerif.probe.store.Store`.
    """

    run: list[str] = field(default_factory=list)
    already_done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    failed_before: dict[str, str] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Returns True if there is any job to report."""
        return any((self.run, self.already_done, self.failed, self.failed_before, self.unfinished))

    @property
    def is_clean(self) -> bool:
        """Returns True if every job is done."""
        return not (self.failed or self.failed_before or self.unfinished)

    def __str__(self) -> str:
        counts = {
            "run": self.run,
            "already done": self.already_done,
            "failed": self.failed,
            "failed before and not run again (rerun=failed does)": self.failed_before,
            "unfinished (the same command carries on)": self.unfinished,
        }
        always = ("run", "already done", "failed")
        lines = ["jobs: " + ", ".join(f"{len(of)} {what}" for what, of in counts.items() if of or what in always)]
        by_kind = defaultdict(list)
        for measured in self.measurements:
            by_kind[measured.get("called", measured["kind"])].append(measured)
        lines += [f"{kind}: {_shared(measured)}" for kind, measured in by_kind.items()]
        lines += [f"failed: {job}: {error}" for job, error in (self.failed | self.failed_before).items()]
        return "\n".join(lines)


def balance(folder: Path, since: int) -> Balance:
    """Reads the outcome of every job below `folder` that Hydra started since then.

    Args:
        folder: of the sweep.
        since: nanoseconds by the clock of the folder's disk.
    """
    found = Balance()
    started = [file for file in sorted(folder.rglob(".hydra/overrides.yaml")) if _written(file) >= since]
    overrides = {file.parents[1]: list(map(str, OmegaConf.load(file))) for file in started}
    shared = set.intersection(*map(set, overrides.values())) if overrides else set()
    for job, own in overrides.items():
        name = ",".join(override for override in own if override not in shared) or job.name
        record, failure = _written(job / FILE), _written(job / FAILURE)
        try:
            if failure > record:
                errors = found.failed if failure >= since else found.failed_before
                errors[name] = Failure.read(job).error
            elif record >= since:
                found.measurements += RunRecord.read(job).measurements
                found.run.append(name)
            elif record:
                found.already_done.append(name)
            else:
                found.unfinished.append(name)
        except ValueError as unreadable:
            found.failed[name] = str(unreadable)
    return found


def _shared(measured: Iterable[Mapping[str, Any]]) -> str:
    made = [one["seconds"] for one in measured if not one["reused"]]
    taken = [one["seconds"] for one in measured if one["reused"]]
    said = f"{len(made)} made" + (f" in {_time(sum(made))}" if made else "")
    if taken:
        known = [seconds for seconds in taken if seconds is not None]
        least = "at least " if len(known) < len(taken) else ""
        said += f", {len(taken)} taken from the store, which saved {least}{_time(sum(known))}"
    return said


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _written(file: Path) -> int:
    """Returns the time when a file was written, in nanoseconds; 0 for a file that does not exist."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _failed_before(config: DictConfig, folder: Path) -> str:
    """Returns the error that this same job left in this folder; empty if there is none or the job is to run again."""
    if config.rerun is not False or not (folder / FAILURE).exists():
        return ""
    try:
        failure = Failure.read(folder)
    except ValueError as error:
        log.warning("%s; the job runs again", error)
        return ""
    now = HydraConfig.get().overrides.task
    is_same = is_same_job(failure.identity, identity(choices_of_run(), settings_of(config)))
    return failure.error if is_same and tracking_of(failure.overrides) == tracking_of(now) else ""


class _Reported(Exception):
    """The failure of a job that ran in its own process, which has written it down already."""


def _needs_own_process(config: DictConfig) -> bool:
    """Returns True if Lightning would start more processes with this command line, which is the whole sweep's."""
    devices = OmegaConf.select(config, "trainer.devices", default=1)
    is_alone = len(devices) == 1 if OmegaConf.is_list(devices) else str(devices) == "1"
    if is_alone:
        return False
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return not SLURMEnvironment.detect()  # Slurm has started them already


def _in_own_process(config: DictConfig, folder: Path) -> float | None:
    """Runs the job as a single run in a process of its own, in the same folder."""
    hydra = HydraConfig.get()
    conf = next(source.path for source in hydra.runtime.config_sources if source.provider == "main")
    command = [sys.executable, "-m", "layerif", "--config-path", conf, "--config-name", hydra.job.config_name]
    # The command line sets this variable for Hydra. In the new process it would ask for tracebacks of users' errors.
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    # The experiment may ask for a sweep, but this job is one run.
    command += [*hydra.overrides.task, "hydra.mode=RUN", f"hydra.run.dir='{folder}'"]
    code = subprocess.run(command, env=environment).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code == 0:
        return RunRecord.read(folder).objective if (folder / FILE).exists() else None
    if (folder / FAILURE).exists():
        raise _Reported(Failure.read(folder).error)
    raise RuntimeError(f"the job's processes ended with {code}; their messages are above")


def _is_first_process() -> bool:
    from lightning.pytorch.utilities import rank_zero_only

    return rank_zero_only.rank == 0
