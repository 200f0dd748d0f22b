"""The jobs below a folder: finished ones, failed ones, and files that are neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerif.record import FAILURE, FILE, Failure, RunRecord

_SECTIONS = {
    "model": ("_target_",),
    "task": ("name",),
    "estimator": ("_target_",),
    "allocator": ("_target_",),
    "method": (),
}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a folder holds. left_out: why each file that is no record or failure of ours was left out. unfinished: the
    jobs that began and left neither.
    """

    name: str
    records: list[RunRecord]
    failures: list[Failure]
    left_out: list[str]
    unfinished: list[str]


def read(folder: Path) -> Sweep:
    """Raises ValueError where nothing below `folder` can be read."""
    records, failures, left_out = [], [], []
    files = sorted([*folder.rglob(FILE), *folder.rglob(FAILURE)])
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
                continue
            failure = Failure.read(file.parent)
            _check(failure, file)
            if (file.parent / FILE).exists():
                again = f"{file}: this run failed when it was run again, and the record is of before: {failure.error}"
                left_out.append(again)
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
        left_out=left_out,
        unfinished=_unfinished(folder, {file.parent for file in files}),
    )


def _unfinished(folder: Path, ended: set[Path]) -> list[str]:
    """Of the folders that Hydra made for a job, a dry run apart, those where none ended."""
    began = {file: file.parents[1] for file in sorted(folder.rglob(".hydra/overrides.yaml"))}
    lasting = [job for file, job in began.items() if "dry_run=true" not in file.read_text().lower()]
    return [str(job.relative_to(folder)) for job in lasting if job not in ended]


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
