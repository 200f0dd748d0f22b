"""Questions as a model reads them: the tokens before and after the answer, and the check that they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from layerif.data.batches import Encoded, output_text, prompt_text
from layerif.data.render import Example, Template
from layerif.data.rows import AnyExample, CompletionExample
from layerif.data.tokens import num_shared, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerif.data.task import AnyTask


@dataclass(frozen=True)
class QuestionSet:
    """The examples that are asked, and everything that their wording depends on.

    Args:
        examples: one per question.
        task: the task that the examples are from.
        tokenizer: the tokenizer of the model.
        score_task: the task whose rows the scores come from, where it is another one.
        shared: by model, a measurement that several metrics take their values from.
    """

    examples: Sequence[AnyExample]
    task: AnyTask
    tokenizer: PreTrainedTokenizerBase
    score_task: AnyTask | None = None
    shared: dict[nn.Module, Any] = field(default_factory=dict, compare=False, repr=False)


class Answer(Protocol):
    """A model's answer to the question `id`."""

    @property
    def id(self) -> str:
        """The id of the question."""
        ...

    @property
    def correct(self) -> bool:
        """Tells if the answer is right."""
        ...


@dataclass(frozen=True)
class Measured:
    """The result of one metric.

    Args:
        metrics: its values by name.
        answers: an answer per question, where it asks questions.
        losses: by name of a value that is a mean over rows, that of each row in nats, by the row's id.
        context_free: by name of a value, the one that token frequencies alone would reach, see `frequency_losses`.
    """

    metrics: Mapping[str, float]
    answers: Sequence[Answer] = ()
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    context_free: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A question as token ids: the prompt that all options share, and the continuation that each option adds."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


def questions_of(
    examples: Sequence[AnyExample], tokenizer: PreTrainedTokenizerBase, template: Template, max_positions: int | None
) -> list[Question]:
    """Turns each example into token ids.

    Args:
        examples: the examples, at least one.
        tokenizer: the tokenizer of the model.
        template: the text around the instruction.
        max_positions: the most tokens that the model reads; None where it has no limit.

    Raises:
        ValueError: no example is given, a question has one option or is longer than `max_positions` tokens, two
            options become the same tokens, or a prompt is empty.
    """
    require_some(examples)
    return [_question(example, tokenizer, template, max_positions) for example in with_options(examples)]


def prompts_of(
    examples: Sequence[AnyExample],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_new_tokens: int,
    max_positions: int | None,
) -> list[Encoded]:
    """Turns the prompt of each example into token ids.

    Raises:
        ValueError: no example is given, or a prompt leaves no room for `max_new_tokens` more.
    """
    require_some(examples)
    at_most = None if max_positions is None else max(0, max_positions - max_new_tokens)
    texts = [prompt_text(_asked(example), template, tokenizer) for example in examples]
    prompts = token_ids(tokenizer, texts, at_most, special=template != "chat")
    for example, prompt in zip(examples, prompts, strict=True):
        check_length(len(prompt) + max_new_tokens, max_positions, example)
    return [Encoded(ids, len(ids)) for ids in prompts]


def has_options(examples: Sequence[AnyExample]) -> bool:
    """Tells multiple choice from rows that hold one right output alone."""
    return any(isinstance(example, Example) and len(example.options) > 1 for example in examples)


def with_options(examples: Sequence[AnyExample]) -> list[Example]:
    """Gives the examples as questions.

    Raises:
        ValueError: one has no options.
    """
    found = []
    for example in examples:
        if not isinstance(example, Example):
            raise ValueError(f"row {example.id} has no options to choose from; use evaluation.metrics=[loss]")
        found.append(example)
    return found


def require_some(examples: Sequence[AnyExample]) -> None:
    """Refuses an empty list of examples with a ValueError."""
    if not examples:
        raise ValueError("there is no question to evaluate; give at least one example")


def _asked(example: AnyExample) -> Example | CompletionExample:
    if not isinstance(example, Example | CompletionExample):
        raise ValueError(
            f"row {example.id} holds no prompt to answer; generation needs options, or prompt and completion; use "
            "evaluation.metrics=[loss]"
        )
    return example


def _question(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: Template, max_positions: int | None
) -> Question:
    if len(example.options) < 2:
        raise ValueError(
            f"question {example.id} has one option, {example.output!r:.80}, so any model would be right; give each row "
            "two or more in task.labels, or use evaluation.metrics=[loss], [generation] or [perplexity]"
        )
    prompt = prompt_text(example, template, tokenizer)
    texts = [prompt, *(prompt + output_text(option, template) for option in example.options)]
    alone, *whole = token_ids(tokenizer, texts, max_positions, special=template != "chat")
    check_length(max(map(len, whole)), max_positions, example)
    # A token may reach over the end of the prompt; it then belongs to the options, for all of them alike.
    num_common = min(num_shared(alone, ids) for ids in whole)
    options = tuple(ids[num_common:] for ids in whole)
    if num_common == 0:
        raise ValueError(f"question {example.id} has an empty prompt; give task.instruction some text")
    if not all(options) or len(set(options)) < len(options):
        raise ValueError(
            f"question {example.id}: its options {example.options} become the same tokens; word them differently, or "
            "leave such questions out with task.keep"
        )
    return Question(alone[:num_common], options)


def check_length(num_tokens: int, max_positions: int | None, example: AnyExample) -> None:
    """Refuses a question that is longer, with its answer, than the model reads."""
    if max_positions is not None and num_tokens > max_positions:
        many = num_tokens if num_tokens > max_positions + 1 else f"more than {max_positions}"  # a long text is cut
        raise ValueError(
            f"question {example.id} takes {many} tokens with its answer, the model reads at most "
            f"{max_positions}; leave such questions out with task.keep, shorten the prompt, "
            "or lower evaluation.max_new_tokens"
        )
