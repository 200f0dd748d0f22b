"""`selection=ifd`: rows by their instruction-following difficulty (Li et al., 2308.12032)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layerif.attribution.selection import Pool, RankedSelection, Values
from layerif.attribution.selection.loss import mean_of_counted
from layerif.data.batches import Encoded, Encodings, encode
from layerif.data.render import Example
from layerif.data.rows import AnyExample, ChatExample, CompletionExample
from layerif.probe.measurements import Load
from layerif.probe.token_losses import stored_token_losses


@dataclass(frozen=True, kw_only=True)
class Ifd(RankedSelection):
    """Takes the rows whose question helps least with the answer: the highest IFD = s(A|Q)/s(A) below 1.

    s(A|Q) is the mean loss of the answer's tokens in the whole prompt, and s(A) that of the same tokens behind BOS
    alone (the end-of-text token, where a tokenizer has no BOS), both without an end-of-text token behind them. A row of
    1 or above, whose question makes the answer less likely, is not taken, and neither is one that is cut.

    Attributes:
        ratio: `loss`, or `perplexity`: exp(s(A|Q) − s(A)), which Li et al. (2402.00530) take.
    """

    ratio: Literal["loss", "perplexity"] = "loss"

    def check(self, pool: Pool) -> None:
        super().check(pool)
        for row in pool.rows:
            if not has_answer(row):
                raise ValueError(
                    f"row {row.id} has no answer apart from a question, which selection=ifd compares; use a task of "
                    "questions or of prompts with completions, or selection=loss"
                )
        _start_of_text(pool)
        self._samples(pool)

    def values(self, pool: Pool, load: Load) -> list[float | None]:
        asked, alone = self._samples(pool)
        losses = stored_token_losses(pool.measurements, load, [*asked, *alone])
        means = [mean_of_counted(of_row, sample) for of_row, sample in zip(losses, (*asked, *alone), strict=True)]
        pairs = zip(asked, means[: len(asked)], means[len(asked) :], strict=True)
        return [
            None if sample.is_truncated else difficulty(with_question, without, self.ratio)
            for sample, with_question, without in pairs
        ]

    def priority(self, value: float) -> float | None:
        return value if value < 1 else None

    def limit(self, values: Values) -> str:
        high, cut = sum(value is not None and value >= 1 for value in values), sum(value is None for value in values)
        return f"an IFD below 1 of rows that are not cut (it is 1 or above in {high} rows, and {cut} are cut)"

    def _samples(self, pool: Pool) -> tuple[Encodings, list[Encoded]]:
        """Gives every row with its question, and its answer alone behind BOS; the answer's tokens count."""
        asked = encode(
            pool.rows,
            pool.measurements.tokenizer,
            template=pool.template,
            max_length=pool.max_length,
            loss_on="output",
            eos=False,
        )
        start = _start_of_text(pool)
        return asked, [Encoded((start, *sample.input_ids[sample.prompt_length :]), 1) for sample in asked]


def difficulty(asked: float, alone: float, ratio: str) -> float:
    """Gives the instruction-following difficulty of a row.

    Args:
        asked: s(A|Q), the mean loss of the answer's tokens behind the question, in nats.
        alone: s(A), the same without the question.
        ratio: `loss` or `perplexity`.

    Returns:
        s(A|Q)/s(A), or exp(s(A|Q) − s(A)). It is finite: an s(A) below 1e-12 counts as that.
    """
    return math.exp(min(asked - alone, 700.0)) if ratio == "perplexity" else asked / max(alone, 1e-12)


def has_answer(row: AnyExample) -> bool:
    """Tells if a row has an answer apart from a question."""
    if isinstance(row, CompletionExample):
        return bool(row.prompt.strip())
    return isinstance(row, Example) or (isinstance(row, ChatExample) and bool(row.num_prompt))


def _start_of_text(pool: Pool) -> int:
    tokenizer = pool.measurements.tokenizer
    ids: Sequence[int | None] = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = next((id for id in ids if id is not None), None)
    if found is None:
        raise ValueError(
            "selection=ifd puts BOS in front of an answer, and the tokenizer has neither BOS nor an end-of-text "
            "token; give its tokenizer_config.json a bos_token, or use selection=loss"
        )
    return found
