"""Evaluation of a model on a task: which metrics, and how. One metric is one file.

Every metric is a fraction (0–1), except perplexity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from layerif.checks import did_you_mean
from layerif.data.batches import padding_id
from layerif.data.render import Example
from layerif.data.task import Task
from layerif.evaluate.generation import GeneratedAnswer, generation_accuracy
from layerif.evaluate.harness import check_tasks, lm_eval
from layerif.evaluate.options import OptionAnswer, option_accuracy
from layerif.evaluate.perplexity import check_window, perplexity, text_ids
from layerif.evaluate.questions import prompts_of, questions_of, require_some

Metric = Literal["options", "generation", "perplexity", "lm_eval"]


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
        rows that are learned or scored from, see `layerif.evaluate.harness.check_tasks`. Takes no model.

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
            num_tokens = len(text_ids(self.text, tokenizer))
            check_window(self.window, num_tokens, max_positions)
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
            ids = text_ids(self.text, tokenizer)
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
