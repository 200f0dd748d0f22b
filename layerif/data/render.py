"""Rows become examples: the task's templates are filled in, and the right option is found."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import StrictUndefined, TemplateError
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from layerif.data.source import Row, column_of, options_of

if TYPE_CHECKING:
    from layerif.data.task import Task


def answer_parser(pattern: str) -> re.Pattern[str]:
    """Compiles the `pattern` of a task.

    Raises:
        ValueError: the pattern is not a regular expression, or has no group.
    """
    try:
        parser = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"task.pattern={pattern!r} is not a regular expression: {error}; mend it") from error
    if parser.groups < 1:
        raise ValueError(f"task.pattern={pattern!r} has no group; put the answer in parentheses, as in 'is ([A-Z])'")
    return parser


Template = Literal["plain", "alpaca", "chat"]


@dataclass(frozen=True)
class Example:
    """One question with its options.

    Args:
        id: names the example within its split.
        instruction: the text that asks the question.
        options: the full outputs, for example "Answer: The answer is B."
        labels: the short names of the options, for example "B".
        answer: the index of the right option.
        question: a text that is equal for rows that ask the same; by default the folded instruction.
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
        """The output of the right option."""
        return self.options[self.answer]


@dataclass(frozen=True)
class RenderedRow:
    """An example, and the place of its row, for messages."""

    example: Example
    where: str


class Renderer:
    """The compiled templates and expressions of one task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        # People share task files. A template may format rows, but must not reach into Python.
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null
        )

        def compiled(field: str, compile: Any, **options: Any) -> Any:
            try:
                return compile(getattr(task, field), **options)
            except Exception as error:  # a template becomes Python code, so its compiler may refuse it, too
                given = f"{getattr(task, field)!r:.200}"
                raise ValueError(f"task.{field}={given} is not Jinja: {_said(error)}") from error

        self.instruction = compiled("instruction", environment.from_string)
        self.output = compiled("output", environment.from_string)
        self.expressions = {
            field: compiled(field, environment.compile_expression, undefined_to_none=False)
            for field in ("labels", "answer", "keep")
            if getattr(task, field) is not None
        }

    def read(self, row: Row, default_id: str) -> RenderedRow | None:
        """Renders the example of a row; returns None where `keep` is false."""
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
        return RenderedRow(example, row.where)

    def _question(self, instruction: str, names: Mapping[str, Any], row: Row) -> str:
        """Returns the instruction, folded, with its options sorted."""
        if self.task.columns.get("options"):
            options, letters = (sorted(map(folded, names[name])) for name in ("options", "letters"))
            names = {**names, "options": options, "letters": letters}
            instruction = self._text("instruction", self.instruction, names, row)
        return folded(instruction)

    def _names(self, row: Row) -> dict[str, Any]:
        """Returns the names that templates see: the row's columns, then the task's own names."""
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
            raise ValueError(f"{row.where}: task.labels={self.task.labels!r} gave {labels!r}; give a list of texts")
        with self._naming("labels", names, row):
            labels = tuple(str(_not_null(label)) for label in labels)
        if len(set(labels)) < len(labels):
            raise ValueError(f"{row.where}: labels {list(labels)} repeat; each option needs its own label")
        return labels

    def _answer_index(self, names: Mapping[str, Any], labels: tuple[str, ...], row: Row) -> int:
        answer = self._value("answer", names, row)
        with self._naming("answer", names, row):
            repr(answer)  # a number of too many digits has none
        if isinstance(answer, int) and not isinstance(answer, bool):
            found = {answer} if 0 <= answer < len(labels) else set()
            if str(answer) in labels and found != {labels.index(str(answer))}:
                raise ValueError(
                    f"{row.where}: the answer {answer} is a whole number and so an index from 0, and it is the label "
                    f"'{answer}' of {list(labels)}, which is another option; say which is meant: the label, by "
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
            f"{row.where}: the answer {answer!r} {problem} the labels {list(labels)}; use one label, "
            f"the text of one option, or an index from 0 to {len(labels) - 1}; if this split hides its labels, "
            "name another one in task.splits"
        )

    def _value(self, field: str, names: Mapping[str, Any], row: Row) -> Any:
        with self._naming(field, names, row):
            value = self.expressions[field](names)
        if isinstance(value, Undefined):
            raise self._error(field, f"{getattr(self.task, field)!r} uses an unknown name", names, row)
        return value

    def _text(self, field: str, template: Any, names: Mapping[str, Any], row: Row) -> str:
        with self._naming(field, names, row):
            text = template.render(names)
            text.encode()  # half a character cannot be tokenised
        return text

    @contextmanager
    def _naming(self, field: str, names: Mapping[str, Any], row: Row) -> Iterator[None]:
        """Names the row where a template fails; it is a small program, so it may fail in any way that Python can."""
        try:
            yield
        except Exception as error:
            raise self._error(field, _said(error), names, row) from error

    def _error(self, field: str, reason: str, names: Mapping[str, Any], row: Row) -> ValueError:
        if not reason:
            empty = ", ".join(sorted(name for name, value in names.items() if _is_null(value)))
            reason = f"{empty or 'a value'} is null in this row; fill it in, or leave such rows out with task.keep"
        return ValueError(
            f"{row.where}: task.{field} cannot be filled in: {reason}. Known names: {', '.join(sorted(names))}"
        )


class _Null(TemplateError):
    """Says that a template would write `None` or `nan`."""


def _not_null(value: Any) -> Any:
    if _is_null(value):
        raise _Null()
    return value


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _said(error: Exception) -> str:
    """The message of an error in a template; empty for `_Null`."""
    if isinstance(error, TemplateError):
        return error.message or ""
    return f"{type(error).__name__}: {error}"


def folded(text: str) -> str:
    """Returns a text in lower case with single blanks, so that texts compare without case and blanks."""
    return " ".join(text.casefold().split())
