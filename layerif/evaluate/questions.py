"""Questions as they are evaluated: what a model reads before and after the answer, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from layerif.data.batches import Encoded, num_shared, output_text, prompt_text, token_ids
from layerif.data.render import Example, Template


@dataclass(frozen=True)
class Question:
    """prompt: the ids all options share; options: what follows, per option."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]


def questions_of(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: Template, max_positions: int | None
) -> list[Question]:
    """Raises ValueError for a question longer than `max_positions` tokens, and for options of the same tokens."""
    questions = [_question(example, tokenizer, template) for example in examples]
    for example, question in zip(examples, questions, strict=True):
        _check_length(len(question.prompt) + max(map(len, question.options)), max_positions, example)
    return questions


def prompts_of(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_new_tokens: int,
    max_positions: int | None,
) -> list[Encoded]:
    """Prompts alone. Raises ValueError for one that leaves no room for `max_new_tokens` more."""
    prompts = token_ids(tokenizer, [prompt_text(example, template) for example in examples])
    for example, prompt in zip(examples, prompts, strict=True):
        _check_length(len(prompt) + max_new_tokens, max_positions, example)
    return [Encoded(ids, len(ids)) for ids in prompts]


def require_some(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("there is no question to evaluate; give at least one example")


def _question(example: Example, tokenizer: PreTrainedTokenizerBase, template: Template) -> Question:
    prompt = prompt_text(example, template)
    alone, *whole = token_ids(tokenizer, [prompt, *(prompt + output_text(o, template) for o in example.options)])
    # A token may reach over the end of the prompt; it then belongs to the options, for all of them alike.
    num_common = min(num_shared(alone, ids) for ids in whole)
    options = tuple(ids[num_common:] for ids in whole)
    if num_common == 0:
        raise ValueError(f"question {example.id} has an empty prompt; give task.instruction some text")
    if not all(options) or len(set(options)) < len(options):
        raise ValueError(f"question {example.id}: its options become the same tokens; got {example.options}")
    return Question(alone[:num_common], options)


def _check_length(num_tokens: int, max_positions: int | None, example: Example) -> None:
    if max_positions is not None and num_tokens > max_positions:
        raise ValueError(
            f"question {example.id} takes {num_tokens} tokens with its answer, the model reads at most "
            f"{max_positions}; leave such questions out with task.keep, shorten the prompt, "
            "or lower evaluation.max_new_tokens"
        )
