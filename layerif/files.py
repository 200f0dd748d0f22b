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


def read_json(path: str | Path, *, what: str) -> Any:
    """Reads a JSON file that a user wrote or an earlier run left.

    Args:
        path: of the file.
        what: the name of the file in a message: `scores file`.

    Raises:
        ValueError: if the file is missing or broken.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} {str(path)!r} cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:  # either JSON or the encoding is wrong
        raise ValueError(f"{what} {str(path)!r} is not valid JSON: {error}; is it complete?") from error


# The largest configuration of ours has 9 kB and some 300 nodes.
_YAML_BYTES, _YAML_NODES = 250_000, 20_000


def check_yaml(file: Path) -> None:
    """Refuses a YAML file whose content would fill the memory: a large one, or one that aliases make large.

    An alias costs a few bytes in the file and a copy of what it stands for in the configuration.

    Raises:
        ValueError: says what is too much.
    """
    if file.stat().st_size > _YAML_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; allowed: a configuration of {_YAML_BYTES:,}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8: {error.reason} at byte {error.start}") from error
    if "&" in text and "*" in text:
        _check_aliases(file, text)


def _check_aliases(file: Path, text: str) -> None:
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:  # whoever reads the file says what is wrong with it
        return
    sizes: dict[int, float] = {}

    def size(node: Any) -> float:
        """Counts the nodes with every alias spelt out; a node inside itself is infinite."""
        if id(node) not in sizes:
            sizes[id(node)] = float("inf")
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            sizes[id(node)] = 1 + sum(sum(map(size, one)) if isinstance(one, tuple) else size(one) for one in inner)
        return sizes[id(node)]

    if (spelt_out := size(root)) > _YAML_NODES:
        raise ValueError(
            f"{file} has {spelt_out:,.0f} entries once its aliases are spelt out; allowed: {_YAML_NODES:,}; write out "
            "what it needs, without aliases inside aliases"
        )


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
