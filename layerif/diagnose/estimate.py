"""A figure with its 95 % interval, and rank correlations column by column."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

LEVEL = 0.95
RESAMPLES = 1000  # of figures that cost microseconds a draw


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval. Not a number where the data do not determine it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undetermined"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def percentile(value: float, draws: np.ndarray) -> Estimate:
    """The percentile bootstrap interval; draws that determine nothing (NaN) are left out."""
    known = draws[np.isfinite(draws)]
    if math.isnan(value) or not len(known):
        return Estimate(math.nan, math.nan, math.nan)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(known, ends, method="inverted_cdf")  # values that occurred: ranks stay whole
    return Estimate(float(value), float(low), float(high))


def spearman(first_SC: np.ndarray, second_SC: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each column of S values with the same column of the other: (C).

    Ties share their mean rank. NaN where a column is constant, and so ranks nothing.
    """
    centre = (len(first_SC) + 1) / 2
    first_SC, second_SC = (rankdata(values, axis=0) - centre for values in (first_SC, second_SC))
    norms_C = np.sqrt((first_SC**2).sum(axis=0) * (second_SC**2).sum(axis=0))
    return np.divide((first_SC * second_SC).sum(axis=0), norms_C, out=np.full(norms_C.shape, np.nan), where=norms_C > 0)


def mean(values: np.ndarray) -> float:
    """Of those that are determined; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
