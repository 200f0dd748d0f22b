"""Evaluation of a model on a task: option likelihood, generation, perplexity, and lm-eval on the same questions.

Every metric is a fraction (0–1), save perplexity. Letters in shape suffixes: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from layerif.checks import did_you_mean
from layerif.data.batches import Encoded, collate, padding_id, token_ids
from layerif.data.render import Example, Template, answer_parser
from layerif.data.task import Task
from layerif.data.text import text
from layerif.evaluate_new.generation import GeneratedAnswer, GenerationAccuracy, parse_answer
from layerif.evaluate_new.options import OptionAccuracy, OptionAnswer
from layerif.evaluate_new.questions import Question, prompts_of, questions_of, require_some
from layerif.lm_eval import check_tasks, lm_eval
from layerif.models.blocks import context_length
from layerif.models.contexts import evaluating

Metric = Literal["options", "generation", "perplexity", "lm_eval"]

_LARGEST_LOSS = math.log(sys.float_info.max)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, and how.

    metrics: any of options (likelihood of each option), generation (greedy answer, parsed), perplexity (on `text`) and
        lm_eval (the same questions in lm-eval, and `lm_eval_tasks`).
    before: measure the untouched model as well, before fine-tuning or pruning.
    batch_size: questions (or windows) at a time; no result depends on it.
    max_new_tokens: of a generated answer.
    text: of the perplexity: documentation (which every CPython carries), wikitext2, c4, or the path of a file.
    window: tokens of a perplexity window; num_windows: only the first so many (None: all).
    lm_eval_tasks: further tasks by lm-eval's names, for example arc_easy (lm-eval fetches them itself); zero_shot
        stands for the seven of the pruning literature, whose means are reported, too.
    """

    metrics: Sequence[str] = ("options",)
    before: bool = False
    batch_size: int = 16
    max_new_tokens: int = 128
    text: str = "documentation"
    window: int = 256
    num_windows: int | None = None
    lm_eval_tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if unknown := [metric for metric in self.metrics if metric not in get_args(Metric)]:
            hint = did_you_mean(unknown[0], get_args(Metric))
            raise ValueError(f"evaluation.metrics holds {unknown[0]!r}{hint}; use any of {', '.join(get_args(Metric))}")
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("window", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name}={getattr(self, name)}; use {least} or more")
        if self.num_windows is not None and self.num_windows < 1:
            raise ValueError(f"evaluation.num_windows={self.num_windows}; use 1 or more, or null for all")

    def check(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        task: Task,
        max_positions: int | None,
        *,
        score_task: Task | None = None,
    ) -> None:
        """Raise ValueError for whatever `run` would refuse on any model of this tokenizer, and for tasks of lm-eval on
        rows that are learned or scored from, see `layerif.lm_eval.check_tasks`. Takes no model.

        max_positions: the most tokens the model reads (`config.max_position_embeddings`), None where it has no limit.
        score_task: whose rows are scored, where they are not the task's own.
        """
        require_some(examples)
        if "options" in self.metrics or "lm_eval" in self.metrics:
            questions_of(examples, tokenizer, task.template, max_positions)
        if "generation" in self.metrics:
            prompts_of(examples, tokenizer, task.template, self.max_new_tokens, max_positions)
        if "options" in self.metrics or "generation" in self.metrics:
            padding_id(tokenizer)
        if "perplexity" in self.metrics:
            num_tokens = len(_text_ids(self.text, tokenizer))
            _check_window(self.window, num_tokens, max_positions)
            if self.num_windows is not None and self.num_windows > num_tokens // self.window:
                raise ValueError(
                    f"evaluation.num_windows={self.num_windows} are asked for, the text {self.text!r} holds "
                    f"{num_tokens // self.window} of {self.window} tokens; use at most these, or null for all"
                )
        if "lm_eval" in self.metrics:
            check_tasks(self.lm_eval_tasks, [task, score_task] if score_task else [task])

    def run(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], task: Task
    ) -> EvaluationResult:
        """Every asked-for metric of `model` on `examples` of `task`."""
        metrics: dict[str, float] = {}
        answers: dict[str, tuple[OptionAnswer | GeneratedAnswer, ...]] = {}
        if "options" in self.metrics:
            chosen = option_accuracy(model, tokenizer, examples, template=task.template, batch_size=self.batch_size)
            answers["options"] = chosen.answers
            metrics |= chosen.metrics()
        if "generation" in self.metrics:
            generated = generation_accuracy(
                model,
                tokenizer,
                examples,
                template=task.template,
                pattern=task.pattern,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
            )
            answers["generation"] = generated.answers
            metrics |= generated.metrics()
        if "perplexity" in self.metrics:
            ids = _text_ids(self.text, tokenizer)
            ids = ids if self.num_windows is None else ids[: self.num_windows * self.window]
            of_text = "" if self.text == "documentation" else f"{Path(self.text).stem}/"
            metrics[f"{of_text}perplexity_{self.window}"] = perplexity(
                model, ids, window=self.window, batch_size=self.batch_size
            )
        if "lm_eval" in self.metrics:
            metrics |= lm_eval(
                model,
                tokenizer,
                examples,
                name=task.name,
                template=task.template,
                tasks=self.lm_eval_tasks,
                batch_size=self.batch_size,
            )
        return EvaluationResult(metrics=metrics, answers=answers)


@dataclass(frozen=True)
class EvaluationResult:
    """metrics: name -> value; answers: `options` and `generation` -> one record per question, in their order."""

    metrics: Mapping[str, float]
    answers: Mapping[str, tuple[OptionAnswer | GeneratedAnswer, ...]]


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
            inputs = {key: batch[key].to(_device(model)) for key in ("input_ids", "attention_mask")}
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


def perplexity(model: nn.Module, ids: Sequence[int], *, window: int, batch_size: int = 1) -> float:
    """exp of the mean next-token loss (nats) over non-overlapping windows of exactly `window` tokens.

    The first token of a window is not predicted; what is left after the last full window is not used. Perplexities of
    different windows are different quantities. Raises ValueError for a window longer than the text or the model's
    context, and for a loss that is not finite.
    """
    _check_window(window, len(ids), context_length(model))
    num_windows = len(ids) // window
    windows = torch.tensor(ids[: num_windows * window]).view(num_windows, window)
    total = 0.0
    with evaluating(model), torch.inference_mode():
        for input_BT in tqdm(windows.split(batch_size), desc="windows", disable=None, leave=False):
            input_BT = input_BT.to(_device(model))
            logits_BTV = model(input_ids=input_BT, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits_BTV.flatten(0, 1), input_BT[:, 1:].flatten(), reduction="sum")
            total += float(losses)
    mean = total / (num_windows * (window - 1))
    if not mean < _LARGEST_LOSS:
        raise ValueError(
            f"the text has no finite perplexity: its mean token loss is {mean}; weights or activations are not finite "
            "or far too large; look at the weights, or use a wider dtype (model.dtype=float32)"
        )
    return math.exp(mean)


def _text_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return token_ids(tokenizer, [text(name, "test")])[0]


def _log_likelihoods(model: nn.Module, questions: Sequence[Question], pad_id: int) -> list[tuple[float, ...]]:
    """ln p(option | prompt) per question and option."""
    device = _device(model)
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


def _check_window(window: int, num_tokens: int, max_positions: int | None) -> None:
    most = num_tokens if max_positions is None else min(num_tokens, max_positions)
    if window < 2:
        raise ValueError(f"evaluation.window={window} holds no token to predict; use 2 or more")
    if window > most:
        limit = f"the text has {num_tokens} tokens" if most == num_tokens else f"the model reads at most {most} tokens"
        raise ValueError(f"evaluation.window={window} is too long: {limit}; use evaluation.window<={most}")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
