"""The metric `loss`: the negative log-likelihood of what should be said, in nats.

Of multiple choice that is the right option, and the pass is that of the metric `options`. Of other rows it is what
their kind says (`layerif.data.rows`): a completion, what the assistant says, a whole text. No end-of-text token counts.

- `loss`: the mean over rows of a row's mean over its counted tokens, so that a long row weighs as much as a short one;
- `loss_sum`: the mean over rows of a row's sum over its counted tokens;
- `margin`: of multiple choice, the mean over rows of ln p of the right option, minus that of the likeliest wrong one.

The margin is above 0 in just those rows that count as right in `accuracy`, equal likelihoods apart.
Each has Student's 95 % interval over rows (`_low`, `_high`), and its value of each row is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from layerif.data.batches import Encoded, batches, encode, padding_id
from layerif.data.render import Example
from layerif.data.rows import IGNORED
from layerif.evaluate import options
from layerif.evaluate.questions import Measured, QuestionSet, check_length, has_options, questions_of, require_some
from layerif.models.blocks import context_length, device_of
from layerif.models.contexts import evaluating
from layerif.models.loss import summed_loss
from layerif.progress import progress
from layerif.stats import t_interval

if TYPE_CHECKING:
    from layerif.evaluate.evaluation import Evaluation


def check(settings: Evaluation, questions: QuestionSet, max_positions: int | None) -> None:
    """Refuses rows that are too long, what `options` refuses of multiple choice, and a tokenizer without padding."""
    if has_options(questions.examples):
        options.check(settings, questions, max_positions)
    else:
        encoded_rows(questions, max_positions)
        padding_id(questions.tokenizer)


def run(settings: Evaluation, questions: QuestionSet, model: nn.Module) -> Measured:
    """Measures the losses of the rows, and of multiple choice the margins, too."""
    ids, margins = [example.id for example in questions.examples], []
    if has_options(questions.examples):
        answers = options.asked_once(settings, questions, model).answers
        rows = [RowLoss(-one.log_likelihoods[one.answer], one.num_tokens[one.answer]) for one in answers]
        margins = [one.margin for one in answers]
        asked = questions_of(questions.examples, questions.tokenizer, questions.task.template, context_length(model))
        counted = [one.options[answer.answer] for one, answer in zip(asked, answers, strict=True)]
    else:
        encodings = encoded_rows(questions, context_length(model))
        rows = row_losses(model, encodings, padding_id(questions.tokenizer), batch_size=settings.batch_size)
        for name, row in zip(ids, rows, strict=True):
            if not math.isfinite(row.total):
                raise ValueError(
                    f"row {name}: its loss is {row.total}; weights or activations are not finite; "
                    "use a wider dtype, or check the training"
                )
        counted = [[label for label in one.labels[1:] if label != IGNORED] for one in encodings]
    values = {"loss": [row.mean for row in rows], "loss_sum": [row.total for row in rows]}
    values |= {"margin": margins} if margins else {}
    return Measured(
        {name: value for metric, each in values.items() for name, value in _mean(metric, each).items()},
        losses={metric: dict(zip(ids, each, strict=True)) for metric, each in values.items()},
        context_free={"loss": math.fsum(frequency_losses(counted)) / len(counted)},
    )


@dataclass(frozen=True)
class RowLoss:
    """The loss of one row: the sum of −ln p over its counted tokens in nats, and their number."""

    total: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """The loss per counted token."""
        return self.total / self.num_tokens


def row_losses(model: nn.Module, encodings: Sequence[Encoded], pad_id: int, *, batch_size: int = 16) -> list[RowLoss]:
    """Computes the loss of every encoded row over the tokens that it counts, in the order of the rows.

    Args:
        model: a causal language model.
        encodings: the rows as token ids; the first token of a row is never predicted.
        pad_id: the token that fills short rows.
        batch_size: the number of rows that the model reads at once.

    Raises:
        ValueError: a row has no token to predict.
    """
    found: dict[int, RowLoss] = {}
    with evaluating(model), torch.inference_mode():
        for indices, batch in progress(list(batches(encodings, batch_size, pad_id)), "rows"):
            sums_B, counted_B = summed_loss(model, {name: each.to(device_of(model)) for name, each in batch.items()})
            found |= zip(indices, map(RowLoss, sums_B.tolist(), counted_B.tolist()), strict=True)
    return [found[index] for index in range(len(encodings))]


def encoded_rows(questions: QuestionSet, max_positions: int | None) -> Sequence[Encoded]:
    """Turns prompt and output of every row into token ids, of which the loss counts the output.

    Raises:
        ValueError: there is no row, or one is longer than the model reads.
    """
    require_some(questions.examples)
    template = questions.task.template
    # A question with one output counts that; any other row says itself what counts.
    loss_on = "output" if isinstance(questions.examples[0], Example) else None
    found = encode(
        questions.examples,
        questions.tokenizer,
        template=template,
        max_length=None,
        loss_on=loss_on,
        eos=False,
        at_most=max_positions,
    )
    for example, row in zip(questions.examples, found, strict=True):
        check_length(len(row), max_positions, example)
    return found


def frequency_losses(rows: Sequence[Sequence[int]]) -> list[float]:
    """Computes the mean loss per token of each row by a guess that reads no context: how frequent these tokens are.

    No other guess without context has a lower loss over all of them. A model above it makes no use of what it reads.

    Args:
        rows: the ids of the tokens that the loss counts.

    Returns:
        A loss in nats for each row.
    """
    times = Counter(token for row in rows for token in row)
    num_tokens = times.total()
    return [math.fsum(math.log(num_tokens / times[token]) for token in row) / len(row) for row in rows]


def _mean(metric: str, values: Sequence[float]) -> dict[str, float]:
    """The mean over rows, and its interval where the rows determine one."""
    low, high = t_interval(np.array(values))
    bounds = {} if math.isnan(low) else {f"{metric}_low": low, f"{metric}_high": high}
    return {metric: math.fsum(values) / len(values), **bounds}
