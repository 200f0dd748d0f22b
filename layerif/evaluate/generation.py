"""The metric `generation`: greedy answers, parsed, and their accuracy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from layerif.data.batches import collate, padding_id
from layerif.data.render import Example, Template, answer_parser
from layerif.evaluate.questions import prompts_of, require_some
from layerif.models.blocks import context_length, device_of
from layerif.models.contexts import evaluating
from layerif.stats import wilson


@dataclass(frozen=True)
class GeneratedAnswer:
    """text: what the model wrote; parsed: the answer found in it, None where there is none; answer: the right one."""

    id: str
    answer: str
    text: str
    parsed: str | None

    @property
    def correct(self) -> bool:
        return self.parsed == self.answer


@dataclass(frozen=True)
class GenerationAccuracy:
    """Answers of all questions, in the examples' order. What cannot be parsed is wrong, and counted."""

    answers: tuple[GeneratedAnswer, ...]

    @property
    def accuracy(self) -> float:
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def num_unparsable(self) -> int:
        return sum(answer.parsed is None for answer in self.answers)

    def metrics(self) -> dict[str, float]:
        low, high = wilson(sum(answer.correct for answer in self.answers), len(self.answers))
        return {
            "generation_accuracy": self.accuracy,
            "generation_accuracy_low": low,
            "generation_accuracy_high": high,
            "generation_unparsable": self.num_unparsable / len(self.answers),
        }


def parse_answer(text: str, parser: re.Pattern[str]) -> str | None:
    """The first group of the first match, stripped; None without a match."""
    found = parser.search(text)
    return found[1].strip() if found and found[1] is not None else None


def generation_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    template: Template,
    pattern: str,
    batch_size: int = 16,
    max_new_tokens: int = 128,
) -> GenerationAccuracy:
    """Greedy answers; the first match of `pattern`, its first group stripped, must equal the right label."""
    require_some(examples)
    parser = answer_parser(pattern)
    prompts = prompts_of(examples, tokenizer, template, max_new_tokens, context_length(model))
    # Written out in full: a model's own generation settings may sample or penalise.
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
        for start in tqdm(range(0, len(order), batch_size), desc="questions", disable=None, leave=False):
            indices = order[start : start + batch_size]
            batch = collate([prompts[index] for index in indices], padding_id(tokenizer), side="left")
            inputs = {key: batch[key].to(device_of(model)) for key in ("input_ids", "attention_mask")}
            outputs_BT = model.generate(**inputs, generation_config=settings)  # type: ignore[operator]
            written = tokenizer.batch_decode(outputs_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, written, strict=True):
                texts[index] = text
    return GenerationAccuracy(
        tuple(
            GeneratedAnswer(example.id, example.labels[example.answer], text, parse_answer(text, parser))
            for example, text in zip(examples, texts, strict=True)
        )
    )
