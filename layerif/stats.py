"""Intervals, tests, effect sizes and rank correlations, as pure functions of arrays and frames.

SciPy, pandas and statsmodels are imported where they are used, because reading a task needs none of them.

Legend: S seeds, Q questions, B bootstrap draws, R rows, C columns, P patterns of answers. A difference is the second
run's value minus the first one's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95  # the confidence level of every interval
ALPHA = round(1 - LEVEL, 6)  # the level of every test
POWER = 0.8
RESAMPLES = 10_000  # draws of a bootstrap that gives a p
INTERVAL_RESAMPLES = 1000  # draws of one that gives an interval alone
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
        error: standard error by the bootstrap of seeds and questions; NaN without questions.
        num_answers: number of pairs of answers; 0 without questions.
    """

    p: float
    seed_error: float
    num_seeds: int
    error: float = math.nan
    num_answers: int = 0


# Rank correlation


def spearman(first: Any, second: Any) -> Any:
    """Spearman's rank correlation of two vectors, or of each column of a matrix with the same column of another.

    Ties share their mean rank. A record, which is JSON, holds null where this gives NaN.

    Args:
        first: (R) or (R×C).
        second: of the same shape.

    Returns:
        A float, or (C). NaN where either side is constant, and so ranks nothing.
    """
    from scipy.stats import rankdata

    centre = (len(first) + 1) / 2
    first, second = (rankdata(np.asarray(values, dtype=float), axis=0) - centre for values in (first, second))
    norms = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    found = np.divide((first * second).sum(axis=0), norms, out=np.full(norms.shape, np.nan), where=norms > 0)
    return found if found.ndim else float(found)


def spearman_matrix(values_RC: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of every two columns: (C×C). NaN where one of them is constant."""
    return np.array([spearman(values_RC, np.broadcast_to(one_R[:, None], values_RC.shape)) for one_R in values_RC.T])


def known_mean(values: np.ndarray) -> float:
    """The mean of the values that are finite; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


# Intervals


def wilson(num_correct: int, num: int, confidence: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a fraction, as (low, high)."""
    from scipy.stats import binomtest

    interval = binomtest(num_correct, num).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def percentile(value: float, draws_B: np.ndarray) -> Estimate:
    """The value with the percentile interval of its bootstrap draws.

    The bounds are values that were drawn, so that ranks stay whole. Draws without a value (NaN) are left out.
    """
    known = draws_B[np.isfinite(draws_B)]
    if math.isnan(value) or not len(known):
        return UNDETERMINED
    low, high = np.quantile(known, _ENDS, method="inverted_cdf")
    return Estimate(float(value), float(low), float(high))


def t_interval(values_S: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of the mean over seeds, mean ± t_{S−1}·s/√S, as (low, high).

    Both are NaN for a single seed, and for seeds that are all alike: a run that no seed touches stays one run, however
    often it is repeated.
    """
    from scipy import stats

    if len(values_S) < 2 or np.ptp(values_S) == 0:
        return np.nan, np.nan
    half = stats.t.ppf(1 - ALPHA / 2, len(values_S) - 1) * stats.sem(values_S)
    return float(np.mean(values_S) - half), float(np.mean(values_S) + half)


# Tests of paired differences


def paired_by_seed(difference_S: Sequence[float] | np.ndarray) -> Difference:
    """Student's paired test over seeds, for a metric without questions such as perplexity."""
    from scipy import stats

    difference_S = np.asarray(difference_S, dtype=float)
    (low, high), num = t_interval(difference_S), len(difference_S)
    found = {"value": float(difference_S.mean()), "low": low, "high": high, "num_seeds": num}
    if np.isnan(low):
        return Difference(**found, p=np.nan, seed_error=np.nan)
    error = float(stats.sem(difference_S))
    return Difference(**found, p=float(2 * stats.t.sf(abs(found["value"] / error), num - 1)), seed_error=error)


def num_resamples(num_comparisons: int) -> int:
    """The draws that put the least possible p, 2/B, below a tenth of 0.05 after a correction for all comparisons."""
    return max(RESAMPLES, round(20 / ALPHA) * num_comparisons)


def paired_by_question(difference_SQ: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """The mean difference of answers, with an interval clustered by seed.

    The interval is the percentile bootstrap of seeds and of questions; a question is drawn for all seeds at once, since
    it is the same question (Owen 2007, The pigeonhole bootstrap). Of S seeds S − 1 are drawn: this makes the variance
    of their mean unbiased, where S draws would make it (S − 1)/S of that, a third too small with three seeds. A single
    seed is drawn as it is. p is the larger of the bootstrap's and the exact sign test's, since the bootstrap is
    too sure where few answers differ, and the sign test ignores the seeds. Draws of few seeds hardly leave the
    range of the seeds' own means, which is too narrow where seeds matter and questions are many. The interval therefore
    includes Student's t over the seeds' means, and p is at least that test's.

    Args:
        difference_SQ: −1, 0 or 1 for each seed and question; NaN where the question was not asked at this seed.
        seed: decides the draws.
        resamples: number of draws.
    """
    by_seed = paired_by_seed(np.nanmean(difference_SQ, axis=1))
    asked_SQ = ~np.isnan(difference_SQ)
    value_SQ = np.where(asked_SQ, difference_SQ, 0.0)
    # Questions with the same answers at all seeds are alike to the bootstrap: draw how often each such pattern occurs.
    patterns, count_P = np.unique(np.concatenate([value_SQ, asked_SQ]), axis=1, return_counts=True)
    value_SP, asked_SP = np.split(patterns, 2)
    rng, num_seeds = np.random.default_rng(seed), len(value_SQ)
    drawn_BS = rng.multinomial(max(num_seeds - 1, 1), np.full(num_seeds, 1 / num_seeds), size=resamples)
    drawn_BP = rng.multinomial(count_P.sum(), count_P / count_P.sum(), size=resamples)
    asked_B = ((drawn_BS @ asked_SP) * drawn_BP).sum(axis=1)
    mean_B = ((drawn_BS @ value_SP) * drawn_BP).sum(axis=1)[asked_B > 0] / asked_B[asked_B > 0]
    low, high = np.quantile(mean_B, _ENDS)
    tail = min((mean_B <= 0).sum(), (mean_B >= 0).sum())
    p = max(min(1.0, 2 * (1 + tail) / (1 + len(mean_B))), sign_test(value_SQ.sum(axis=0)))
    return Difference(
        value=float(value_SQ.sum() / asked_SQ.sum()),
        low=float(np.fmin(low, max(by_seed.low, -1.0))),
        high=float(np.fmax(high, min(by_seed.high, 1.0))),
        p=float(np.fmax(p, by_seed.p)),
        seed_error=by_seed.seed_error,
        num_seeds=num_seeds,
        error=float(mean_B.std()),
        num_answers=int(asked_SQ.sum()),
    )


def sign_test(difference_Q: np.ndarray) -> float:
    """The exact two-sided p of Σ d under random signs of the whole-numbered d of every question.

    With d in {−1, 0, 1} this is McNemar's exact test.
    """
    from scipy import signal, stats

    sizes, counts = np.unique(np.abs(difference_Q[difference_Q != 0]).astype(int), return_counts=True)
    chance = np.ones(1)  # the probability of each sum, from −Σ|d| to Σ|d|
    for size, count in zip(sizes, counts, strict=True):
        of_size = np.zeros(2 * size * count + 1)
        of_size[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chance = signal.convolve(chance, of_size)
    sums = np.arange(len(chance)) - len(chance) // 2
    return float(min(1.0, chance[np.abs(sums) >= abs(difference_Q.sum()) - 1e-9].sum()))


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
    """The smallest difference that such an experiment would find with 80 % power at α = 0.05 / comparisons.

    It is the largest of the differences that the tests need, with z = z(1 − α/2) + z(0.8). The bootstrap needs
    z·error. The sign test needs z² of n answers, all one way, even if fewer differ here (the variance of a sum of n
    signs is at least n). Student's t over seeds needs the shift at which the noncentral t passes the critical value in
    80 %, in units of `seed_error`.

    Returns:
        NaN where nothing tells chance from effect; infinity where it would be more than a fraction can differ by.
    """
    from scipy import optimize, stats

    alpha, needed = ALPHA / num_comparisons, [np.nan]
    if found.num_answers:
        z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(POWER)
        needed += [z * found.error, z**2 / found.num_answers]
    if found.seed_error > 0:
        df = found.num_seeds - 1
        critical = stats.t.ppf(1 - alpha / 2, df)
        found_with_power = optimize.root_scalar(
            lambda shift: stats.nct.sf(critical, df, shift) - POWER, bracket=(0, 2 * critical + 4)
        )
        needed.append(found_with_power.root * found.seed_error)
    least = float(np.fmax.reduce(np.array(needed)))
    return np.inf if found.num_answers and least > 1 else least


# Effect sizes


def cohens_h(first: float, second: float) -> float:
    """Cohen's h of two fractions, 2·asin √second − 2·asin √first; 0.2 is called small, 0.5 medium, 0.8 large."""
    return float(2 * np.arcsin(np.sqrt(second)) - 2 * np.arcsin(np.sqrt(first)))


def odds_ratio(won: int, lost: int) -> float:
    """Divides the answers that only the second run got right by those that only the first one got right."""
    return won / lost if lost else np.inf if won else np.nan


def standardised(difference_S: Sequence[float] | np.ndarray) -> float:
    """Cohen's d of paired differences: their mean over their standard deviation; NaN for a single one."""
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
    terms = ["C(arm)", *["C(task)"] * (num_tasks > 1), *["C(arm):C(task)"] * crossed]
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
    must have run on the same tasks. p holds for the family of all pairs and needs no further correction.

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
    names, critical = list(means), stats.studentized_range.ppf(1 - ALPHA, len(means), variance.df)
    rows = []
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            error = np.sqrt(variance.mean_square / 2 * (spreads[first] + spreads[second]))
            mean = means[second] - means[first]
            p = float(stats.studentized_range.sf(abs(mean) / error, len(means), variance.df)) if error > 0 else np.nan
            low, high = mean - critical * error, mean + critical * error
            rows.append({"from": first, "to": second, "difference": mean, "low": low, "high": high, "p": p})
    return pd.DataFrame(rows)
