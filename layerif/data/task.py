"""A task: rows turned into prompts and answers, split so that nothing evaluated is ever learned or scored from."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, get_args

from jinja2 import StrictUndefined, TemplateError
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from layerif.data.source import Jsonl, Row, Source

Template = Literal["plain", "alpaca"]

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One question. options: the full outputs ("Answer: The answer is B."), labels: their short names ("B").

    answer: index of the right one in both.
    """

    id: str
    instruction: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    answer: int

    @property
    def output(self) -> str:
        """The right output."""
        return self.options[self.answer]


@dataclass(frozen=True)
class Splits:
    """The examples of a task. num_dropped: train and validation rows dropped because the test split holds them too."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    num_dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """How rows become examples; every field is the configuration of the same name.

    path: folder of `<split>.jsonl` files with the dataset's columns; null reads `source` (a hub dataset, say).
    columns: name in the templates -> column of the dataset, dotted where nested; null leaves a name out. Other columns
        keep their own name. Two names mean something: `id` names the example, and `options` (a list of texts, or of
        {label, text}, or the hub's {label: [...], text: [...]}) becomes the list of texts, with `letters` beside it
        (the dataset's labels, or A, B, C …).
    instruction: Jinja template of the instruction; output: of the output, over `label`.
    labels, answer, keep: Jinja expressions: the list of labels, the right one (its index, its label, or, where it is
        none of the labels, the text of its option), and which rows stay (null: all).
    pattern: regular expression whose first group is the answer in a generated text.
    splits: part (train, validation, test) -> the dataset's split. Null for validation holds part of train out: a tenth,
        or `num_validation`. A test split that also serves as another part is refused.
    template: what stands around instruction and output, see `data/batches.py`.
    num_train, num_validation, num_test: at most so many rows, chosen by `seed` (a smaller choice is part of a larger).
    drop_overlap: drop train and validation rows that the test split repeats word for word, rather than refuse.
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
        _Renderer(self)  # a template that does not parse fails here, before any row is read
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

        Raises ValueError for rows that cannot be read or rendered, and for train or validation rows whose instruction
        and output are those of a test row (unless `drop_overlap`).
        """
        test = self._examples("test")
        train, num_dropped = self._apart_from(test, "train", self._examples("train"))
        if self.splits["validation"] is None:
            train, validation = self._hold_out(train)
        else:
            validation, num_more = self._apart_from(test, "validation", self._examples("validation"))
            num_dropped += num_more
        return Splits(
            train=self._choose("train", train),
            validation=self._choose("validation", validation),
            test=self._choose("test", test),
            num_dropped=num_dropped,
        )

    def _examples(self, part: str) -> list[Example]:
        split = self.splits[part]
        assert split is not None
        source = Jsonl(path=self.path) if self.path is not None else self.source
        if source is None:
            raise ValueError(
                f"task {self.name} has no rows to read; set task.path=/folder with the files "
                + ", ".join(f"{name}.jsonl" for name in self.splits.values() if name)
            )
        renderer, num_rows, examples = _Renderer(self), 0, []
        for num_rows, row in enumerate(source.rows(split), start=1):
            example = renderer.example(row, default_id=f"{split}-{num_rows}")
            if example is not None:
                examples.append(example)
        if not examples:
            raise ValueError(
                f"task {self.name}: nothing is left of the {num_rows} rows of split {split!r} "
                f"after task.keep={self.keep!r}; change the condition, or set task.keep=null"
            )
        return examples

    def _apart_from(self, test: Sequence[Example], part: str, examples: list[Example]) -> tuple[list[Example], int]:
        """`examples` without those in `test`, and how many those were."""
        evaluated = {(example.instruction, example.output) for example in test}
        kept = [example for example in examples if (example.instruction, example.output) not in evaluated]
        num_dropped = len(examples) - len(kept)
        if num_dropped and not self.drop_overlap:
            raise ValueError(
                f"task {self.name}: {num_dropped} of {len(examples)} rows of {part} (split {self.splits[part]!r}) "
                f"are also in test (split {self.splits['test']!r}), word for word: "
                "scores and weights would see what is evaluated; set task.drop_overlap=true to drop them, "
                "or name other splits"
            )
        if not kept:
            raise ValueError(f"task {self.name}: every row of {part} is also in test; name other splits in task.splits")
        return kept, num_dropped

    def _hold_out(self, train: list[Example]) -> tuple[list[Example], list[Example]]:
        num = self.num_validation if self.num_validation is not None else max(1, len(train) // 10)
        if num >= len(train):
            raise ValueError(
                f"task {self.name}: holding {num} of {len(train)} train rows out for validation "
                f"leaves none to train on; use task.num_validation<{len(train)}"
            )
        chosen = set(self._shuffled("held out", len(train))[:num])
        return (
            [example for index, example in enumerate(train) if index not in chosen],
            [example for index, example in enumerate(train) if index in chosen],
        )

    def _choose(self, part: str, examples: list[Example]) -> tuple[Example, ...]:
        limit = getattr(self, f"num_{part}")
        if limit is None or limit >= len(examples):
            return tuple(examples)
        return tuple(examples[index] for index in sorted(self._shuffled(part, len(examples))[:limit]))

    def _shuffled(self, what: str, num: int) -> list[int]:
        return Random(f"{self.seed} {what}").sample(range(num), num)


class _Renderer:
    """The compiled templates and expressions of one task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        # Task files are shared: they may format rows, never reach into Python.
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)

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

    def example(self, row: Row, default_id: str) -> Example | None:
        """The example of a row, None where `keep` is false."""
        names = self._names(row)
        if "keep" in self.expressions and not self._value("keep", names, row):
            return None
        labels = self._labels(names, row)
        return Example(
            id=str(names["id"]) if self.task.columns.get("id") else default_id,
            instruction=self._text("instruction", self.instruction, names, row),
            options=tuple(self._text("output", self.output, {**names, "label": label}, row) for label in labels),
            labels=labels,
            answer=self._answer_index(names, labels, row),
        )

    def _names(self, row: Row) -> dict[str, Any]:
        """What templates see: the row's columns, then the task's own names."""
        names = dict(row.fields)
        for name, column in self.task.columns.items():
            if column is not None:
                names[name] = _column(row, column, f"task.columns.{name}")
        if self.task.columns.get("options"):
            names["options"], names["letters"] = _options(names["options"], row)
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
        return ValueError(
            f"{row.where}: task.{field} cannot be filled in: {reason}. Known names: {', '.join(sorted(names))}"
        )


def _column(row: Row, dotted: str, setting: str) -> Any:
    """The value under a dotted column name."""
    value: Any = row.fields
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or key not in value:
            have = ", ".join(row.fields) or "none"
            raise ValueError(f"{row.where} has no column {dotted!r} (columns: {have}); set {setting}=<one of them>")
        value = value[key]
    return value


def _options(value: Any, row: Row) -> tuple[list[str], list[str]]:
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
