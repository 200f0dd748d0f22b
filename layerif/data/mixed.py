"""Rows of several embedded sources in one task, equally many of each: the task `mixed`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from layerif.checks import Count, did_you_mean
from layerif.data.source import Row, Source


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A source of the first rows of each of several sources, in turn.

    The id of a row is the name of its source, a blank, and the id that it has there.

    Args:
        sources: by name, each with its own splits; their rows need a field `id`.
        train: the number of train rows of each source.
        validation: the number of validation rows of each.
        test: the number of test rows of each.
    """

    sources: Mapping[str, Source]
    train: Count = 60
    validation: Count = 48
    test: Count = 76

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("task.source.sources is empty; name at least one source")
        for name in self.sources:
            if not name or " " in name:
                raise ValueError(
                    f"task.source.sources.{name!r} is not a name: it must be one word, as ids begin with it"
                )

    def rows(self, split: str) -> Iterator[Row]:
        """Yields a row of each source, then the next of each. Raises ValueError where one has too few."""
        if split not in ("train", "validation", "test"):
            near = did_you_mean(split, ["train", "validation", "test"])
            raise ValueError(f"a mixed task has no split {split!r}{near}; use train, validation or test")
        wanted = getattr(self, split)
        of_sources = {name: list(islice(source.rows(split), wanted)) for name, source in self.sources.items()}
        for name, rows in of_sources.items():
            if len(rows) < wanted:
                raise ValueError(
                    f"task.source.{split}={wanted} asks for more rows than {name} has, which are {len(rows)}; use "
                    f"task.source.{split}={len(rows)} or fewer"
                )
        for together in zip(*of_sources.values(), strict=True):
            for name, row in zip(of_sources, together, strict=True):
                yield Row(row.where, {**row.fields, "id": f"{name} {row.fields['id']}"})

    def source_of(self, id: str) -> str:
        """Gives the name of the source that a row's id begins with."""
        return id.partition(" ")[0]

    def files(self) -> list[Path] | None:
        every = [source.files() for source in self.sources.values()]
        return None if None in every else sorted({file for files in every for file in files or ()})
