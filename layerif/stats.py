"""Intervals, tests, effect sizes and rank correlations, as pure functions of arrays and frames.

SciPy, pandas and statsmodels are imported where they are used, because reading a task needs none of them.

Legend: S seeds, Q questions, B bootstrap draws, R rows, C columns, P pairs. A difference is the second
run's value minus the first one's.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95  # the confidence level of every interval
ALPHA = round(1 - LEVEL, 6)  # the level of every test
POWER = 0.8
RESAMPLES = 10_000  # draws of a bootstrap that gives a p
INTERVAL_RESAMPLES = 1000  # draws of one that gives an interval alone
ENOUGH_TAIL = 20  # draws beyond zero that settle a p: its standard error is then a fifth of it
_DRAWN_AT_ONCE = 2**18  # questions of a bootstrap in memory
_ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; NaN where the data do not determine it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undetermined"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


UNDETERMINED = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """A mean difference with its interval and its two-sided p; NaN where nothing tells chance from effect.

    Attributes:
        p: of the hypothesis that there is no difference.
        seed_error: standard error by the spread of `num_seeds` seeds; NaN where they have none.
        num_seeds: number of pairs of runs.
        error: standard error by the bootstrap of seeds and rows; NaN without rows.
        num_answers: number of pairs of answers; 0 where no answers are compared.
        row_error: standard error by the spread of `num_rows` rows, of losses alone; NaN where they have none.
        num_rows: number of rows whose losses are paired.
    """

    p: float
    seed_error: float
    num_seeds: int
    error: float = math.nan
    num_answers: int = 0
    row_error: float = math.nan
    num_rows: int = 0


# Rank correlation


def spearman(first: Any, second: Any) -> Any:
    """Computes Spearman's rank correlation of two vectors, or of each column of a matrix with the same one of another.

    Ties share their mean rank. A record, which is JSON, holds null where this gives NaN.

    Args:
        first: (R) or (R×C).
        second: of the same shape.

    Returns:
        A float, or (C). NaN where either side is constant, and so ranks nothing.
    """
    first, second = _centred_ranks(first), _centred_ranks(second)
    norms = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    found = np.divide((first * second).sum(axis=0), norms, out=np.full(norms.shape, np.nan), where=norms > 0)
    return found if found.ndim else float(found)


def _centred_ranks(values: Any) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(np.asarray(values, dtype=float), axis=0) - (len(values) + 1) / 2


def spearman_matrix(values_RC: np.ndarray) -> np.ndarray:
    """Computes Spearman's rank correlation of every two columns: (C×C). NaN where one of them is constant."""
    ranks_RC = _centred_ranks(values_RC)
    norms_C = np.sqrt((ranks_RC**2).sum(axis=0))
    norms_CC = np.outer(norms_C, norms_C)
    return np.divide(ranks_RC.T @ ranks_RC, norms_CC, out=np.full(norms_CC.shape, np.nan), where=norms_CC > 0)


def known_mean(values: np.ndarray) -> float:
    """Returns the mean of the values that are finite; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


# Intervals


def wilson(num_correct: int, num: int, confidence: float = LEVEL) -> tuple[float, float]:
    """Computes Wilson's score interval of a fraction, as (low, high)."""
    from scipy.stats import binomtest

    interval = binomtest(num_correct, num).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def percentile(value: float, draws_B: np.ndarray) -> Estimate:
    """Returns the value with the percentile interval of its bootstrap draws.

    The bounds are values that were drawn, so that ranks stay whole. Draws without a value (NaN) are left out.
    """
    known = draws_B[np.isfinite(draws_B)]
    if math.isnan(value) or not len(known):
        return UNDETERMINED
    low, high = np.quantile(known, _ENDS, method="inverted_cdf")
    return Estimate(float(value), float(low), float(high))


def t_interval(values_S: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Computes Student's 95 % interval of the mean over seeds, mean ± t_{S−1}·s/√S, as (low, high).

    Both are NaN for a single seed, and for seeds that are all alike: a run that no seed touches stays one run, however
    often it is repeated.
    """
    if len(values_S) < 2 or np.ptp(values_S) == 0:
        return np.nan, np.nan
    half = _critical_t(len(values_S) - 1) * _standard_error(values_S)
    return float(np.mean(values_S) - half), float(np.mean(values_S) + half)


def _standard_error(values_S: Sequence[float] | np.ndarray) -> float:
    return float(np.std(values_S, ddof=1) / math.sqrt(len(values_S)))


@lru_cache
def _critical_t(df: int, alpha: float = ALPHA) -> float:
    from scipy import stats

    return float(stats.t.ppf(1 - alpha / 2, df))


# Tests of paired differences


def paired_by_seed(difference_S: Sequence[float] | np.ndarray) -> Difference:
    """Applies Student's paired test over seeds, for a metric without questions such as perplexity."""
    from scipy.special import stdtr

    difference_S = np.asarray(difference_S, dtype=float)
    (low, high), num = t_interval(difference_S), len(difference_S)
    found = {"value": float(difference_S.mean()), "low": low, "high": high, "num_seeds": num}
    if np.isnan(low):
        return Difference(**found, p=np.nan, seed_error=np.nan)
    error = _standard_error(difference_S)
    return Difference(**found, p=float(2 * stdtr(num - 1, -abs(found["value"] / error))), seed_error=error)


def num_resamples(num_comparisons: int) -> int:
    """Counts the draws that put the least possible p, 2/B, below a tenth of 0.05, corrected for all comparisons."""
    return max(RESAMPLES, round(20 / ALPHA) * num_comparisons)


def paired_by_question(difference_SQ: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Returns the mean difference of the answers of two runs, see `all_paired_by_question`.

    Args:
        difference_SQ: −1, 0 or 1 for each seed and question; NaN where the question was not asked at this seed.
        seed: decides the draws.
        resamples: the most draws.
    """
    return all_paired_by_question([(np.zeros_like(difference_SQ), difference_SQ)], seed=seed, resamples=resamples)[0]


def all_paired_by_question(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    are_answers: bool = True,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Difference]:
    """Returns the mean difference of the answers, or losses, of every two runs, with an interval clustered by seed.

    The interval is the percentile bootstrap of seeds and of questions; a question is drawn for all seeds at once, since
    it is the same question (Owen 2007, The pigeonhole bootstrap). Of S seeds S − 1 are drawn: this makes the variance
    of their mean unbiased, where S draws would make it (S − 1)/S of that, a third too small with three seeds. A single
    seed is drawn as it is. p is the larger of the bootstrap's and the exact sign test's, since the bootstrap is
    too sure where few answers differ, and the sign test ignores the seeds. Draws of few seeds hardly leave the
    range of the seeds' own means, which is too narrow where seeds matter and questions are many. The interval therefore
    includes Student's t over the seeds' means, and p is at least that test's.

    Losses have sizes and not only signs, so for them Student's t over the rows' means takes the place of the sign test,
    and the interval includes it, too.

    Comparisons over as many questions share their draws, so that each run is drawn once and not once for each of its
    comparisons. The interval takes at most RESAMPLES draws. p takes more, up to `resamples`, as long as fewer than
    ENOUGH_TAIL of them lie beyond zero and it is the largest of the three.

    Args:
        pairs: the answers (S×Q) of the first and of the second run of each comparison, 1 where right and 0 where wrong,
            or the losses; NaN where the question was not asked at this seed.
        are_answers: whether the values are answers, and so 0 or 1.
        seed: decides the draws.
        resamples: the most draws.
    """
    rows_of: dict[int, dict[bytes, int]] = defaultdict(dict)
    found = [_Bootstrap(first_SQ, second_SQ, rows_of, are_answers) for first_SQ, second_SQ in pairs]
    for num_questions, rows in rows_of.items():
        values_RQ = np.frombuffer(b"".join(rows), dtype=np.float32).reshape(len(rows), num_questions)
        same = [one for one in found if one.num_questions == num_questions]
        for start in range(0, resamples, RESAMPLES):
            unsettled = [one for one in same if one.is_unsettled]
            _draw(unsettled, values_RQ, min(RESAMPLES, resamples - start), (seed, start))
    return [one.difference() for one in found]


class _Bootstrap:
    """One comparison: its tests that need no draws, and what its draws have shown so far."""

    def __init__(
        self, first_SQ: np.ndarray, second_SQ: np.ndarray, rows_of: dict[int, dict[bytes, int]], are_answers: bool
    ) -> None:
        """Puts its rows of answers into `rows_of`, by number of questions, each row once."""
        asked_SQ = ~np.isnan(first_SQ + second_SQ)
        is_asked_Q, num_asked_S = asked_SQ.any(axis=0), asked_SQ.sum(axis=1)
        difference_SQ = np.where(asked_SQ, second_SQ - first_SQ, 0.0)
        self.num_seeds, self.num_questions, self.num_asked = len(asked_SQ), int(is_asked_Q.sum()), int(asked_SQ.sum())
        self.value = float(difference_SQ.sum() / self.num_asked)
        self.by_seed = paired_by_seed(difference_SQ.sum(axis=1) / num_asked_S)
        self.are_answers, total_Q = are_answers, difference_SQ.sum(axis=0)[is_asked_Q]
        # Student's test over rows is that over seeds with rows in their place. A single row shows nothing.
        self.by_row = paired_by_seed(total_Q / asked_SQ.sum(axis=0)[is_asked_Q])
        row_p = sign_test(total_Q) if are_answers else 1.0 if np.isnan(self.by_row.p) else self.by_row.p
        self.least_p = float(np.fmax(row_p, self.by_seed.p))
        rows = rows_of[self.num_questions]
        # Single precision holds sums of answers exactly, because they are whole numbers, and those of losses to 1e-7.
        self.first_S, self.second_S, self.asked_S = (
            [rows.setdefault(row_Q[is_asked_Q].astype(np.float32).tobytes(), len(rows)) for row_Q in values_SQ]
            for values_SQ in (*(np.where(asked_SQ, answers, 0.0) for answers in (first_SQ, second_SQ)), asked_SQ)
        )
        self.interval, self.error = (np.nan, np.nan), np.nan
        self.num_draws = self.num_below = self.num_above = 0

    @property
    def p(self) -> float:
        return min(1.0, 2 * (1 + min(self.num_below, self.num_above)) / (1 + self.num_draws))

    @property
    def is_unsettled(self) -> bool:
        is_rough = min(self.num_below, self.num_above) < ENOUGH_TAIL
        return not self.num_draws or (is_rough and self.p > self.least_p)

    def take(self, mean_B: np.ndarray) -> None:
        if not self.num_draws:
            low, high = np.quantile(mean_B, _ENDS)
            self.interval, self.error = (float(low), float(high)), float(mean_B.std())
        self.num_draws += len(mean_B)
        self.num_below += int((mean_B <= 0).sum())
        self.num_above += int((mean_B >= 0).sum())

    def difference(self) -> Difference:
        found = {
            "value": self.value,
            "p": max(self.p, self.least_p),
            "seed_error": self.by_seed.seed_error,
            "num_seeds": self.num_seeds,
            "error": self.error,
        }
        if self.are_answers:
            return Difference(
                low=float(np.fmin(self.interval[0], max(self.by_seed.low, -1.0))),
                high=float(np.fmax(self.interval[1], min(self.by_seed.high, 1.0))),
                num_answers=self.num_asked,
                **found,
            )
        intervals = np.array([self.interval, *((by.low, by.high) for by in (self.by_seed, self.by_row))])
        return Difference(
            low=float(np.fmin.reduce(intervals[:, 0])),
            high=float(np.fmax.reduce(intervals[:, 1])),
            row_error=self.by_row.seed_error,
            num_rows=self.num_questions,
            **found,
        )


def _draw(compared: Sequence[_Bootstrap], values_RQ: np.ndarray, num_draws: int, seeds: tuple[int, ...]) -> None:
    """Gives these comparisons, which all have the same number of questions, more draws."""
    needed = sorted({row for one in compared for row in (*one.first_S, *one.second_S, *one.asked_S)})
    totals_RB = dict(zip(needed, _bootstrapped(values_RQ[needed], num_draws, seeds), strict=True))
    weights = {}
    for num_seeds in {one.num_seeds for one in compared}:
        rng, even_S = np.random.default_rng((*seeds, num_seeds)), np.full(num_seeds, 1 / num_seeds)
        weights[num_seeds] = rng.multinomial(max(num_seeds - 1, 1), even_S, size=num_draws).T.astype(np.float32)
    for one in compared:
        total_B, asked_B = np.zeros((2, num_draws))
        for weight_B, first, second, asked in zip(
            weights[one.num_seeds], one.first_S, one.second_S, one.asked_S, strict=True
        ):
            total_B += weight_B * (totals_RB[second] - totals_RB[first])
            asked_B += weight_B * totals_RB[asked]
        one.take(total_B[asked_B > 0] / asked_B[asked_B > 0])


def _bootstrapped(values_RQ: np.ndarray, num_draws: int, seeds: tuple[int, ...]) -> np.ndarray:
    """Returns the sums of each row over questions that are drawn with replacement: (R×B)."""
    num_rows, num_questions = values_RQ.shape
    totals_RB = np.empty((num_rows, num_draws), dtype=np.float32)
    at_once = max(1, _DRAWN_AT_ONCE // num_questions)
    for start in range(0, num_draws, at_once):
        times_QB = _times_drawn(num_questions, min(at_once, num_draws - start), (*seeds, start))
        totals_RB[:, start : start + times_QB.shape[1]] = values_RQ @ times_QB
    return totals_RB


@lru_cache(maxsize=8)
def _times_drawn(num_questions: int, num_draws: int, seeds: tuple[int, ...]) -> np.ndarray:
    """Counts the times that each question is drawn where as many are drawn as there are: (Q×B)."""
    rng, own_B = np.random.default_rng(seeds), num_questions * np.arange(num_draws)
    drawn_BQ = rng.integers(num_questions, size=(num_draws, num_questions)) + own_B[:, None]
    return np.bincount(drawn_BQ.ravel(), minlength=drawn_BQ.size).reshape(drawn_BQ.shape).T.astype(np.float32)


def sign_test(difference_Q: np.ndarray) -> float:
    """Returns the exact two-sided p of Σ d under random signs of the whole-numbered d of every question.

    With d in {−1, 0, 1} this is McNemar's exact test.
    """
    from scipy import signal

    sizes, counts = np.unique(np.abs(difference_Q[difference_Q != 0]).astype(int), return_counts=True)
    chance = np.ones(1)  # the probability of each sum, from −Σ|d| to Σ|d|
    for size, count in zip(sizes, counts, strict=True):
        of_size = np.zeros(2 * size * count + 1)
        of_size[:: 2 * size] = _signs(int(count))
        chance = signal.convolve(chance, of_size)
    sums = np.arange(len(chance)) - len(chance) // 2
    return float(min(1.0, chance[np.abs(sums) >= abs(difference_Q.sum()) - 1e-9].sum()))


@lru_cache(maxsize=4096)
def _signs(count: int) -> np.ndarray:
    """Returns the probability of each number of plus signs among `count` random ones."""
    from scipy import stats

    return stats.binom.pmf(np.arange(count + 1), count, 0.5)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Corrects p values for their number by Holm's step-down rule.

    The k-th smallest of m is multiplied by m − k + 1, and none falls below a smaller one. NaN was not tested.
    """
    p = np.asarray(p, dtype=float)
    corrected = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def smallest_difference(found: Difference, num_comparisons: int = 1) -> float:
    """Returns the smallest difference that such an experiment would find with 80 % power at α = 0.05 / comparisons.

    It is the largest of the differences that the tests need, with z = z(1 − α/2) + z(0.8). The bootstrap needs
    z·error. The sign test needs z² of n answers, all one way, even if fewer differ here (the variance of a sum of n
    signs is at least n). Student's t over seeds, or over rows, needs the shift at which the noncentral t passes the
    critical value in 80 %, in units of `seed_error` or `row_error`.

    Returns:
        NaN where nothing tells chance from effect; infinity where it would be more than a fraction can differ by.
    """
    from scipy import stats

    alpha, needed = ALPHA / num_comparisons, [np.nan]
    z = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(POWER))
    needed.append(z * found.error)
    if found.num_answers:
        needed.append(z**2 / found.num_answers)
    for error, num in ((found.seed_error, found.num_seeds), (found.row_error, found.num_rows)):
        if error > 0:
            needed.append(needed_shift(_critical_t(num - 1, alpha), num - 1) * error)
    least = float(np.fmax.reduce(np.array(needed)))
    return np.inf if found.num_answers and least > 1 else least


@lru_cache
def needed_shift(critical: float, df: int) -> float:
    """Returns the noncentrality at which Student's t with `df` degrees of freedom passes a critical value in 80 %."""
    from scipy import optimize, stats

    return optimize.root_scalar(
        lambda shift: stats.nct.sf(critical, df, shift) - POWER, bracket=(0, 2 * critical + 4)
    ).root


# Effect sizes


def cohens_h(first: float, second: float) -> float:
    """Computes Cohen's h of two fractions, 2·asin √second − 2·asin √first.

    0.2 is called small, 0.5 medium, 0.8 large.
    """
    return float(2 * np.arcsin(np.sqrt(second)) - 2 * np.arcsin(np.sqrt(first)))


def odds_ratio(won: int, lost: int) -> float:
    """Divides the answers that only the second run got right by those that only the first one got right."""
    return won / lost if lost else np.inf if won else np.nan


def standardised(difference_S: Sequence[float] | np.ndarray) -> float:
    """Computes Cohen's d of paired differences: their mean over their standard deviation; NaN for a single one."""
    spread = np.std(difference_S, ddof=1) if len(difference_S) > 1 else 0.0
    return float(np.mean(difference_S) / spread) if spread > 0 else np.nan


# Analysis of variance


@dataclass(frozen=True, kw_only=True)
class Variance:
    """An analysis of variance.

    Attributes:
        table: df, sum of squares, F, p and partial η² of each effect.
        model: the effects that were fitted, in words.
        mean_square: of the residual.
        df: degrees of freedom of the residual.
    """

    table: pd.DataFrame
    model: str
    mean_square: float
    df: int


def anova(runs: pd.DataFrame) -> Variance | None:
    """Analyses the variance (type II) of `value` over `arm` and, where there are several, `task`.

    The interaction is part of the model where every arm has several runs on every task, and of the residual otherwise.

    Args:
        runs: one row a run, with the columns `value`, `arm` and `task`.

    Returns:
        None where there is nothing to compare, or no run left to tell chance by.
    """
    import pandas as pd

    cells = runs.groupby(["arm", "task"]).size().unstack(fill_value=0)
    num_arms, num_tasks = cells.shape
    crossed = num_tasks > 1 and bool(cells.to_numpy().min() > 1)
    terms = ["C(arm)"]
    if num_tasks > 1:
        terms.append("C(task)")
    if crossed:
        terms.append("C(arm):C(task)")
    df = len(runs) - (cells.size if crossed else num_arms + num_tasks - 1)
    if num_arms < 2 or df < 1 or len(set(runs["value"])) < 2:
        return None
    with warnings.catch_warnings():  # pandas 3 warns about statsmodels
        warnings.simplefilter("ignore", DeprecationWarning)
        from statsmodels.formula.api import ols
        from statsmodels.stats.anova import anova_lm
    table = anova_lm(ols(f"value ~ {' + '.join(terms)}", runs).fit(), typ=2)
    names = {"C(arm)": "arm", "C(task)": "task", "C(arm):C(task)": "arm × task", "Residual": "residual"}
    squares = table["sum_sq"].to_numpy()
    effect_sizes = squares / (squares + squares[-1])
    shown = pd.DataFrame(
        {
            "effect": [names[str(name)] for name in table.index],
            "df": table["df"].astype(int).to_numpy(),
            "sum of squares": squares,
            "F": table["F"].to_numpy(),
            "p": table["PR(>F)"].to_numpy(),
            "partial η²": [*effect_sizes[:-1], np.nan],
        }
    )
    model = " + ".join(names[term] for term in terms)
    return Variance(table=shown, model=model, mean_square=float(squares[-1] / df), df=df)


def tukey(runs: pd.DataFrame, variance: Variance) -> pd.DataFrame:
    """Compares every two arms by Tukey's HSD (Kramer's for unequal numbers) and the residual of `variance`.

    The mean of an arm is that of its means on the tasks, so that a missing run does not weigh a task less. All arms
    must have run on the same tasks. p holds for the family of all pairs and needs no further correction, and the
    smallest difference that such runs would find with 80 % power allows for the family, too.

    Args:
        runs: as for `anova`.
        variance: their analysis.
    """
    import pandas as pd
    from scipy import stats

    means, spreads = {}, {}
    for arm, group in runs.groupby("arm", sort=False):
        cells = [cell["value"].to_numpy(float) for _, cell in group.groupby("task")]
        means[str(arm)] = float(np.mean([cell.mean() for cell in cells]))
        spreads[str(arm)] = sum(1 / len(cell) for cell in cells) / len(cells) ** 2
    pairs = list(itertools.combinations(means, 2))
    difference_P = np.array([means[second] - means[first] for first, second in pairs])
    spread_P = np.array([spreads[first] + spreads[second] for first, second in pairs])
    error_P = np.sqrt(variance.mean_square / 2 * spread_P)
    critical = float(stats.studentized_range.ppf(1 - ALPHA, len(means), variance.df))
    half_P, needed = critical * error_P, needed_shift(critical / math.sqrt(2), variance.df)
    range_P = np.divide(abs(difference_P), error_P, out=np.full(len(pairs), np.nan), where=error_P > 0)
    return pd.DataFrame(
        {
            "from": [first for first, _ in pairs],
            "to": [second for _, second in pairs],
            "difference": difference_P,
            "low": difference_P - half_P,
            "high": difference_P + half_P,
            "p": _beyond_range(range_P, len(means), variance.df),
            "smallest found": needed * math.sqrt(2) * error_P,
        }
    )


def _beyond_range(range_P: np.ndarray, num_arms: int, df: int) -> np.ndarray:
    """Returns the probability that the studentized range of `num_arms` means exceeds each value.

    SciPy integrates for ten milliseconds a value. More than a hundred are therefore read off a polynomial in
    ln(1 + value), which is exact to 1e-7; above its end the probability is less than 1e-12 and called 0.
    """
    from scipy.stats import studentized_range

    if len(range_P) <= 100:
        return studentized_range.sf(range_P, num_arms, df)
    end, largest = 8.0, np.nanmax(range_P)
    while end < largest and studentized_range.sf(end, num_arms, df) > 1e-12:
        end *= 1.25
    curve = np.polynomial.Chebyshev.interpolate(
        lambda logarithm: np.asarray(studentized_range.sf(np.expm1(logarithm), num_arms, df)),
        80,
        domain=[0, np.log1p(end)],
    )
    return np.where(range_P > end, 0.0, np.clip(curve(np.log1p(range_P)), 0, 1))


RELIABLE = 0.5  # below it, two halves of the samples order the layers too differently to spend by
ENOUGH = (64, 32)  # train and validation samples


def doubts(reliability: float | None, num_samples: Sequence[int]) -> list[str]:
    """Says why an allocation by scores should not be trusted much; empty where nothing is known against it.

    Args:
        reliability: the rank correlation of the scores of two halves of the samples; None where there is none.
        num_samples: the train and validation samples behind the scores; 0 where a part plays no role.
    """
    found = []
    if reliability is not None and reliability < RELIABLE:
        found.append(
            f"the reliability is {reliability:.2f}: two halves of the samples order the layers differently, so an "
            "allocation by these scores is mostly noise; give more rows"
        )
    if any(0 < num < enough for num, enough in zip(num_samples, ENOUGH, strict=True)):
        found.append(
            f"{num_samples[0]} + {num_samples[1]} samples are few: an allocation looks surer than it is; give at least "
            f"{ENOUGH[0]} + {ENOUGH[1]}"
        )
    return found
