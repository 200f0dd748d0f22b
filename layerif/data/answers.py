"""Answers of a model to questions, kept one by one, and the accuracy they add up to."""

from __future__ import annotations

import re
from dataclasses import dataclass


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


def wilson(num_correct: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of one accuracy."""
    from scipy.stats import binomtest  # half a second that whoever only parses a task does not pay

    interval = binomtest(num_correct, num).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def answer_parser(pattern: str) -> re.Pattern[str]:
    """The compiled `pattern` of a task. Raises ValueError if it is no expression or holds no group."""
    try:
        parser = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"task.pattern={pattern!r} is no regular expression: {error}") from error
    if parser.groups < 1:
        raise ValueError(f"task.pattern={pattern!r} has no group; put the answer in parentheses, as in 'is ([A-Z])'")
    return parser


def parse_answer(text: str, parser: re.Pattern[str]) -> str | None:
    """The first group of the first match, stripped; None without a match."""
    found = parser.search(text)
    return found[1].strip() if found and found[1] is not None else None
