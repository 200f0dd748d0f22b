"""Files and folders that survive a kill: written whole or not at all, and known to be of this very job."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A name to write under, which becomes `file` at the end, all at once; after an error nothing of it is left."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def carried_on(folder: Path, job: Any) -> bool:
    """Whether `folder` is what a killed run of `job` (JSON) left; else it is emptied, and marked as this job's.

    Processes of one job may ask at the same time, before they know of one another: the first empties it, once.
    """
    mark, lock, wanted = folder / "job.json", folder / "job.lock", json.dumps(job, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if mark.exists() and mark.read_text() == wanted:
            return True
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != lock:
                path.unlink()
        with whole(mark) as unfinished:
            unfinished.write_text(wanted)
    return False
