"""Where rows come from (JSONL files or a hub dataset), and what their columns hold."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Row:
    """One raw row and where it stands, for messages: `train.jsonl:3`."""

    where: str
    fields: Mapping[str, Any]


class Source(Protocol):
    """Anything that gives the rows of a named split, in a fixed order."""

    def rows(self, split: str) -> Iterator[Row]: ...

    def files(self) -> list[Path] | None:
        """What the rows are read from, as far as it is there: the same files, the same rows. None: cannot be told."""
        ...


@dataclass(frozen=True, kw_only=True)
class JsonlFolder:
    """A folder with one `<split>.jsonl` per split, one JSON object with the dataset's columns a line."""

    path: str

    def rows(self, split: str) -> Iterator[Row]:
        """Raises ValueError, with file and line, for a missing, empty or broken file."""
        folder = Path(self.path).expanduser()
        if not self.path:
            raise ValueError(f"task.path is empty; give the folder that holds files such as {split}.jsonl")
        if not folder.is_dir():
            raise ValueError(f"task.path={self.path} is not a folder; it should hold files such as {split}.jsonl")
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            found = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
            raise ValueError(
                f"{file} does not exist; the folder holds {found}. "
                "Add the file, or name the one to read: task.splits.<train|validation|test>=<file without .jsonl>"
            )
        number = 0
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield Row(f"{file}:{number}", _json_object(line, f"{file}:{number}"))
        if number == 0:
            raise ValueError(f"{file} is empty; it should hold one JSON object a line")

    def files(self) -> list[Path]:
        return sorted(Path(self.path).expanduser().glob("*.jsonl"))


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset of the Hugging Face hub, read through `datasets` (and so from its cache, when it is there)."""

    name: str
    config: str | None = None

    def rows(self, split: str) -> Iterator[Row]:
        """Raises ValueError when the dataset or split cannot be had, saying how to use a local copy."""
        import datasets  # heavy, and needed by hub tasks only

        try:
            dataset = datasets.load_dataset(self.name, self.config, split=split)
        except (OSError, ValueError, RuntimeError) as error:  # connection, unknown dataset, configuration or split
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"cannot read split {split!r} of {self} from the hub: {reason}. Without the hub, set task.path=/folder "
                f"with files such as {split}.jsonl that hold the dataset's columns, one JSON object a line"
            ) from error
        index = 0
        table: Any
        # Arrow rows leave images undecoded: a text-only task needs no image library.
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            for fields in table.to_pylist():
                yield Row(f"{self} {split} row {index}", fields)
                index += 1

    def files(self) -> None:
        """The hub may have other rows the next time."""

    def __str__(self) -> str:
        return self.name if self.config is None else f"{self.name}/{self.config}"


def column_of(row: Row, dotted: str, setting: str) -> Any:
    """The value under a dotted column name."""
    value: Any = row.fields
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or key not in value:
            have = ", ".join(row.fields) or "none"
            raise ValueError(f"{row.where} has no column {dotted!r} (columns: {have}); set {setting}=<one of them>")
        value = value[key]
    return value


def options_of(value: Any, row: Row) -> tuple[list[str], list[str]]:
    """(texts, letters) of an options column in any of the shapes data sets have."""
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
            f"{row.where}: the options {str(value)[:80]} are not usable; they should be a list of 2 to 26 texts, "
            'or {"label": [...], "text": [...]} of equal lengths'
        )
    return texts, letters


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _json_object(line: str, where: str) -> Mapping[str, Any]:
    shown = line.strip()[:60]
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}): {shown!r}; "
            "is the file truncated? It should hold one complete JSON object a line"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f'{where} is not a JSON object: {shown!r}; it should look like {{"column": value, ...}}')
    return fields
