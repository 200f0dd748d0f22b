"""The settings of an evaluation, and the loop over its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

from annotated_types import Ge
from torch import nn

from layerif.checks import Count, Whole, check_choice, check_fields
from layerif.data.rows import AnyExample
from layerif.data.windows import Bos
from layerif.evaluate import generation, harness, loss, options, perplexity
from layerif.evaluate.questions import Answer, Measured, QuestionSet, has_options, require_some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerif.data.task import AnyTask


class Metric(Protocol):
    """The two functions of a metric's file."""

    def check(self, settings: Evaluation, questions: QuestionSet, max_positions: int | None) -> None:
        """Refuses, before any weights are loaded, settings and questions that it cannot measure."""
        ...

    def run(self, settings: Evaluation, questions: QuestionSet, model: nn.Module) -> Measured:
        """Measures the model on the questions."""
        ...


METRICS: Mapping[str, Metric] = {
    "options": options,
    "loss": loss,
    "generation": generation,
    "perplexity": perplexity,
    "lm_eval": harness,
}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The settings of an evaluation.

    Args:
        metrics: any of options (the likelihood of each option), loss (that of the right output), generation (a greedy
            answer, parsed), perplexity (on `text`) and lm_eval (the same questions in lm-eval, and `lm_eval_tasks`).
            None stands for options and loss where the rows have options, and for loss elsewhere.
        before: also measure the untouched model, before fine-tuning or pruning.
        batch_size: the number of questions or windows that a model reads at once; no result depends on it.
        max_new_tokens: the most tokens of a generated answer.
        text: the text of the perplexity: documentation (which every CPython carries), wikitext2, c4, or the path of a
            file; or a list of them.
        window: the number of tokens in a window of the perplexity.
        first_window: the windows before it, counted from 0, are left out.
        num_windows: the number of windows of each text; None takes all.
        bos: the windows that begin with BOS, which counts as one of the `window` tokens: each one where the tokenizer
            adds BOS to a text (tokenizer), the first of the text alone, as pruning papers measure (first), or none.
        lm_eval_tasks: further tasks by their names in lm-eval, for example arc_easy (lm-eval fetches them itself);
            zero_shot stands for the seven of the pruning literature, and adds their means.
    """

    metrics: Sequence[str] | None = None
    before: bool = False
    batch_size: Count = 16
    max_new_tokens: Count = 128
    text: str | Sequence[str] = "documentation"
    window: Annotated[int, Ge(2), "a window of one token has no token to predict"] = 256
    first_window: Whole = 0
    num_windows: Annotated[int, Ge(1), "null takes all windows"] | None = None
    bos: Bos = "tokenizer"
    lm_eval_tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        for metric in self.metrics or ():
            check_choice("evaluation.metrics", metric, METRICS)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the perplexity."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    def metrics_on(self, examples: Sequence[AnyExample]) -> tuple[str, ...]:
        """Returns the metrics that are measured on these examples, in the order of METRICS."""
        by_default = ("options", "loss") if has_options(examples) else ("loss",)
        wanted = by_default if self.metrics is None else self.metrics
        return tuple(metric for metric in METRICS if metric in wanted)

    def check(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[AnyExample],
        task: AnyTask,
        max_positions: int | None,
        *,
        score_task: AnyTask | None = None,
    ) -> None:
        """Refuses what `run` would refuse on any model of this tokenizer; no model is needed for that.

        Args:
            tokenizer: the tokenizer of the model.
            examples: the examples to evaluate on.
            task: the task that the examples are from.
            max_positions: the most tokens that the model reads (`config.max_position_embeddings`); None where it has
                no limit.
            score_task: the task whose rows the scores come from, where it is another one.

        Raises:
            ValueError: says which question, text or task cannot be evaluated, and what to do.
        """
        questions = QuestionSet(examples, task, tokenizer, score_task)
        require_some(examples)
        for metric in self.metrics_on(examples):
            METRICS[metric].check(self, questions, max_positions)

    def run(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[AnyExample], task: AnyTask
    ) -> EvaluationResult:
        """Measures every metric of `model` on `examples` of `task`."""
        questions = QuestionSet(examples, task, tokenizer)
        found = {metric: METRICS[metric].run(self, questions, model) for metric in self.metrics_on(examples)}
        return EvaluationResult(
            metrics={name: value for measured in found.values() for name, value in measured.metrics.items()},
            answers={metric: tuple(measured.answers) for metric, measured in found.items() if measured.answers},
            losses={name: rows for measured in found.values() for name, rows in measured.losses.items()},
            context_free={name: value for measured in found.values() for name, value in measured.context_free.items()},
        )


@dataclass(frozen=True)
class EvaluationResult:
    """The results of all metrics.

    Args:
        metrics: the values by name.
        answers: by metric (`options`, `generation`), an answer per question, in order.
        losses: see `Measured`.
        context_free: see `Measured`.
    """

    metrics: Mapping[str, float]
    answers: Mapping[str, tuple[Answer, ...]]
    losses: Mapping[str, Mapping[str, float]]
    context_free: Mapping[str, float]
