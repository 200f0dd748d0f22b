"""A task: its settings, its splits, and the rules that keep test rows out of training and scoring."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from random import Random
from typing import Annotated, Generic, Protocol, TypeVar

from annotated_types import Ge

from layerif.checks import Seed, check_fields
from layerif.data.render import Example, RenderedRow, Renderer, Template, answer_parser
from layerif.data.rows import AnyExample, RowKind, example_of
from layerif.data.source import Folder, Row, Source, column_of

PARTS = ("train", "validation", "test")
Limit = Annotated[int, Ge(1), "null takes all rows"]
_E = TypeVar("_E", bound=AnyExample)


@dataclass(frozen=True)
class Splits(Generic[_E]):
    """The examples of a task.

    Args:
        train: the examples to learn and to score from.
        validation: the examples that scores are measured on.
        test: the examples to evaluate on.
        num_dropped: the number of train rows dropped because validation or test ask the same, and of validation rows
            dropped because test does.
        unread: the files of rows in the task's folder that no part reads.
    """

    train: tuple[_E, ...]
    validation: tuple[_E, ...]
    test: tuple[_E, ...]
    num_dropped: int = 0
    unread: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every example, without the fields that follow from the others."""
        left_out = ("question", "unread")
        content = asdict(self, dict_factory=lambda items: {key: value for key, value in items if key not in left_out})
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Reader(Protocol):
    """Turns rows into examples."""

    def read(self, row: Row, default_id: str) -> RenderedRow | None:
        """Reads a row; None where it is left out."""
        ...


@dataclass(frozen=True, kw_only=True)
class AnyTask(ABC, Generic[_E]):
    """The settings that every task has: where its rows come from, and how they are split.

    Args:
        name: the name of the task in results.
        path: a folder with a file per split (`train.jsonl`, `.parquet` or `.csv`) with the dataset's columns, or one
            that `save_to_disk` wrote; null reads `source`.
        source: the source of the rows, for example a dataset of the hub.
        columns: by name, the column of the dataset, with dots where it is nested; null leaves a name out. Other columns
            keep their own name. The name `id` names the example.
        pattern: a regular expression whose first group is the answer in a generated text.
        splits: by part (train, validation, test), the split of the dataset. Null for validation holds a part of train
            out: a tenth of it, or `num_validation` rows; all copies of a question stay together. Two parts cannot
            have the same split.
        template: the text around instruction and output, see `layerif.data.batches`.
        num_train: the most train rows, chosen by `seed`; a smaller choice is part of a larger one.
        num_validation: the most validation rows.
        num_test: the most test rows.
        drop_overlap: drop train rows that ask what validation or test ask, and validation rows that ask what test
            asks, instead of refusing them.
        seed: chooses the rows.
    """

    name: str
    path: str | None = None
    source: Source | None = None
    columns: Mapping[str, str | None]
    pattern: str | None
    splits: Mapping[str, str | None]
    template: Template
    num_train: Limit | None = None
    num_validation: Limit | None = None
    num_test: Limit | None = None
    drop_overlap: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "task")
        # A template or pattern that does not parse fails here, before any row is read.
        self.reader()
        if self.pattern is not None:
            answer_parser(self.pattern)
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

    @abstractmethod
    def reader(self) -> Reader:
        """Makes what turns a row into an example."""

    def load(self) -> Splits[_E]:
        """Reads, renders and checks all three parts.

        A process reads the rows of files once, as long as the files stay the same, and those of the hub every time.

        Raises:
            ValueError: a row cannot be read or rendered, an id comes twice in a part, or (unless `drop_overlap`) a
                train row asks what validation or test ask, or a validation row asks what test asks.
        """
        files = self._source().files()
        if files is None:
            return self._load()
        stats = [(str(file), file.stat()) for file in files]
        return _load_once(self, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))

    def _source(self) -> Source:
        source = Folder(path=self.path) if self.path is not None else self.source
        if source is None:
            raise ValueError(
                f"task {self.name} has no rows to read; set task.path=/folder with the files "
                + ", ".join(f"{name}.jsonl" for name in self.splits.values() if name)
            )
        return source

    def _load(self) -> Splits[_E]:
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
            unread=self._unread(),
        )

    def _unread(self) -> tuple[str, ...]:
        if self.path is None:
            return ()
        found = Folder(path=self.path).splits()
        return tuple(
            dict.fromkeys(
                split if file.suffix == ".arrow" else file.name
                for file, split in found.items()
                if split not in self.splits.values()
            )
        )

    def _read(self, part: str) -> list[RenderedRow]:
        split = self.splits[part]
        assert split is not None
        source, renderer, num_rows = self._source(), self.reader(), 0
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
            nothing = f"task {self.name}: nothing is left of the {num_rows} rows of split {split!r}"
            raise ValueError(f"{nothing}{self.left_out()}")
        return list(by_id.values())

    def _apart(
        self, part: str, rows: list[RenderedRow], other: str, others: list[RenderedRow]
    ) -> tuple[list[RenderedRow], int]:
        """Returns `rows` without those that ask what `others` ask, and the number of those."""
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

    def left_out(self) -> str:
        """Words the setting that leaves rows out, for a message."""
        return "; name another split in task.splits"

    def _choose(self, part: str, rows: list[RenderedRow]) -> tuple[_E, ...]:
        limit = getattr(self, f"num_{part}")
        if limit is None or limit >= len(rows):
            return tuple(row.example for row in rows)
        return tuple(rows[index].example for index in sorted(self._shuffled(part, len(rows))[:limit]))

    def _shuffled(self, what: str, num: int) -> list[int]:
        return Random(f"{self.seed} {what}").sample(range(num), num)


@dataclass(frozen=True, kw_only=True)
class Task(AnyTask[Example]):
    """The settings that turn rows into questions with options.

    Two rows ask the same if their instructions are equal but for case, blanks and the order of `options`. Other
    wording, other wrong options in the instruction, and options outside the name `options` are not found.

    Args:
        columns: by name in the templates, the column of the dataset. Two names have a meaning: `id` names the example,
            and `options` (a list of texts, or of {label, text}, or the hub's {label: [...], text: [...]}) becomes the
            list of texts, with the dataset's labels, or A, B, C and so on, in `letters`.
        instruction: the Jinja template of the instruction.
        output: the Jinja template of the output, which uses `label`.
        labels: a Jinja expression for the list of labels.
        answer: a Jinja expression for the right option. A whole number is its index from 0, as in the hub's datasets,
            and is refused where it is also the label of another option. A text is the option's label, or, where no
            label is equal, the option's text.
        keep: a Jinja expression that is true for the rows to keep; null keeps all.
    """

    template: Template = "alpaca"
    pattern: str
    instruction: str
    output: str
    labels: str
    answer: str
    keep: str | None = None

    def reader(self) -> Reader:
        return Renderer(self)

    def left_out(self) -> str:
        return f" after task.keep={self.keep!r}; change the condition, or set task.keep=null"

    def __hash__(self) -> int:
        return hash(repr(self))  # some fields are mappings, which have no hash


@dataclass(frozen=True, kw_only=True)
class RowTask(AnyTask[AnyExample]):
    """The settings of a task whose rows have no options, see `layerif.data.rows`.

    Args:
        kind: the kind of its rows.
        template: the text around a prompt; texts, conversations and token ids are not changed by it.
        columns: by the column that the kind of row needs, the column of the dataset.
    """

    kind: RowKind
    template: Template = "plain"
    pattern: str | None = None

    def reader(self) -> Reader:
        return self

    def read(self, row: Row, default_id: str) -> RenderedRow:
        """Turns a row into an example.

        Raises:
            ValueError: a column is missing, or holds something else than it should; names the row.
        """
        fields = dict(row.fields)
        for name, column in self.columns.items():
            if column is not None:
                fields[name] = column_of(row, column, f"task.columns.{name}")
        id = str(fields["id"]) if self.columns.get("id") else default_id
        return RenderedRow(example_of(fields, id=id, where=row.where, kind=self.kind), row.where)

    def __hash__(self) -> int:
        return hash(repr(self))


@lru_cache(maxsize=4)
def _load_once(task: AnyTask[_E], files: tuple[tuple[str, int, int], ...]) -> Splits[_E]:
    return task._load()
