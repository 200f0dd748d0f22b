"""Files and folders that survive a kill, hashes of files, and errors of the file system in plain words.

A file that a later process reads is written beside its place, forced to the disk, and renamed. Tensors carry a
checksum, so that a damaged file is noticed where it is read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from filelock import FileLock

from layerif import PACKAGE

if TYPE_CHECKING:
    from torch import Tensor


class Damaged(ValueError):
    """Says why a file cannot be what was written."""


class InUse(ValueError):
    """Says that another process works in a folder, and which one."""


@contextmanager
def whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Gives a temporary name to write to, and renames it to `path` at the end; after an error it leaves nothing.

    Args:
        path: of a file, or of a folder that is not there yet.
        durable: forces the content to the disk before it gets its name, so that a power cut costs nothing either. This
            takes a few milliseconds, and for large files longer than writing them.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        if durable:
            _to_disk(unfinished)
        os.replace(unfinished, path)
        if durable:
            _to_disk(path.parent, deep=False)
    except OSError as error:
        # A full disk names no file, or the temporary one.
        if error.errno and (not error.filename or Path(str(error.filename)).is_relative_to(unfinished)):
            error.filename = str(path)
        raise
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def _to_disk(path: Path, *, deep: bool = True) -> None:
    """Waits until a file, or a folder with all in it, is on the disk."""
    if deep and path.is_dir():
        for each in path.iterdir():
            _to_disk(each)
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _UNKNOWN:  # there are file systems that cannot do this with a folder
            raise
    finally:
        os.close(opened)


def write_text(file: Path, text: str) -> None:
    """Writes a text as a whole or not at all, see `whole`."""
    with whole(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def save_tensors(
    tensors: Mapping[str, Tensor],
    file: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    advice: str,
    durable: bool = True,
) -> None:
    """Writes tensors and texts to a safetensors file with a checksum, which is there as a whole or not at all.

    Args:
        tensors: by name, on any device.
        file: the file to write.
        metadata: texts that the file's header holds.
        advice: says what to do where the disk is full, see `full_disk_explained`.
        durable: see `whole`.

    Raises:
        OSError: names the file and the cause, and ends with `advice`.
    """
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = dict(metadata or {})
    header["checksum"] = _checksum(plain, header)
    with full_disk_explained(str(file), advice), whole(file, durable=durable) as unfinished:
        save_file(plain, unfinished, header)


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the texts that `save_tensors` wrote.

    Raises:
        Damaged: it is not what was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise Damaged(str(error)) from error
    if header.pop("checksum", None) != _checksum(tensors, header):
        raise Damaged("its checksum does not match its content")
    return tensors, header


def is_intact(file: Path, otherwise: str) -> bool:
    """Tells if a file is there as `save_tensors` wrote it, and warns of a damaged one.

    Args:
        file: the file.
        otherwise: says what happens if it is damaged.
    """
    if not file.exists():
        return False
    try:
        load_tensors(file)
    except Damaged as error:
        warnings.warn(f"{file} is damaged and {otherwise}: {error}", stacklevel=3)
        return False
    return True


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(memoryview(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


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
        if mark.exists() and mark.read_bytes() == wanted.encode():
            return True
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != lock:
                path.unlink()
        write_text(mark, wanted)
    return False


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process alone while the block runs, and never waits for another one.

    A process that ends, however it ends, holds nothing any more: the kernel frees its lock.

    Raises:
        InUse: another process holds the folder; says which one on which host, and since when.
    """
    file = folder / "run.lock"
    lock = _locked(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held, so that nobody can hold a file without a name
        lock.close()


def _locked(file: Path) -> IO[str]:
    while True:
        opened = file.open("a+")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                raise FileNotFoundError
        except BlockingIOError:
            with opened:
                opened.seek(0)
                holder = opened.read().strip() or "another process"
            raise InUse(
                f"{file.parent} is in use by {holder}; wait until it ends or end it, or take another folder "
                "(hydra.run.dir=…, for a sweep name=…)"
            ) from None
        except FileNotFoundError:  # its holder has just removed it
            opened.close()
            continue
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
            warnings.warn(
                f"{file.parent} lies on a file system without locks, so a second run in it would not be noticed",
                stacklevel=1,
            )
        opened.truncate(0)
        opened.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        opened.flush()
        return opened


def explained(error: OSError, folders: Mapping[str, str]) -> str:
    """Says what the file system refused and what to do.

    Args:
        error: of the file system.
        folders: the folders of settings, by the names of the settings; one of them may be the cause.
    """
    where = f" for {error.filename}" if error.filename else ""
    if error.errno == errno.ENAMETOOLONG:
        return f"the path {str(error.filename)[:80]}… is too long; a name may have 255 bytes and a path 4,095"
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
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # the file system does not know the operation
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
        raise ValueError("it holds a whole number of too many digits; write it as a text") from error
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
        raise ValueError(f"{what} {str(path)!r} cannot be used: {error}; mend the file") from error


# The largest configuration of ours has 9 kB and some 300 nodes.
_YAML_BYTES, _YAML_NODES = 250_000, 20_000
_YAML_DIGITS = 4300  # digits of a whole number; Python reads no longer one


def check_yaml(file: Path) -> None:
    """Refuses a YAML file whose content would fill the memory: a large one, or one that aliases make large.

    An alias costs a few bytes in the file and a copy of what it stands for in the configuration.

    Raises:
        ValueError: says what is too much.
    """
    if file.stat().st_size > _YAML_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; allowed: {_YAML_BYTES:,} for a configuration")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not a text in UTF-8: {error.reason} at byte {error.start}; save it as such"
        ) from error
    if re.search(rf"\d{{{_YAML_DIGITS + 1}}}", text):
        raise ValueError(f"{file} holds a whole number of too many digits; write it as a text")
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
