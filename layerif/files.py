"""Files and folders that survive a kill, hashes of files, and errors of the file system in plain words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from layerif import PACKAGE

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Gives a temporary name to write to, and renames it to `file` at the end; after an error it leaves nothing."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, file)
    except OSError as error:
        error.filename = error.filename or str(file)  # a full disk does not say
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None, *, advice: str
) -> None:
    """Writes tensors and texts to a safetensors file, which is there as a whole or not at all.

    Args:
        tensors: by name, on any device.
        file: the file to write.
        metadata: texts that the file's header holds.
        advice: says what to do where the disk is full, see `full_disk_explained`.

    Raises:
        OSError: names the file and the cause, and ends with `advice`.
    """
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with full_disk_explained(str(file), advice), whole(file) as unfinished:
        save_file(plain, unfinished, dict(metadata) if metadata else None)


@contextmanager
def full_disk_explained(what: str, advice: str) -> Iterator[None]:
    """Turns the error of a write that failed into an OSError that says what could not be written, why and what to do.

    Safetensors reports a full disk as an error of its own. An OSError of another cause than a full disk passes as it
    is: `explained` finds the setting behind it.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _FULL:
            raise
        raise OSError(f"cannot write {what}: {error}; {advice}") from error


def claim_folder(folder: Path, job: Any) -> bool:
    """Marks a folder as this job's, and empties it unless the same job left its content.

    Processes of one job may call this at the same time, before they know of one another: the first empties the folder,
    once.

    Args:
        folder: made if it is not there.
        job: what the same job has equal, as JSON values.

    Returns:
        True if the content is from a killed run of the same job.
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
    """Says what the file system refused and what to do.

    Args:
        error: of the file system.
        folders: the folders of settings, by the names of the settings; one of them may be the cause.
    """
    where = f" for {error.filename}" if error.filename else ""
    if error.errno in _FULL:
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


_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)


def parse_json(text: str) -> Any:
    """Parses JSON that anybody may have written.

    Raises:
        JSONDecodeError: it is not JSON.
        ValueError: it is JSON that nothing here can use, and the message says why: nested too deeply, a number of too
            many digits, half a character.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:  # the limit of Python's integers
        raise ValueError("it holds a whole number of too many digits") from error
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(content, DEEPEST):
        raise ValueError(_TOO_DEEP)
    if "\\u" in text:
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"it holds {half!r}, which is half a character (a lone surrogate)") from None
    return content


DEEPEST = 100  # levels of objects and lists within one another
_TOO_DEEP = f"it is nested too deeply; at most {DEEPEST} levels are read"


def _is_deeper(content: Any, levels: int) -> bool:
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return bool(inner) and (levels == 0 or any(_is_deeper(each, levels - 1) for each in inner))


def read_json(path: str | Path, *, what: str) -> Any:
    """Reads a JSON file that a user wrote or an earlier run left.

    Args:
        path: of the file.
        what: the name of the file in a message: `scores file`.

    Raises:
        ValueError: if the file is missing or broken.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} {str(path)!r} cannot be read: {error.strerror}; check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {str(path)!r} is not valid JSON: {error}; is it complete?") from error
    except ValueError as error:
        raise ValueError(f"{what} {str(path)!r} cannot be used: {error}") from error


@lru_cache
def _sha256(path: str, size: int, modified_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_file(file: Path) -> str:
    """Gives the SHA-256 of a file, remembered in this process as long as its size and time stay."""
    stat = file.stat()
    return _sha256(str(file), stat.st_size, stat.st_mtime_ns)


def hash_files(files: Sequence[Path]) -> str:
    """Gives the SHA-256 of the names and contents of files."""
    return hashlib.sha256("".join(f"{file.name}:{hash_file(file)};" for file in files).encode()).hexdigest()


def conf_folder() -> Path:
    """Finds the folder of the YAML files: inside the package in a wheel, beside it in a checkout."""
    return PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
