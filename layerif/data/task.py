"""A task: rows turned into prompts and answers, split so that nothing evaluated is ever learned or scored from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from random import Random
from typing import get_args

from layerif.data.render import Example, RenderedRow, Renderer, Template, answer_parser
from layerif.data.source import JsonlFolder, Source

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """The examples of a task. num_dropped: train rows dropped because test or validation ask the same, and validation
    rows dropped because test does.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    num_dropped: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every example, less what follows from the rest."""
        content = asdict(self, dict_factory=lambda items: {key: value for key, value in items if key != "question"})
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Task:
    """How rows become examples; every field is the configuration of the same name.

    path: folder of `<split>.jsonl` files with the dataset's columns; null reads `source` (a hub dataset, say).
    columns: name in the templates -> column of the dataset, dotted where nested; null leaves a name out. Other columns
        keep their own name. Two names mean something: `id` names the example, and `options` (a list of texts, or of
        {label, text}, or the hub's {label: [...], text: [...]}) becomes the list of texts, with `letters` beside it
        (the dataset's labels, or A, B, C …).
    instruction: Jinja template of the instruction; output: of the output, over `label`.
    labels, answer, keep: Jinja expressions: the list of labels, the right one (a whole number: its index from 0, as hub
        datasets mean it, refused where it is also another one's label; a text: its label, or, where it is none of the
        labels, the text of its option), and which rows stay (null: all).
    pattern: regular expression whose first group is the answer in a generated text.
    splits: part (train, validation, test) -> the dataset's split. Null for validation holds part of train out: a tenth,
        or `num_validation`, copies of a question all on one side. One split for two parts is refused.
    template: what stands around instruction and output, see `data/batches.py`.
    num_train, num_validation, num_test: at most so many rows, chosen by `seed` (a smaller choice is part of a larger).
    drop_overlap: drop train rows that ask what validation or test ask, and validation rows that ask what test asks,
        rather than refuse. Two rows ask the same where their instructions are equal but for case, blanks and the order
        of `options`, whatever their labels. Not found: other wording, other wrong options where the instruction shows
        them, options outside the name `options`.
    """

    name: str
    path: str | None = None
    source: Source | None = None
    columns: Mapping[str, str | None]
    instruction: str
    output: str
    labels: str
    answer: str
    keep: str | None = None
    pattern: str
    splits: Mapping[str, str | None]
    template: Template = "alpaca"
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None
    drop_overlap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # What does not parse fails here, before any row is read.
        Renderer(self)
        answer_parser(self.pattern)
        if self.template not in get_args(Template):
            raise ValueError(f"task.template={self.template} is unknown; use one of {', '.join(get_args(Template))}")
        if set(self.splits) != set(PARTS):
            raise ValueError(f"task.splits names {sorted(self.splits)}; it needs exactly train, validation and test")
        for part in ("train", "test"):
            if not self.splits[part]:
                raise ValueError(f"task.splits.{part} is empty; name one of the dataset's splits")
        for first, second in (("train", "test"), ("validation", "test"), ("train", "validation")):
            if self.splits[first] == self.splits[second]:
                raise ValueError(
                    f"task.splits.{first} and task.splits.{second} are both {self.splits[first]!r}: "
                    "the same rows would be learned or scored from and evaluated on; name another split, "
                    "or set task.splits.validation=null to hold part of train out"
                )
        for part in PARTS:
            limit = getattr(self, f"num_{part}")
            if limit is not None and limit < 1:
                raise ValueError(f"task.num_{part}={limit} leaves no row; use 1 or more, or null for all")

    def load(self) -> Splits:
        """Read, render and check all three parts.

        Raises ValueError for rows that cannot be read or rendered, for an id twice in a part, and for rows that ask
        what a later part asks, which train (before validation) and validation (before test) must not (unless
        `drop_overlap`). Rows are read once in a process as long as the files of the source stay; of a hub every time.
        """
        files = self._source().files()
        if files is None:
            return self._load()
        stats = [(str(file), file.stat()) for file in files]
        return _load_once(self, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))

    def __hash__(self) -> int:
        return hash(repr(self))  # mappings among the fields have no hash of their own

    def _source(self) -> Source:
        source = JsonlFolder(path=self.path) if self.path is not None else self.source
        if source is None:
            raise ValueError(
                f"task {self.name} has no rows to read; set task.path=/folder with the files "
                + ", ".join(f"{name}.jsonl" for name in self.splits.values() if name)
            )
        return source

    def _load(self) -> Splits:
        test = self._read("test")
        train, num_dropped = self._apart("train", self._read("train"), "test", test)
        if self.splits["validation"] is None:
            train, validation = self._hold_out(train)
        else:
            validation, num_from_validation = self._apart("validation", self._read("validation"), "test", test)
            train, num_from_train = self._apart("train", train, "validation", validation)
            num_dropped += num_from_validation + num_from_train
        return Splits(
            train=self._choose("train", train),
            validation=self._choose("validation", validation),
            test=self._choose("test", test),
            num_dropped=num_dropped,
        )

    def _read(self, part: str) -> list[RenderedRow]:
        split = self.splits[part]
        assert split is not None
        source, renderer, num_rows = self._source(), Renderer(self), 0
        by_id: dict[str, RenderedRow] = {}
        for num_rows, row in enumerate(source.rows(split), start=1):
            read = renderer.read(row, default_id=f"{split}-{num_rows}")
            if read is None:
                continue
            first = by_id.setdefault(read.example.id, read)
            if first is not read:
                raise ValueError(
                    f"{first.where} and {read.where} have the same id {read.example.id!r}; "
                    "give each row its own, or name another column in task.columns.id (null numbers the rows)"
                )
        if not by_id:
            raise ValueError(
                f"task {self.name}: nothing is left of the {num_rows} rows of split {split!r} "
                f"after task.keep={self.keep!r}; change the condition, or set task.keep=null"
            )
        return list(by_id.values())

    def _apart(
        self, part: str, rows: list[RenderedRow], other: str, others: list[RenderedRow]
    ) -> tuple[list[RenderedRow], int]:
        """`rows` without those that ask what `others` ask, and how many those were."""
        asked = {row.example.question for row in others}
        kept = [row for row in rows if row.example.question not in asked]
        num_dropped = len(rows) - len(kept)
        if num_dropped and not self.drop_overlap:
            raise ValueError(
                f"task {self.name}: {num_dropped} of {len(rows)} rows of {part} (split {self.splits[part]!r}) "
                f"ask what rows of {other} (split {self.splits[other]!r}) ask: scores and weights would see what they "
                f"are judged by; set task.drop_overlap=true to drop them from {part}, or name other splits"
            )
        if not kept:
            raise ValueError(
                f"task {self.name}: every row of {part} is also in {other}; name other splits in task.splits"
            )
        return kept, num_dropped

    def _hold_out(self, train: list[RenderedRow]) -> tuple[list[RenderedRow], list[RenderedRow]]:
        num = self.num_validation if self.num_validation is not None else max(1, len(train) // 10)
        if num >= len(train):
            raise ValueError(
                f"task {self.name}: holding {num} of {len(train)} train rows out for validation "
                f"leaves none to train on; use task.num_validation<{len(train)}"
            )
        copies = Counter(row.example.question for row in train)
        chosen: set[str] = set()
        for index in self._shuffled("held out", len(train)):
            question = train[index].example.question
            if question not in chosen and copies[question] <= num:
                chosen.add(question)
                num -= copies[question]
        if not chosen:
            raise ValueError(
                f"task {self.name}: its train rows repeat each question at least {min(copies.values())} times, "
                f"so holding {num} out splits a question; use task.num_validation>={min(copies.values())}, "
                "or name a split of its own in task.splits.validation"
            )
        return (
            [row for row in train if row.example.question not in chosen],
            [row for row in train if row.example.question in chosen],
        )

    def _choose(self, part: str, rows: list[RenderedRow]) -> tuple[Example, ...]:
        limit = getattr(self, f"num_{part}")
        if limit is None or limit >= len(rows):
            return tuple(row.example for row in rows)
        return tuple(rows[index].example for index in sorted(self._shuffled(part, len(rows))[:limit]))

    def _shuffled(self, what: str, num: int) -> list[int]:
        return Random(f"{self.seed} {what}").sample(range(num), num)


@lru_cache(maxsize=4)
def _load_once(task: Task, files: tuple[tuple[str, int, int], ...]) -> Splits:
    return task._load()
