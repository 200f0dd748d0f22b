"""Sources of rows, which are JSONL files or a dataset of the hub, and the values in their columns."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from layerif.files import parse_json


@dataclass(frozen=True)
class Row:
    """A raw row and its place, for messages: `train.jsonl:3`."""

    where: str
    fields: Mapping[str, Any]


class Source(Protocol):
    """A source gives the rows of a named split in a fixed order."""

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of a split. Raises ValueError where they cannot be read."""
        ...

    def files(self) -> list[Path] | None:
        """Lists the files that the rows are read from; while they stay the same, so do the rows. None: unknown."""
        ...


@dataclass(frozen=True, kw_only=True)
class JsonlFolder:
    """A folder with a file `<split>.jsonl` per split, in which each line is a JSON object of the dataset's columns."""

    path: str

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of a file. Raises ValueError, with file and line, where it is missing, empty or broken."""
        folder = Path(self.path).expanduser()
        if not self.path:
            raise ValueError(f"task.path is empty; give the folder that holds files such as {split}.jsonl")
        if not folder.is_dir():
            raise ValueError(
                f"task.path={self.path} is not a folder; give the folder that holds files such as {split}.jsonl"
            )
        file = folder / f"{split}.jsonl"
        if file.is_dir():
            raise ValueError(f"{file} is a folder; it must be a file that holds a JSON object per line")
        if not file.is_file():
            found = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
            raise ValueError(
                f"{file} does not exist; the folder holds {found}; "
                "add the file, or name the one to read: task.splits.<train|validation|test>=<file without .jsonl>"
            )
        is_empty = True
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                is_empty = False
                yield Row(f"{file}:{number}", json_object(line, f"{file}:{number}"))
        if is_empty:
            raise ValueError(f"{file} is empty; it must hold a JSON object per line")

    def files(self) -> list[Path]:
        return sorted(file for file in Path(self.path).expanduser().glob("*.jsonl") if file.is_file())


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset of the Hugging Face hub, read through `datasets`, and so from its cache where it is filled."""

    name: str
    config: str | None = None

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of a split. Raises ValueError, with how to use a local copy, where it cannot be read."""
        import datasets

        try:
            dataset = datasets.load_dataset(self.name, self.config, split=split)
        except (OSError, ValueError, RuntimeError) as error:  # connection, unknown dataset, configuration or split
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"cannot read split {split!r} of {self} from the hub: {reason}. Without the hub, set task.path=/folder "
                f"with files such as {split}.jsonl that hold a JSON object with the dataset's columns per line"
            ) from error
        index = 0
        table: Any
        # Arrow rows leave images undecoded: a text-only task needs no image library.
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            for fields in table.to_pylist():
                yield Row(f"{self} {split} row {index}", fields)
                index += 1

    def files(self) -> None:
        """Returns None, because the hub may have other rows the next time."""

    def __str__(self) -> str:
        return self.name if self.config is None else f"{self.name}/{self.config}"


def column_of(row: Row, dotted: str, setting: str) -> Any:
    """Returns the value under a dotted column name.

    Raises:
        ValueError: the row has no such column; names `setting`, where another one can be given.
    """
    value: Any = row.fields
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or key not in value:
            have = ", ".join(row.fields) or "none"
            raise ValueError(f"{row.where} has no column {dotted!r} (columns: {have}); set {setting} to one of them")
        value = value[key]
    return value


def options_of(value: Any, row: Row) -> tuple[list[str], list[str]]:
    """Returns texts and letters of an options column in any of the shapes that datasets use.

    Raises:
        ValueError: the column has another shape.
    """
    if isinstance(value, Mapping) and {"text", "label"} <= set(value):
        texts, letters = value["text"], value["label"]
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        texts, letters = ([item.get(key) for item in value] for key in ("text", "label"))
    elif isinstance(value, list):
        texts, letters = value, list(string.ascii_uppercase[: len(value)])
    else:
        texts, letters = None, None
    if (
        not isinstance(texts, list)
        or not isinstance(letters, list)
        or len(texts) < 2
        or len(texts) != len(letters)
        or not all(isinstance(text, str) for text in (*texts, *letters))
    ):
        raise ValueError(
            f"{row.where}: the options {str(value)[:80]} are not usable; they must be a list of 2 to 26 texts, "
            'or {"label": [...], "text": [...]} of equal lengths'
        )
    return texts, letters


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def json_object(line: str, where: str) -> Mapping[str, Any]:
    """Parses one line of a JSONL file.

    Raises:
        ValueError: the line is not a JSON object that can be used; names `where`, which is its place.
    """
    shown = line.strip()[:60]
    try:
        fields = parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}): {shown!r}; "
            "a line must hold one whole JSON object, so see if the file is truncated"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where} cannot be used: {error}; mend the row or leave it out") from error
    if not isinstance(fields, dict):
        raise ValueError(f'{where} is not a JSON object: {shown!r}; it must look like {{"column": value, ...}}')
    return fields
