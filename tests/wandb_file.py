"""What a run left in its `.wandb` file: blocks of 32 KiB with records in LevelDB's log format, each a protobuf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7  # crc32 (4), length (2, little-endian), type (1)
_FULL, _FIRST, _LAST = 1, 2, 4


def records(folder: Path) -> list[Record]:
    """All records of the only run below `folder`, in the order they were written."""
    (file,) = folder.glob("wandb/*run-*/*.wandb")
    data = file.read_bytes()
    found, position, unfinished = [], _FILE_HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part = data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        unfinished = part if kind in (_FULL, _FIRST) else unfinished + part
        if kind in (_FULL, _LAST):
            found.append(Record.FromString(unfinished))
    return found


def history(found: list[Record]) -> list[dict[str, Any]]:
    """The logged rows."""
    return [_items(record.history) for record in found if record.HasField("history")]


def summary(found: list[Record]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for record in found:
        if record.HasField("summary"):
            merged |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
    return merged


def config(found: list[Record]) -> dict[str, Any]:
    """What the run was given, without wandb's own."""
    merged: dict[str, Any] = {}
    for record in found:
        updates = [*record.run.config.update, *record.config.update]
        merged |= {_key(item): json.loads(item.value_json) for item in updates}
    return {key: value for key, value in merged.items() if not key.startswith("_")}


def _items(message: Any) -> dict[str, Any]:
    return {_key(item): json.loads(item.value_json) for item in message.item}


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)
