"""What a run left in its `.wandb` file: protobufs in LevelDB's log format, records cut into blocks of 32 KiB."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] - for the protobuf at hand

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7  # crc32 (4), length (2, little-endian), type (1)
_FULL, _FIRST, _LAST = 1, 2, 4


class WandbFile:
    """The only run below a folder, or the one in the folder `run`."""

    def __init__(self, folder: Path, run: str = "*run-*") -> None:
        (self.file,) = folder.glob(f"wandb/{run}/*.wandb")
        deadline = time.monotonic() + 30
        while True:  # wandb's other process writes the last records after `finish` returned
            self.records = list(_records(self.file.read_bytes()))
            if self.all("exit") or time.monotonic() > deadline:
                break
            time.sleep(0.05)

    def all(self, kind: str) -> list[Any]:
        """Every record of a kind, in the order they were written."""
        return [getattr(record, kind) for record in self.records if record.WhichOneof("record_type") == kind]

    @property
    def history(self) -> list[dict[str, Any]]:
        return [_values(row.item) for row in self.all("history")]

    @property
    def summary(self) -> dict[str, Any]:
        return {key: value for part in self.all("summary") for key, value in _values(part.update).items()}

    @property
    def config(self) -> dict[str, Any]:
        """Without wandb's own."""
        return {key: value for key, value in self._updates.items() if not key.startswith("_wandb")}

    @property
    def charts(self) -> dict[str, Any]:
        """Custom charts, by name."""
        prefix = "_wandb.visualize."
        return {key.removeprefix(prefix): value for key, value in self._updates.items() if key.startswith(prefix)}

    def table(self, name: str) -> pd.DataFrame:
        path = next(row[f"{name}.path"] for row in self.history if f"{name}.path" in row)
        content = json.loads((self.file.parent / "files" / path).read_text())
        return pd.DataFrame(content["data"], columns=content["columns"])

    @property
    def _updates(self) -> dict[str, Any]:
        parts = [run.config for run in self.all("run")] + self.all("config")
        return {key: value for part in parts for key, value in _values(part.update).items()}


def _records(data: bytes) -> Any:
    position, unfinished = _FILE_HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        start = position + _HEADER
        position = start + length
        unfinished = data[start:position] if kind in (_FULL, _FIRST) else unfinished + data[start:position]
        if kind in (_FULL, _LAST):
            yield Record.FromString(unfinished)


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
