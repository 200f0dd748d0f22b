"""A task: rows turned into prompts and answers, split so that nothing evaluated is ever learned or scored from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from random import Random
from typing import Any, Literal, get_args

from jinja2 import StrictUndefined, TemplateError
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from layerif.data.answers import answer_parser
from layerif.data.source import Jsonl, Row, Source, column_of, options_of

Template = Literal["plain", "alpaca"]

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One question. options: the full outputs ("Answer: The answer is B."), labels: their short names ("B").

    answer: index of the right one in both. question: what it asks, equal for rows that ask the same; of an example that
    no task has rendered, its instruction but for case and blanks.
    """

    id: str
    instruction: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    answer: int
    question: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", self.question or folded(self.instruction))

    @property
    def output(self) -> str:
        """The right output."""
        return self.options[self.answer]


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
        _Renderer(self)
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
        source = Jsonl(path=self.path) if self.path is not None else self.source
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

    def _read(self, part: str) -> list[_Read]:
        split = self.splits[part]
        assert split is not None
        source, renderer, num_rows = self._source(), _Renderer(self), 0
        by_id: dict[str, _Read] = {}
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

    def _apart(self, part: str, rows: list[_Read], other: str, others: list[_Read]) -> tuple[list[_Read], int]:
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

    def _hold_out(self, train: list[_Read]) -> tuple[list[_Read], list[_Read]]:
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

    def _choose(self, part: str, rows: list[_Read]) -> tuple[Example, ...]:
        limit = getattr(self, f"num_{part}")
        if limit is None or limit >= len(rows):
            return tuple(row.example for row in rows)
        return tuple(rows[index].example for index in sorted(self._shuffled(part, len(rows))[:limit]))

    def _shuffled(self, what: str, num: int) -> list[int]:
        return Random(f"{self.seed} {what}").sample(range(num), num)


@lru_cache(maxsize=4)
def _load_once(task: Task, files: tuple[tuple[str, int, int], ...]) -> Splits:
    return task._load()


@dataclass(frozen=True)
class _Read:
    """An example, and where its row stands."""

    example: Example
    where: str


class _Renderer:
    """The compiled templates and expressions of one task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        # Task files are shared: they may format rows, never reach into Python.
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null
        )

        def compiled(field: str, compile: Any, **options: Any) -> Any:
            try:
                return compile(getattr(task, field), **options)
            except TemplateError as error:
                raise ValueError(f"task.{field}={getattr(task, field)!r} is no Jinja: {error.message}") from error

        self.instruction = compiled("instruction", environment.from_string)
        self.output = compiled("output", environment.from_string)
        self.expressions = {
            field: compiled(field, environment.compile_expression, undefined_to_none=False)
            for field in ("labels", "answer", "keep")
            if getattr(task, field) is not None
        }

    def read(self, row: Row, default_id: str) -> _Read | None:
        """The example of a row, None where `keep` is false."""
        names = self._names(row)
        if "keep" in self.expressions and not self._value("keep", names, row):
            return None
        labels = self._labels(names, row)
        instruction = self._text("instruction", self.instruction, names, row)
        example = Example(
            id=str(names["id"]) if self.task.columns.get("id") else default_id,
            instruction=instruction,
            options=tuple(self._text("output", self.output, {**names, "label": label}, row) for label in labels),
            labels=labels,
            answer=self._answer_index(names, labels, row),
            question=self._question(instruction, names, row),
        )
        return _Read(example, row.where)

    def _question(self, instruction: str, names: Mapping[str, Any], row: Row) -> str:
        """The instruction in lower case, blanks made one, its options sorted."""
        if self.task.columns.get("options"):
            options, letters = (sorted(map(folded, names[name])) for name in ("options", "letters"))
            names = {**names, "options": options, "letters": letters}
            instruction = self._text("instruction", self.instruction, names, row)
        return folded(instruction)

    def _names(self, row: Row) -> dict[str, Any]:
        """What templates see: the row's columns, then the task's own names."""
        names = dict(row.fields)
        for name, column in self.task.columns.items():
            if column is not None:
                names[name] = column_of(row, column, f"task.columns.{name}")
        if self.task.columns.get("options"):
            names["options"], names["letters"] = options_of(names["options"], row)
        return names

    def _labels(self, names: Mapping[str, Any], row: Row) -> tuple[str, ...]:
        labels = self._value("labels", names, row)
        if not isinstance(labels, list | tuple) or not labels:
            raise ValueError(
                f"{row.where}: task.labels={self.task.labels!r} gave {labels!r}; it should give a list of texts"
            )
        labels = tuple(str(label) for label in labels)
        if len(set(labels)) < len(labels):
            raise ValueError(f"{row.where}: labels {list(labels)} repeat; each option needs its own label")
        return labels

    def _answer_index(self, names: Mapping[str, Any], labels: tuple[str, ...], row: Row) -> int:
        answer = self._value("answer", names, row)
        if isinstance(answer, int) and not isinstance(answer, bool):
            found = {answer} if 0 <= answer < len(labels) else set()
            if str(answer) in labels and found != {labels.index(str(answer))}:
                raise ValueError(
                    f"{row.where}: the answer {answer} is a whole number and so an index from 0, and it is the label "
                    f"'{answer}' of {list(labels)}, which is not the same one; say what it is: the label, by "
                    f"task.answer='({self.task.answer})|string', or the index, by "
                    f"task.answer='({self.task.labels})[{self.task.answer}]'"
                )
        else:
            texts = names["options"] if self.task.columns.get("options") else ()
            # Letters come first: an option may well read "A".
            found = {index for index, label in enumerate(labels) if label == answer}
            found = found or {index for index, text in enumerate(texts) if text == answer}
        if len(found) == 1:
            return found.pop()
        problem = "fits more than one of" if found else "is none of"
        raise ValueError(
            f"{row.where}: the answer {answer!r} {problem} the labels {list(labels)}; it should be one label, "
            f"the text of one option, or an index from 0 to {len(labels) - 1}. Are the labels of this split hidden? "
            "Then name another in task.splits"
        )

    def _value(self, field: str, names: Mapping[str, Any], row: Row) -> Any:
        try:
            value = self.expressions[field](names)
        except (TemplateError, TypeError) as error:
            raise self._error(field, error, names, row) from error
        if isinstance(value, Undefined):
            raise self._error(field, f"it names nothing known in {getattr(self.task, field)!r}", names, row)
        return value

    def _text(self, field: str, template: Any, names: Mapping[str, Any], row: Row) -> str:
        try:
            return template.render(names)
        except (TemplateError, TypeError) as error:
            raise self._error(field, error, names, row) from error

    def _error(self, field: str, reason: object, names: Mapping[str, Any], row: Row) -> ValueError:
        empty = ", ".join(sorted(name for name, value in names.items() if value is None))
        if isinstance(reason, _Null):
            reason = f"{empty or 'a value'} is null in this row; fill it in, or leave such rows out with task.keep"
        return ValueError(
            f"{row.where}: task.{field} cannot be filled in: {reason}. Known names: {', '.join(sorted(names))}"
        )


class _Null(TemplateError):
    """A template would write `None`."""


def _not_null(value: Any) -> Any:
    if value is None:
        raise _Null()
    return value


def folded(text: str) -> str:
    """What is compared of two texts: case and blanks count for nothing."""
    return " ".join(text.casefold().split())
