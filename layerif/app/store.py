"""`layerif-store`: lists the entries of the store with their sizes, and clears them.

Files and folders one level below the store are entries if they are named by a key (measurements) or if their name ends
in the hash of their source (converted models). Nothing else is ever removed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerif.versions import VERSIONS

_KEY = r"[0-9a-f]{64}"
_ENTRY = re.compile(rf"(?P<measurement>{_KEY})\.safetensors|(?P<model>[^.].*-[0-9a-f]{{12}})")
_LOCK = re.compile(rf"(?P<name>{_KEY}|[^.].*-[0-9a-f]{{12}})\.lock")
_UNFINISHED = re.compile(
    rf"\.(?:(?P<measurement>{_KEY})\.(?:safetensors\.\d+|partial)|(?P<model>.+-[0-9a-f]{{12}})\.\w+)"
)
_DEFAULT = Path("outputs/store")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(kw_only=True)
class Entry:
    """One measurement or converted model, with its files.

    Attributes:
        kind: the folder that it lies in.
        name: the key of a measurement, or the folder of a model.
        folder: the path of the folder of its kind.
        path: None where only leftovers exist.
        leftovers: temporary files of writes that did not end. While the lock is held, they may still end.
        in_use: a process holds its lock.
        header: the description that the file holds of itself.
        samples: the number of train and of validation samples that were measured.
        problem: a reason why the file is of no use; empty where there is none.
    """

    kind: str
    name: str
    folder: Path
    path: Path | None = None
    leftovers: list[Path] = field(default_factory=list)
    in_use: bool = False
    header: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[int, int] | None = None
    problem: str = ""

    @property
    def key(self) -> str:
        """The start of the hash in its name, as the list shows it."""
        return (self.name if re.fullmatch(_KEY, self.name) else self.name.rpartition("-")[2])[:12]

    @property
    def model(self) -> str:
        """The name of the model that was measured or converted."""
        named = self.header.get("about", {}).get("model", "") if re.fullmatch(_KEY, self.name) else self.name
        return re.sub(r"-[0-9a-f]{12}$", "", named)

    @property
    def lock(self) -> Path:
        """The path of its lock."""
        return self.folder / f"{self.name}.lock"

    @property
    def files(self) -> list[Path]:
        """The paths of its file or folder and of its leftovers."""
        return [*([self.path] if self.path else []), *self.leftovers]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(map(_size, self.files))

    @property
    def age(self) -> float:
        """Seconds since it was written."""
        written = [file.stat().st_mtime for file in self.files if file.exists()]
        return time.time() - max(written, default=time.time())

    def state(self) -> str:
        """Returns remarks on it in words; empty for a whole and current entry."""
        if self.in_use:
            return "in use" if self.path else "being made now"
        if self.path is None:
            carried_on = any(path.is_dir() and path.suffix == ".partial" for path in self.leftovers)
            return "unfinished: its job died" + ("; the next one carries on" if carried_on else "")
        said = [self.problem] if self.problem else []
        said += [
            f"written by {what} version {written}, not used any more"
            for what, written in self._written_by().items()
            if written != str(VERSIONS[what])
        ]
        said += ["an unfinished write lies beside it"] if self.leftovers else []
        return "; ".join(said)

    def is_unused(self) -> bool:
        """Returns True if no run would read it again: another version wrote it, or it cannot be read."""
        return bool(self.problem) or any(written != str(VERSIONS[what]) for what, written in self._written_by().items())

    def _written_by(self) -> dict[str, str]:
        if not self.header:
            return {}
        description = self.header["description"]
        probed = {what: str(description[what]) for what in VERSIONS if what in description}
        return {"store": self.header["version"], **probed}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; None takes the arguments from the command line."""
    given = _parser().parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=160)  # a file has no width
    try:
        found, other = entries(given.store)
        if other and not found:
            raise ValueError(_no_store(given.store, other))
        if given.command == "clear":
            _clear(given, found, console)
        else:
            show_entries(found, other, given.store, console)
    except (ValueError, OSError) as error:
        print(f"layerif-store: {error}", file=sys.stderr)
        sys.exit(1)


def entries(store: Path) -> tuple[list[Entry], int]:
    """Finds all entries of a store.

    Returns:
        The entries by kind, the newest of each kind first, and the bytes of all other files.

    Raises:
        ValueError: the store is not a folder.
    """
    if store == _DEFAULT and not store.exists():
        raise ValueError(
            f"there is no {store} below {Path.cwd()}; name the store with --store FOLDER (store=… of a run)"
        )
    if not store.is_dir():
        raise ValueError(f"{str(store)!r} is not a folder; give the store with --store=FOLDER (store=… of a run)")
    found: dict[tuple[str, str], Entry] = {}
    folders = [folder for folder in store.iterdir() if folder.is_dir()]
    other = sum(_size(path) for path in store.iterdir() if not path.is_dir())
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        whole, part, lock = (pattern.fullmatch(path.name) for pattern in (_ENTRY, _UNFINISHED, _LOCK))
        if not (whole or part or lock):
            other += _size(path)
            continue
        name = next(group for match in (part, lock, whole) if match for group in match.groups() if group)
        entry = found.setdefault((path.parent.name, name), Entry(kind=path.parent.name, name=name, folder=path.parent))
        if part:
            entry.leftovers.append(path)
        elif lock:
            entry.in_use = _is_held(path)
        else:
            entry.path = path
            _describe(entry)
    listed = [entry for entry in found.values() if entry.files or entry.in_use or entry.lock.exists()]
    return sorted(listed, key=lambda entry: (entry.kind, entry.age)), other


def _no_store(folder: Path, other: int) -> str:
    """Writes the message for a folder without entries; a store beside or below it may have been meant."""
    near = [path for path in (*sorted(folder.iterdir()), folder.absolute().parent) if _is_store(path)]
    meant = f" (did you mean --store={near[0]}?)" if near else "; give the folder that runs had as store=…"
    return f"{folder} holds no measurements, but {_bytes(other)} of other files; it is not a store{meant}"


def _is_store(folder: Path) -> bool:
    return any(_ENTRY.fullmatch(path.name) for path in folder.glob("*/*"))


def show_entries(found: Sequence[Entry], other: int, store: Path, console: Console) -> None:
    """Prints the entries and their sizes as a table."""
    listed = [entry for entry in found if entry.files or entry.in_use]  # a lock that nobody holds is an empty file
    if not listed:
        console.print(f"{store} holds nothing", highlight=False, markup=False)
        return
    table = Table(title=f"{store}", title_justify="left")
    for column in ("key", "kind", "model", "scope", "parameters"):
        table.add_column(column, no_wrap=column != "model", overflow="fold")
    for column in ("samples", "size", "age"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for entry in listed:
        description = entry.header.get("description", {})
        measured = [str(description.get(what, "")) for what in ("scope", "parameters")]
        samples = f"{entry.samples[0]} + {entry.samples[1]}" if entry.samples else ""
        cells = [entry.key, entry.kind, entry.model, *measured, samples, _bytes(entry.size), _time(entry.age)]
        table.add_row(*map(escape, cells), escape(entry.state()))
    console.print(table)
    kinds = {entry.kind: [other for other in listed if other.kind == entry.kind] for entry in listed}
    sizes = [f"{len(of)} in {kind} {_bytes(sum(entry.size for entry in of))}" for kind, of in kinds.items()]
    sizes += [f"other files {_bytes(other)}"] if other else []
    total = sum(entry.size for entry in listed) + other
    console.print(f"{', '.join(sizes)}; {_bytes(total)} in all", highlight=False, markup=False)


def clear(chosen: Iterable[Entry], *, only_leftovers: bool = False) -> Iterator[tuple[Entry, int | None]]:
    """Removes entries, each under its lock.

    Yields:
        Each entry with the bytes that were freed; None for an entry that is in use and stays.
    """
    for entry in chosen:
        files = entry.leftovers if only_leftovers else entry.files
        size = sum(map(_size, files))
        lock = FileLock(entry.lock)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield entry, None
            continue
        try:
            for file in files:
                shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            # The lock goes last, while it is held: a process that waits for it finds it gone and makes its own.
            entry.lock.unlink(missing_ok=True)
        finally:
            lock.release()
        yield entry, size


def _clear(given: argparse.Namespace, found: Sequence[Entry], console: Console) -> None:
    chosen = _chosen(given, found)
    if given.dry_run:
        if not chosen:
            console.print("nothing to remove", highlight=False)
        for entry in chosen:
            console.print(f"would remove {entry.kind} {entry.name} ({_bytes(entry.size)})", highlight=False)
        return
    freed = [(entry, size) for entry, size in clear(chosen, only_leftovers=given.incomplete)]
    removed = [(entry, size) for entry, size in freed if size is not None]
    for entry, size in removed:
        if size:
            console.print(f"removed {entry.kind} {entry.name} ({_bytes(size)})", highlight=False)
    console.print(f"{_bytes(sum(size for _, size in removed))} freed", highlight=False)
    kept = [entry.name for entry, size in freed if size is None]
    if kept:
        raise ValueError(f"{len(kept)} in use by a running job and left alone: {', '.join(kept)}; try again later")


def _chosen(given: argparse.Namespace, found: Sequence[Entry]) -> list[Entry]:
    wanted = [given.all, bool(given.keys), given.older_than is not None, given.unused, given.incomplete]
    if sum(wanted) != 1:
        raise ValueError("say what to clear, one way: KEY …, --all, --older-than=30d, --unused or --incomplete")
    if given.keys:
        for key in given.keys:
            matching = [entry.key for entry in found if _is_called(entry, key)]
            if len(matching) != 1:
                raise ValueError(
                    f"{key!r} is the start of {len(matching)} keys; `layerif-store` lists them"
                    + (f": {', '.join(matching)}" if matching else "")
                )
        return [entry for entry in found if any(_is_called(entry, key) for key in given.keys)]
    if given.older_than is not None:
        return [entry for entry in found if entry.files and entry.age > given.older_than]
    if given.unused:
        return [entry for entry in found if entry.is_unused()]
    if given.incomplete:  # an entry that is being made holds its lock, so it is left alone
        return [entry for entry in found if entry.leftovers or not (entry.files or entry.in_use)]
    return list(found)


def _is_called(entry: Entry, key: str) -> bool:
    return entry.name.startswith(key) or entry.key.startswith(key)


def _describe(entry: Entry) -> None:
    """Reads the description that a file holds of itself, but none of its tensors."""
    from safetensors import SafetensorError, safe_open

    if entry.path is None or entry.path.is_dir():
        return
    try:
        with safe_open(entry.path, framework="np") as opened:
            header = opened.metadata() or {}
            if entry.kind == "grams":
                matrix = next(name for name in opened.keys() if name.endswith("val_train"))  # noqa: SIM118
                num_validation, num_train = opened.get_slice(matrix).get_shape()
                entry.samples = num_train, num_validation
        texts = {name: json.loads(header.get(name, "{}")) for name in ("description", "about")}
        entry.header = {"version": header.get("version", "1"), **texts}
    except (SafetensorError, OSError, ValueError, StopIteration):
        entry.problem = "cannot be read and would be computed anew"


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # a store that cannot be written: nobody makes anything there
        return False


def _size(path: Path) -> int:
    try:
        return sum(map(_size, path.iterdir())) if path.is_dir() else path.stat().st_size
    except FileNotFoundError:  # a job finished writing meanwhile
        return 0


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    words = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes"}
    for unit, word in words.items():
        if seconds >= 2 * _SECONDS[unit]:
            return f"{seconds / _SECONDS[unit]:.0f} {word}"
    return f"{max(seconds, 0):.0f} seconds"


def _duration(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; give a number and m, h, d or w, such as 30d")
    return float(found[1]) * _SECONDS[found[2]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="layerif-store", description="List and clear the store of measurements.")
    parser.add_argument("--store", type=Path, default=_DEFAULT, help="its folder (outputs/store)")
    after = argparse.ArgumentParser(add_help=False)  # so that --store may also stand after the command
    after.add_argument("--store", type=Path, default=argparse.SUPPRESS, help="its folder (outputs/store)")
    commands = parser.add_subparsers(dest="command", title="commands")
    commands.add_parser("list", parents=[after], help="list the entries and their sizes (the default)")
    clearing = commands.add_parser("clear", parents=[after], help="remove entries that no running job uses")
    clearing.add_argument("keys", nargs="*", metavar="KEY", help="entries whose key starts with this")
    clearing.add_argument("--all", action="store_true", help="all entries, converted models included")
    clearing.add_argument(
        "--older-than", type=_duration, metavar="AGE", help="entries older than this, such as 30d or 12h"
    )
    clearing.add_argument("--unused", action="store_true", help="entries of other versions or that cannot be read")
    clearing.add_argument(
        "--incomplete", action="store_true", help="only the leftovers of jobs that died while writing"
    )
    clearing.add_argument("--dry-run", action="store_true", help="say what would be removed")
    return parser


if __name__ == "__main__":
    main()
