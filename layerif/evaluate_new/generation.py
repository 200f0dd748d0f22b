"""The metric `generation`: greedy answers, parsed, and their accuracy."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
