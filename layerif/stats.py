"""Intervals, tests and rank correlations, as pure functions of arrays."""

from __future__ import annotations


def wilson(num_correct: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of one accuracy."""
    from scipy.stats import binomtest  # half a second that whoever only parses a task does not pay

    interval = binomtest(num_correct, num).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
