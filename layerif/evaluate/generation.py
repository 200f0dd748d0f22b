"""The metric `generation`: greedy answers, parsed, and their accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from layerif.data.batches import collate, padding_id
from layerif.data.render import Example, Template, answer_parser
from layerif.data.rows import AnyExample, CompletionExample
from layerif.evaluate.questions import Measured, QuestionSet, prompts_of
from layerif.models.blocks import context_length, device_of
from layerif.models.contexts import evaluating
from layerif.progress import progress
from layerif.stats import wilson

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerif.evaluate.evaluation import Evaluation


def check(settings: Evaluation, questions: QuestionSet, max_positions: int | None) -> None:
    """Refuses prompts that leave no room for an answer, and a tokenizer without padding."""
    template, max_new_tokens = questions.task.template, settings.max_new_tokens
    if questions.task.pattern is None:
        raise ValueError(
            "task.pattern=null finds no answer in a generated text; give a regular expression whose first group is the "
            "answer, or use evaluation.metrics=[loss]"
        )
    prompts_of(questions.examples, questions.tokenizer, template, max_new_tokens, max_positions)
    padding_id(questions.tokenizer)
    parser = answer_parser(questions.task.pattern)
    for example in questions.examples:
        right_answer(example, parser)


def run(settings: Evaluation, questions: QuestionSet, model: nn.Module) -> Measured:
    """Measures the accuracy of greedy answers."""
    found = generation_accuracy(
        model,
        questions.tokenizer,
        questions.examples,
        template=questions.task.template,
        pattern=questions.task.pattern or "",  # `check` refused null
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )
    return Measured(found.metrics(), found.answers)


@dataclass(frozen=True)
class GeneratedAnswer:
    """The generated answer to one question.

    Args:
        id: the id of the question.
        answer: the label of the right option.
        text: the text that the model wrote.
        parsed: the answer that the task's pattern finds in it; None where it finds none.
    """

    id: str
    answer: str
    text: str
    parsed: str | None

    @property
    def correct(self) -> bool:
        return self.parsed == self.answer


@dataclass(frozen=True)
class GenerationAccuracy:
    """The answers to all questions, in the order of the examples. An answer that cannot be parsed is wrong."""

    answers: tuple[GeneratedAnswer, ...]

    @property
    def accuracy(self) -> float:
        """The fraction of right answers."""
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def num_unparsable(self) -> int:
        """The number of answers that cannot be parsed."""
        return sum(answer.parsed is None for answer in self.answers)

    def metrics(self) -> dict[str, float]:
        """Returns the accuracy with its Wilson interval, and the share of answers that cannot be parsed."""
        low, high = wilson(sum(answer.correct for answer in self.answers), len(self.answers))
        return {
            "generation_accuracy": self.accuracy,
            "generation_accuracy_low": low,
            "generation_accuracy_high": high,
            "generation_unparsable": self.num_unparsable / len(self.answers),
        }


def right_answer(example: AnyExample, parser: re.Pattern[str]) -> str:
    """Gives the label of the right option, or the answer that the pattern finds in a completion.

    Raises:
        ValueError: the pattern finds none.
    """
    if isinstance(example, Example):
        return example.labels[example.answer]
    found = parse_answer(example.completion, parser) if isinstance(example, CompletionExample) else None
    if found is None:
        raise ValueError(
            f"row {example.id}: task.pattern={parser.pattern!r} finds no answer in what should be said; change the "
            "pattern, or use evaluation.metrics=[loss]"
        )
    return found


def parse_answer(text: str, parser: re.Pattern[str]) -> str | None:
    """Returns the first group of the first match without outer blanks, or None without a match."""
    found = parser.search(text)
    return found[1].strip() if found and found[1] is not None else None


def generation_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[AnyExample],
    *,
    template: Template,
    pattern: str,
    batch_size: int = 16,
    max_new_tokens: int = 128,
) -> GenerationAccuracy:
    """Generates a greedy answer to every question and compares it with the label of the right option.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        examples: the questions.
        template: the text around each instruction.
        pattern: the regular expression whose first group is the answer; its first match counts.
        batch_size: the number of questions that the model reads at once.
        max_new_tokens: the most tokens of an answer.

    Raises:
        ValueError: a prompt leaves no room for the answer, or the pattern cannot be used.
    """
    from transformers import GenerationConfig

    parser = answer_parser(pattern)
    prompts = prompts_of(examples, tokenizer, template, max_new_tokens, context_length(model))
    # Every setting is given, because a model's own generation settings may sample or penalise.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    texts = [""] * len(prompts)
    with evaluating(model), torch.inference_mode():
        for start in progress(range(0, len(order), batch_size), "questions"):
            indices = order[start : start + batch_size]
            batch = collate([prompts[index] for index in indices], padding_id(tokenizer), side="left")
            inputs = {key: batch[key].to(device_of(model)) for key in ("input_ids", "attention_mask")}
            outputs_BT = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
            written = tokenizer.batch_decode(outputs_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, written, strict=True):
                texts[index] = text
    return GenerationAccuracy(
        tuple(
            GeneratedAnswer(example.id, right_answer(example, parser), text, parse_answer(text, parser))
            for example, text in zip(examples, texts, strict=True)
        )
    )
