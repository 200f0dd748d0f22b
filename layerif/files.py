"""Files and folders that survive a kill: written whole or not at all, known to be of this very job; what cannot be."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
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
    except OSError as error:
        error.filename = error.filename or str(file)  # a full disk does not say
        raise
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


def explained(error: OSError, folders: Mapping[str, str]) -> str:
    """What the file system refused, and what to do. folders: settings by name, one of which may be the cause."""
    where = f" for {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the disk{where}; free some and give the same command again"
    if error.errno not in _REFUSED or not isinstance(error.filename, str):
        return str(error) or type(error).__name__
    path = Path(error.filename).absolute()
    above = [setting for setting, value in folders.items() if path.is_relative_to(Path(value).absolute())]
    if not above:
        return str(error)
    setting = max(above, key=lambda one: len(folders[one]))
    file = next((str(each) for each in (path, *path.parents) if each.is_file()), None)
    wrong = f"{file} is a file" if file else f"{path}: {str(error.strerror).lower()}"
    return f"{setting}={folders[setting]} cannot be used: {wrong}; give a folder that can be written"


_REFUSED = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)
