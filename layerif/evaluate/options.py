"""The metric `options`: the likelihood of every option, and the accuracy that follows.

Letters in shape suffixes: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from layerif.data.batches import Encoded, collate, padding_id
from layerif.data.render import Example, Template
from layerif.evaluate.questions import Measured, Question, QuestionSet, questions_of, with_options
from layerif.models.blocks import context_length, device_of
from layerif.models.contexts import evaluating
from layerif.models.loss import positions_of
from layerif.progress import progress
from layerif.stats import wilson

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerif.evaluate.evaluation import Evaluation


def check(settings: Evaluation, questions: QuestionSet, max_positions: int | None) -> None:
    """Refuses questions that are too long or whose options become the same tokens, and a tokenizer without padding."""
    questions_of(questions.examples, questions.tokenizer, questions.task.template, max_positions)
    padding_id(questions.tokenizer)


def run(settings: Evaluation, questions: QuestionSet, model: nn.Module) -> Measured:
    """Measures the accuracy of the likeliest option, in all and per token."""
    found = asked_once(settings, questions, model)
    return Measured(found.metrics(), found.answers)


def asked_once(settings: Evaluation, questions: QuestionSet, model: nn.Module) -> OptionAccuracy:
    """Measures the likelihoods of all options at the first call for a set of questions and a model."""
    if model not in questions.shared:
        questions.shared[model] = option_accuracy(
            model,
            questions.tokenizer,
            with_options(questions.examples),
            template=questions.task.template,
            batch_size=settings.batch_size,
        )
    return questions.shared[model]


@dataclass(frozen=True)
class OptionAnswer:
    """The likelihoods of one question's options.

    Args:
        id: the id of the question.
        answer: the index of the right option.
        log_likelihoods: ln p(option | prompt) of each option, in nats.
        num_tokens: the number of tokens of each option.
    """

    id: str
    answer: int
    log_likelihoods: tuple[float, ...]
    num_tokens: tuple[int, ...]

    @property
    def choice(self) -> int:
        """The index of the likeliest option; of equal ones the first."""
        return max(range(len(self.log_likelihoods)), key=lambda option: (self.log_likelihoods[option], -option))

    @property
    def choice_per_token(self) -> int:
        """The index of the option with the highest mean log-likelihood per token; of equal ones the first."""
        means = [total / num for total, num in zip(self.log_likelihoods, self.num_tokens, strict=True)]
        return max(range(len(means)), key=lambda option: (means[option], -option))

    @property
    def correct(self) -> bool:
        return self.choice == self.answer

    @property
    def margin(self) -> float:
        """ln p of the right option minus that of the likeliest wrong one; above 0 where the answer is right."""
        wrong = (value for option, value in enumerate(self.log_likelihoods) if option != self.answer)
        return self.log_likelihoods[self.answer] - max(wrong)


@dataclass(frozen=True)
class OptionAccuracy:
    """The answers to all questions, in the order of the examples."""

    answers: tuple[OptionAnswer, ...]

    @property
    def accuracy(self) -> float:
        """The fraction of questions whose right option has the highest likelihood."""
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def accuracy_per_token(self) -> float:
        """The fraction of questions whose right option has the highest likelihood per token."""
        return sum(answer.choice_per_token == answer.answer for answer in self.answers) / len(self.answers)

    def metrics(self) -> dict[str, float]:
        """Returns the accuracy with its Wilson interval, and the accuracy per token."""
        low, high = wilson(sum(answer.correct for answer in self.answers), len(self.answers))
        return {
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_per_token": self.accuracy_per_token,
        }


def option_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    template: Template,
    batch_size: int = 16,
) -> OptionAccuracy:
    """Computes the log-likelihood of every option's full output given the prompt.

    Each prompt runs once; its options continue from its keys and values.

    Raises:
        ValueError: a question is longer than the model's context, two options become the same tokens, or a
            log-likelihood is not finite.
    """
    questions = questions_of(examples, tokenizer, template, context_length(model))
    order = sorted(range(len(questions)), key=lambda index: (-len(questions[index].prompt), index))
    answers: list[OptionAnswer | None] = [None] * len(questions)
    with evaluating(model), torch.inference_mode():
        for start in progress(range(0, len(order), batch_size), "questions"):
            indices = order[start : start + batch_size]
            batch = [questions[index] for index in indices]
            for index, values in zip(indices, _log_likelihoods(model, batch, padding_id(tokenizer)), strict=True):
                example = examples[index]
                if not all(map(math.isfinite, values)):
                    raise ValueError(
                        f"question {example.id}: the log-likelihoods of its options are {values}; "
                        "weights or activations are not finite; use a wider dtype, or check the training"
                    )
                num_tokens = tuple(map(len, questions[index].options))
                answers[index] = OptionAnswer(example.id, example.answer, values, num_tokens)
    return OptionAccuracy(tuple(answer for answer in answers if answer is not None))


def _log_likelihoods(model: nn.Module, questions: Sequence[Question], pad_id: int) -> list[tuple[float, ...]]:
    """Computes ln p(option | prompt) per question and option."""
    device = device_of(model)
    prompts = collate([Encoded(question.prompt, len(question.prompt)) for question in questions], pad_id, side="left")
    owners = [row for row, question in enumerate(questions) for _ in question.options]
    options = collate([Encoded(ids, 0) for question in questions for ids in question.options], pad_id)
    prompt_mask, option_mask = prompts["attention_mask"].to(device), options["attention_mask"].to(device)
    targets_BT = options["input_ids"].to(device)
    outputs = model(
        input_ids=prompts["input_ids"].to(device),
        attention_mask=prompt_mask,
        position_ids=positions_of(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    rows = torch.tensor(owners, device=device)
    logits_BTV = outputs.logits[rows, -1:]
    if targets_BT.shape[1] > 1:
        cache = outputs.past_key_values
        cache.batch_select_indices(rows)
        lengths = prompt_mask.sum(1)[rows]
        steps = torch.arange(targets_BT.shape[1] - 1, device=device)
        continued = model(
            input_ids=targets_BT[:, :-1],
            attention_mask=torch.cat([prompt_mask[rows], option_mask[:, :-1]], dim=1),
            position_ids=lengths[:, None] + steps,
            past_key_values=cache,
            use_cache=True,
        )
        logits_BTV = torch.cat([logits_BTV, continued.logits], dim=1)
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
    totals = -(losses.view_as(targets_BT).double() * option_mask).sum(1)
    values: list[list[float]] = [[] for _ in questions]
    for owner, value in zip(owners, totals.tolist(), strict=True):
        values[owner].append(value)
    return [tuple(row) for row in values]
