"""The jobs below a folder: finished ones, failed ones, and files that are neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerif.checks import did_you_mean
from layerif.record.record import FAILURE, FILE, Failure, RunRecord

_SECTIONS = {
    "model": ("_target_",),
    "task": ("name",),
    "estimator": ("_target_",),
    "allocator": ("_target_",),
    "method": (),
}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a folder holds.

    failed_again: jobs that failed when they were run again, with their errors; their records are of before. unfinished:
    those that began and left neither. left_out: why each file that is no record or failure of ours was left out.
    """

    name: str
    records: list[RunRecord]
    failures: list[Failure]
    failed_again: list[str]
    unfinished: list[str]
    left_out: list[str]

    @property
    def jobs(self) -> list[RunRecord | Failure]:
        return [*self.records, *self.failures]


def read(folder: Path) -> Sweep:
    """Raises ValueError where nothing below `folder` can be read."""
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
            if file.parent in finished:  # a record written later would have removed the failure
                failed_again.append(f"{_job(file.parent, folder)}: {failure.error}")
            else:
                failures.append(failure)
        except ValueError as error:
            left_out.append(str(error))
    if not records and not failures:
        raise ValueError(f"none of the {len(files)} records below {str(folder)!r} can be read; {left_out[0]}")
    return Sweep(
        name=folder.resolve().name,
        records=sorted(records, key=_order),
        failures=sorted(failures, key=_order),
        failed_again=failed_again,
        unfinished=_unfinished(folder, {file.parent for file in files}),
        left_out=left_out,
    )


def _no_folder(given: Path) -> str:
    """What to give instead: the nearest of the folders beside it."""
    if given.is_file():
        return f"{str(given)!r} is a file: give the folder that holds it, {str(given.parent)!r}"
    above = next(parent for parent in given.parents if parent.is_dir())
    names = sorted(path.name for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
    nearest = did_you_mean(given.relative_to(above).parts[0], names)
    there = f"; {str(above)!r} holds {', '.join(names[:8]) + ', …' * (len(names) > 8) or 'no folder'}"
    return f"{str(given)!r} is no folder{nearest}{there}: give the folder of a run or a sweep"


def _unfinished(folder: Path, ended: set[Path]) -> list[str]:
    """Of the folders that Hydra made for a job, a dry run apart, those where none ended."""
    began = {file: file.parents[1] for file in sorted(folder.rglob(".hydra/overrides.yaml"))}
    lasting = [job for file, job in began.items() if "dry_run=true" not in file.read_text().lower()]
    return [_job(job, folder) for job in lasting if job not in ended]


def _job(of: Path, folder: Path) -> str:
    """What a job is called: its folder below the sweep's, or that one itself."""
    return of.name if of == folder else str(of.relative_to(folder))


def _check(job: RunRecord | Failure, file: Path) -> None:
    """JSON of the right keys may still be another program's."""
    config = job.config if isinstance(job.config, Mapping) else {}
    for section, keys in _SECTIONS.items():
        node = config.get(section) if config.get(section) is not None or section != "method" else {}
        if not isinstance(node, Mapping) or any(not isinstance(node.get(key), str) for key in keys):
            raise ValueError(
                f"{file} is not a readable record of layerif: its config has no {'.'.join([section, *keys])}"
            )


def _order(job: Any) -> tuple:
    """Baselines before what is compared with them."""
    model = job.config["model"]
    place = str(model.get("name") or model["_target_"]), job.config["task"]["name"], job.seed
    return *place, bool(job.config["method"]), not job.config["estimator"]["_target_"].endswith("Uniform")
