"""Rows without options: a text, a prompt with its completion, a conversation, or token ids. Names of columns are TRL's.

A row is a text, or a mapping with the columns of one kind:

| kind                | columns                     | the loss counts                                             |
|---------------------|-----------------------------|-------------------------------------------------------------|
| `TextExample`       | `text`                      | every token                                                 |
| `CompletionExample` | `prompt`, `completion`      | the completion                                              |
| `ChatExample`       | `messages`                  | what the chat template marks as the assistant's, or else    |
|                     |                             | every token                                                 |
| `ChatExample`       | `prompt` and `completion`   | the messages of the completion                              |
|                     | as lists of messages        |                                                             |
| `TokenExample`      | `input_ids`, maybe `labels` | the tokens whose label is not -100; those that an           |
|                     |                             | `attention_mask` hides are left out of the row              |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from numbers import Integral
from typing import Any, Literal, get_args

from layerif.checks import shown
from layerif.data.render import Example, folded

IGNORED = -100  # the label of a token that does not count

RowKind = Literal["text", "prompt_completion", "chat", "tokens"]
Message = Mapping[str, Any]

COLUMNS: Mapping[RowKind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
    "tokens": ("input_ids",),
}


@dataclass(frozen=True)
class TextExample:
    """A text; two are the same if they differ in case and blanks alone."""

    id: str
    text: str

    @property
    def question(self) -> str:
        """A text that is equal for rows that are the same."""
        return folded(self.text)


@dataclass(frozen=True)
class CompletionExample:
    """A prompt and the text that should follow it; two are the same if their prompts are, or else their completions."""

    id: str
    prompt: str
    completion: str

    @property
    def question(self) -> str:
        """A text that is equal for rows that ask the same."""
        return folded(self.prompt) or folded(self.completion)

    @property
    def output(self) -> str:
        """The text that should follow the prompt."""
        return self.completion


@dataclass(frozen=True)
class ChatExample:
    """A conversation; two are the same if all before the last answer is, or without any the answer.

    Args:
        id: names the row.
        messages: each with a `role` and a `content`, as chat templates take them.
        num_prompt: the number of messages that are the prompt; None where the chat template tells what counts.
    """

    id: str
    messages: tuple[Message, ...]
    num_prompt: int | None = None

    @property
    def question(self) -> str:
        """A text that is equal for rows that ask the same."""
        answers = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        asked = self.messages[: self.num_prompt or (answers[-1] if answers else None)] or self.messages
        return folded(json.dumps([dict(message) for message in asked], sort_keys=True))


@dataclass(frozen=True)
class TokenExample:
    """Token ids with their labels; two are the same if their ids are."""

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def question(self) -> str:
        """A text that is equal for rows that are the same."""
        return " ".join(map(str, self.input_ids))


AnyExample = Example | TextExample | CompletionExample | ChatExample | TokenExample


def wrong_options(example: AnyExample) -> list[int]:
    """Lists the indices of the wrong options; a row without options has none."""
    if not isinstance(example, Example):
        return []
    return [index for index in range(len(example.options)) if index != example.answer]


def kind_of(row: Mapping[str, Any], where: str) -> RowKind:
    """Tells the kind of a row from its columns.

    Raises:
        ValueError: the row has the columns of no kind, or of several.
    """
    found = [kind for kind in get_args(RowKind) if all(row.get(column) is not None for column in COLUMNS[kind])]
    if len(found) == 1:
        return found[0]
    allowed = ", or ".join(" and ".join(columns) for columns in COLUMNS.values())
    have = ", ".join(map(str, row)) or "no column"
    problem = "has the columns of several kinds of rows" if found else "cannot be learned from"
    raise ValueError(f"{where} {problem}: it has {have}; a row needs {allowed}")


def example_of(row: str | Mapping[str, Any], *, id: str, where: str, kind: RowKind | None = None) -> AnyExample:
    """Turns a text or the columns of a row into an example.

    Args:
        row: a text, or columns as in the table above; further columns are not looked at.
        id: names the row.
        where: its place, for messages.
        kind: the kind of row; None finds it by the columns.

    Raises:
        ValueError: a column is missing, or holds something else than it should.
    """
    if isinstance(row, str):
        return TextExample(id, _text(row, "the text", where))
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}; a row must be a text, or a mapping of columns")
    kind = kind or kind_of(row, where)
    if missing := [column for column in COLUMNS[kind] if row.get(column) is None]:
        raise ValueError(
            f"{where} has no {missing[0]} (columns: {', '.join(map(str, row)) or 'none'}); add it, or leave the row out"
        )
    return _MAKERS[kind](row, id, where)


def _text_example(row: Mapping[str, Any], id: str, where: str) -> TextExample:
    return TextExample(id, _text(row["text"], "text", where))


def _completion_example(row: Mapping[str, Any], id: str, where: str) -> CompletionExample | ChatExample:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return CompletionExample(
            id, _text(prompt, "prompt", where, may_be_empty=True), _text(completion, "completion", where)
        )
    before = _messages(prompt, "prompt", where, may_be_empty=True)
    after = _messages(completion, "completion", where)
    return ChatExample(id, before + after, len(before))


def _chat_example(row: Mapping[str, Any], id: str, where: str) -> ChatExample:
    return ChatExample(id, _messages(row["messages"], "messages", where))


def _token_example(row: Mapping[str, Any], id: str, where: str) -> TokenExample:
    ids = _whole_numbers(row["input_ids"], "input_ids", where)
    if min(ids) < 0:
        raise ValueError(f"{where}: input_ids holds {min(ids)}; token ids are 0 or above")
    labels = ids if row.get("labels") is None else _whole_numbers(row["labels"], "labels", where)
    if len(labels) != len(ids):
        raise ValueError(f"{where}: labels has {len(labels)} entries for {len(ids)} input_ids; give one for each")
    for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (IGNORED, token):
            raise ValueError(
                f"{where}: label {position} is {label}, and the token there is {token}; a label is the token itself, "
                f"or {IGNORED} where the token does not count"
            )
    if row.get("attention_mask") is None:
        return TokenExample(id, ids, labels)
    mask = _whole_numbers(row["attention_mask"], "attention_mask", where)
    if len(mask) != len(ids):
        raise ValueError(f"{where}: attention_mask has {len(mask)} entries for {len(ids)} input_ids; give one for each")
    if wrong := {*mask} - {0, 1}:
        raise ValueError(f"{where}: attention_mask holds {min(wrong)}; allowed: 1 for a token, 0 for padding")
    if not any(mask):
        raise ValueError(f"{where}: attention_mask hides every token; leave the row out")
    return TokenExample(id, tuple(compress(ids, mask)), tuple(compress(labels, mask)))


_MAKERS = {
    "text": _text_example,
    "prompt_completion": _completion_example,
    "chat": _chat_example,
    "tokens": _token_example,
}


def _text(value: object, column: str, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be a text, got {shown(value)}")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{where}: {column} is empty; fill it in, or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {column} holds half a character ({error.reason}); mend it, or leave the row out"
        ) from error
    return value


def _messages(value: object, column: str, where: str, *, may_be_empty: bool = False) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not (value or may_be_empty):
        raise ValueError(f"{where}: {column} must be a list of messages, got {shown(value)}")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'{where}: {column} must hold messages like {{"role": "user", "content": "…"}}, got {shown(message)}'
            )
        if isinstance(message.get("content"), str):
            _text(message["content"], f"content of {column}", where, may_be_empty=True)
    return tuple(value)


def _whole_numbers(value: Any, column: str, where: str) -> tuple[int, ...]:
    listed = value.tolist() if hasattr(value, "tolist") else value  # tensors and arrays
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise ValueError(f"{where}: {column} must be a list of whole numbers, got {shown(value)}")
    if not all(isinstance(number, Integral) and not isinstance(number, bool) for number in listed):
        wrong = next(n for n in listed if not isinstance(n, Integral) or isinstance(n, bool))
        raise ValueError(f"{where}: {column} must hold whole numbers, got {shown(wrong)}")
    return tuple(map(int, listed))
