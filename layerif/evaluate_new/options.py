"""The metric `options`: the likelihood of every option, and the accuracy it adds up to.

Letters in shape suffixes: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

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
