"""Sources of rows, which are files of a folder or a dataset of the hub, and the values in their columns."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol

from annotated_types import Ge

from layerif.checks import check_fields
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
class Folder:
    """A folder with a file per split (`train.jsonl`, `.parquet` or `.csv`), or one that `save_to_disk` wrote.

    Each line of a JSONL file is a JSON object of the dataset's columns.
    """

    path: str

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of a file. Raises ValueError, with file and row, where it is missing, empty or broken."""
        folder = Path(self.path).expanduser()
        if not self.path:
            raise ValueError(f"task.path is empty; give the folder that holds files such as {split}.jsonl")
        if not folder.is_dir():
            raise ValueError(
                f"task.path={self.path} is not a folder; give the folder that holds files such as {split}.jsonl"
            )
        file = self._file(folder, split)
        is_empty = True
        for where, fields in _READERS[file.suffix](file):
            is_empty = False
            yield Row(where, fields)
        if is_empty:
            holds = "a JSON object per line" if file.suffix == ".jsonl" else "at least one row"
            raise ValueError(f"{file} is empty; it must hold {holds}")

    def files(self) -> list[Path]:
        folder = Path(self.path).expanduser()
        saved = [file for split in folder.glob("*/dataset_info.json") for file in split.parent.glob("*.arrow")]
        return sorted([file for file in folder.glob("*.*") if file.suffix in _READERS and file.is_file()] + saved)

    def splits(self) -> dict[Path, str]:
        """Gives the split that each of `files` belongs to."""
        return {file: file.parent.name if file.suffix == ".arrow" else file.stem for file in self.files()}

    def _file(self, folder: Path, split: str) -> Path:
        """Finds the file, or the saved folder, of a split."""
        if (folder / split / "dataset_info.json").is_file():
            return (folder / split).with_suffix("")
        named = [folder / f"{split}{suffix}" for suffix in _READERS if suffix]
        there = [file for file in named if file.exists()]
        if len(there) > 1:
            raise ValueError(f"{there[0]} and {there[1].name} are both there; keep one file of each split")
        if not there:
            names = {split if file.suffix == ".arrow" else file.name for file, split in self.splits().items()}
            found = ", ".join(sorted(names)) or "no .jsonl file"
            raise ValueError(
                f"{folder / split}.jsonl does not exist; the folder holds {found}; "
                "add the file, or name the one to read: task.splits.<train|validation|test>=<file without .jsonl>"
            )
        if there[0].is_dir():
            raise ValueError(f"{there[0]} is a folder; it must be a file that holds a JSON object per line")
        return there[0]


def _of_jsonl(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield f"{file}:{number}", json_object(line, f"{file}:{number}")


def _of_parquet(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for table in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for fields in table.to_pylist():
                yield f"{file} row {number}", fields
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as a Parquet file: {error}; write it again") from error


def _of_csv(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(_lines(file), strict=True)
    try:
        for fields in reader:
            if None in fields or None in fields.values():
                raise ValueError(f"{file}:{reader.line_num} has more or fewer cells than the first line; mend the row")
            yield f"{file}:{reader.line_num}", fields
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num} is not a row of a CSV file: {error}; mend the row") from error


def _of_saved(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    try:
        table = datasets.load_from_disk(str(folder)).with_format("arrow")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a folder that save_to_disk wrote: {error}; write it again") from error
    number = 0
    for batch in table.iter(batch_size=1000):  # type: ignore[union-attr]
        for fields in batch.to_pylist():  # type: ignore[union-attr]
            yield f"{folder} row {number}", fields
            number += 1


# By the ending of a file; a folder of `save_to_disk` has none.
_READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    ".jsonl": _of_jsonl,
    ".parquet": _of_parquet,
    ".csv": _of_csv,
    "": _of_saved,
}


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset of the Hugging Face hub, read through `datasets`, and so from its cache where it is filled.

    Attributes:
        name: the name of the dataset.
        config: the name of its configuration.
        streaming: read rows while they are loaded, and keep nothing.
        num_rows: read the first rows of a split only; None reads all.
    """

    name: str
    config: str | None = None
    streaming: bool = False
    num_rows: Annotated[int, Ge(1), "null reads all rows"] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "task.source")

    def rows(self, split: str) -> Iterator[Row]:
        """Yields the rows of a split. Raises ValueError, with how to use a local copy, where it cannot be read."""
        import datasets

        try:
            dataset = datasets.load_dataset(self.name, self.config, split=split, streaming=self.streaming)
        except (OSError, ValueError, RuntimeError) as error:  # connection, unknown dataset, configuration or split
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"cannot read split {split!r} of {self} from the hub: {reason}. Without the hub, set task.path=/folder "
                f"with files such as {split}.jsonl that hold a JSON object with the dataset's columns per line"
            ) from error
        # Arrow rows leave images undecoded: a text-only task needs no image library.
        tables: Any = dataset.with_format("arrow").iter(batch_size=1000)
        rows = (fields for table in tables for fields in table.to_pylist())
        for index, fields in enumerate(islice(rows, self.num_rows)):
            yield Row(f"{self} {split} row {index}", fields)

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
