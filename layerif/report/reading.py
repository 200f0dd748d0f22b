"""The jobs below a folder: finished ones, failed ones, and files that are neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from layerif.checks import did_you_mean
from layerif.record.names import called, has_method
from layerif.record.record import FAILURE, FILE, Failure, Job, RunRecord

_GROUPS = ("model", "task", "estimator", "allocator", "method")


@dataclass(frozen=True, kw_only=True)
class FinishedJobs:
    """The jobs that ended below a folder, and the other files there.

    Attributes:
        name: of the folder.
        records: of the jobs that finished.
        failures: of those that failed.
        failed_again: the errors of jobs that failed when they were run again; their records are from the run before.
        unfinished: jobs that began and left neither a record nor a failure.
        left_out: the reason for each file that was left out, because it is not a record or failure of layerif.
    """

    name: str
    records: list[RunRecord]
    failures: list[Failure]
    failed_again: list[str]
    unfinished: list[str]
    left_out: list[str]

    @property
    def jobs(self) -> list[Job]:
        """Finished jobs, then failed ones."""
        return [*self.records, *self.failures]


def read_jobs(folder: Path) -> FinishedJobs:
    """Reads all records and failures below a folder.

    Raises:
        ValueError: there are none, or none can be read.
    """
    if not folder.is_dir():
        raise ValueError(_no_folder(folder))
    records, failures, failed_again, left_out = [], [], [], []
    files = [*sorted(folder.rglob(FILE)), *sorted(folder.rglob(FAILURE))]
    finished: set[Path] = set()
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no {FILE}: give the folder of a run or a sweep, such as outputs/sweeps/default"
        )
    for file in files:
        try:
            if file.name == FILE:
                record = RunRecord.read(file.parent)
                _check(record, file)
                records.append(record)
                finished.add(file.parent)
                continue
            failure = Failure.read(file.parent)
            _check(failure, file)
            if file.parent in finished:  # writing a record removes the failure, so this failure came later
                failed_again.append(f"{_job(file.parent, folder)}: {failure.error}")
            else:
                failures.append(failure)
        except ValueError as error:
            left_out.append(str(error))
    if not records and not failures:
        raise ValueError(f"none of the {len(files)} records below {str(folder)!r} can be read; {left_out[0]}")
    return FinishedJobs(
        name=folder.resolve().name,
        records=sorted(records, key=_order),
        failures=sorted(failures, key=_order),
        failed_again=failed_again,
        unfinished=_unfinished(folder, {file.parent for file in files}),
        left_out=left_out,
    )


def _no_folder(given: Path) -> str:
    """The message for a folder that does not exist, with the nearest of those beside it."""
    if given.is_file():
        return f"{str(given)!r} is a file: give the folder that holds it, {str(given.parent)!r}"
    above = next(parent for parent in given.parents if parent.is_dir())
    names = sorted(path.name for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
    nearest = did_you_mean(given.relative_to(above).parts[0], names)
    there = f"; {str(above)!r} holds {', '.join(names[:8]) + ', …' * (len(names) > 8) or 'no folder'}"
    return f"{str(given)!r} is not a folder{nearest}{there}: give the folder of a run or a sweep"


def _unfinished(folder: Path, ended: set[Path]) -> list[str]:
    """The folders that Hydra made for a job which never ended; dry runs do not count."""
    began = {file: file.parents[1] for file in sorted(folder.rglob(".hydra/overrides.yaml"))}
    lasting = [job for file, job in began.items() if b"dry_run=true" not in file.read_bytes().lower()]
    return [_job(job, folder) for job in lasting if job not in ended]


def _job(of: Path, folder: Path) -> str:
    """The name of a job: its folder below the one that is read, or this one itself."""
    return of.name if of == folder else str(of.relative_to(folder))


def _check(job: Job, file: Path) -> None:
    """Refuses the JSON of another program, even one with the right keys."""
    for group in _GROUPS:
        lacks = "choices" if group not in job.choices else "config"
        given = job.config.get(group, {} if group == "method" else None)  # 0.1.0 had no settings for no method
        if lacks == "choices" or not isinstance(given, Mapping | None if group == "method" else Mapping):
            raise ValueError(f"{file} is not a readable record of layerif: it lacks {lacks}.{group}")
    if not isinstance((job.config.get("task") or {}).get("name"), str):
        raise ValueError(f"{file} is not a readable record of layerif: it lacks config.task.name")


def _order(job: Job) -> tuple:
    """The place of a job: baselines stand before the jobs that are compared with them."""
    model = called(job.config["model"], job.choices["model"])
    place = model, job.config["task"]["name"], job.seed
    return *place, has_method(job), job.choices["estimator"] != "uniform"
