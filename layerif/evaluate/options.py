"""The metric `options`: the likelihood of every option, and the accuracy it adds up to.

Letters in shape suffixes: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from layerif.data.batches import Encoded, collate, padding_id
from layerif.data.render import Example, Template
from layerif.evaluate.questions import Question, questions_of, require_some
from layerif.models.blocks import context_length, device_of
from layerif.models.contexts import evaluating
from layerif.stats import wilson


@dataclass(frozen=True)
class OptionAnswer:
    """log_likelihoods: ln p(option | prompt) of each option (nats); num_tokens: of each; answer: the right one."""

    id: str
    answer: int
    log_likelihoods: tuple[float, ...]
    num_tokens: tuple[int, ...]

    @property
    def choice(self) -> int:
        """The likeliest option; the first of equals."""
        return max(range(len(self.log_likelihoods)), key=lambda option: (self.log_likelihoods[option], -option))

    @property
    def choice_per_token(self) -> int:
        """The option of the highest mean log-likelihood per token; the first of equals."""
        means = [total / num for total, num in zip(self.log_likelihoods, self.num_tokens, strict=True)]
        return max(range(len(means)), key=lambda option: (means[option], -option))

    @property
    def correct(self) -> bool:
        return self.choice == self.answer


@dataclass(frozen=True)
class OptionAccuracy:
    """Answers of all questions, in the examples' order."""

    answers: tuple[OptionAnswer, ...]

    @property
    def accuracy(self) -> float:
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def accuracy_per_token(self) -> float:
        return sum(answer.choice_per_token == answer.answer for answer in self.answers) / len(self.answers)

    def metrics(self) -> dict[str, float]:
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
    """Log-likelihood of every option's full output given the prompt.

    Each prompt runs once; its options continue from its keys and values. Raises ValueError for a question longer than
    the model's context, for options that become the same tokens, and for a log-likelihood that is not finite.
    """
    require_some(examples)
    questions = questions_of(examples, tokenizer, template, context_length(model))
    order = sorted(range(len(questions)), key=lambda index: (-len(questions[index].prompt), index))
    answers: list[OptionAnswer | None] = [None] * len(questions)
    with evaluating(model), torch.inference_mode():
        for start in tqdm(range(0, len(order), batch_size), desc="questions", disable=None, leave=False):
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
    """ln p(option | prompt) per question and option."""
    device = device_of(model)
    prompts = collate([Encoded(question.prompt, len(question.prompt)) for question in questions], pad_id, side="left")
    owners = [row for row, question in enumerate(questions) for _ in question.options]
    options = collate([Encoded(ids, 0) for question in questions for ids in question.options], pad_id)
    prompt_mask, option_mask = prompts["attention_mask"].to(device), options["attention_mask"].to(device)
    targets_BT = options["input_ids"].to(device)
    # Positions are given: from left-padded ids alone some models would count the padding.
    outputs = model(
        input_ids=prompts["input_ids"].to(device),
        attention_mask=prompt_mask,
        position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
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
