"""Statistics of the report, as pure functions of arrays and frames.

Legend: S seeds, Q questions, B bootstrap draws. A difference is a second run's value minus a first one's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, signal, stats

RESAMPLES = 10_000
LEVEL = 0.05  # of every test; intervals hold 1 − LEVEL
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference, its 95 % interval and two-sided p; NaN where nothing tells chance from effect.

    seed_error: standard error by the spread of `num_seeds` seeds, NaN where they have none. error: by the bootstrap of
    seeds and questions, NaN without questions. num_answers: pairs of answers, 0 without questions.
    """

    mean: float
    low: float
    high: float
    p: float
    seed_error: float
    num_seeds: int
    error: float = np.nan
    num_answers: int = 0


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean over seeds, mean ± t_{S−1}·s/√S; NaN where they have no spread.

    A single seed has none. Nor have seeds that are all alike: a run that no seed touches, repeated, is one run.
    """
    if len(values) < 2 or np.ptp(values) == 0:
        return np.nan, np.nan
    half = stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def paired_by_seed(difference_S: Sequence[float] | np.ndarray) -> Difference:
    """Of a metric without questions, such as perplexity: Student's t over the seeds, paired."""
    difference_S = np.asarray(difference_S, dtype=float)
    mean, (low, high) = float(difference_S.mean()), t_interval(difference_S)
    if np.isnan(low):
        return Difference(mean=mean, low=low, high=high, p=np.nan, seed_error=np.nan, num_seeds=len(difference_S))
    error = float(stats.sem(difference_S))
    p = float(2 * stats.t.sf(abs(mean / error), len(difference_S) - 1))
    return Difference(mean=mean, low=low, high=high, p=p, seed_error=error, num_seeds=len(difference_S))


def num_resamples(num_comparisons: int) -> int:
    """So many draws that the least p there is, 2/B, is below a tenth of 0.05 after a correction for all comparisons."""
    return max(RESAMPLES, int(20 / LEVEL) * num_comparisons)


def paired_by_question(difference_SQ: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Mean of −1, 0 or 1 a question (NaN: not asked at this seed), with an interval clustered by seed.

    Interval: percentile bootstrap of seeds and of questions; a question is drawn for all seeds at once, since it is the
    same question (Owen 2007, The pigeonhole bootstrap). Of S seeds S − 1 are drawn, which makes the variance of their
    mean unbiased, where S draws would make it (S − 1)/S of that: a third too small with three seeds. A single seed
    stands for itself alone. p: the larger of the bootstrap's and the exact sign test's, since the bootstrap is too sure
    where few answers differ and the sign test knows nothing of seeds. Draws of few seeds hardly leave the range of
    those there are, which is too narrow where seeds matter and questions are many: the interval includes Student's t
    over the seeds' means, and p is no less than that test's.
    """
    by_seed = paired_by_seed(np.nanmean(difference_SQ, axis=1))
    asked_SQ = ~np.isnan(difference_SQ)
    value_SQ = np.where(asked_SQ, difference_SQ, 0.0)
    mean = float(value_SQ.sum() / asked_SQ.sum())
    # Questions with the same answers at all seeds are alike to the bootstrap: draw how often each such pattern occurs.
    patterns, count_P = np.unique(np.concatenate([value_SQ, asked_SQ]), axis=1, return_counts=True)
    value_SP, asked_SP = np.split(patterns, 2)
    rng, num_seeds = np.random.default_rng(seed), len(value_SQ)
    drawn_BS = rng.multinomial(max(num_seeds - 1, 1), np.full(num_seeds, 1 / num_seeds), size=resamples)
    drawn_BP = rng.multinomial(count_P.sum(), count_P / count_P.sum(), size=resamples)
    asked_B = ((drawn_BS @ asked_SP) * drawn_BP).sum(axis=1)
    mean_B = ((drawn_BS @ value_SP) * drawn_BP).sum(axis=1)[asked_B > 0] / asked_B[asked_B > 0]
    low, high = np.quantile(mean_B, [LEVEL / 2, 1 - LEVEL / 2])
    tail = min((mean_B <= 0).sum(), (mean_B >= 0).sum())
    p = max(min(1.0, 2 * (1 + tail) / (1 + len(mean_B))), sign_test(value_SQ.sum(axis=0)))
    return Difference(
        mean=mean,
        low=float(np.fmin(low, max(by_seed.low, -1.0))),
        high=float(np.fmax(high, min(by_seed.high, 1.0))),
        p=float(np.fmax(p, by_seed.p)),
        seed_error=by_seed.seed_error,
        num_seeds=num_seeds,
        error=float(mean_B.std()),
        num_answers=int(asked_SQ.sum()),
    )


def sign_test(difference_Q: np.ndarray) -> float:
    """Exact two-sided p of Σ d under random signs of every question's whole-numbered d; of −1, 0, 1: McNemar's test."""
    sizes, counts = np.unique(np.abs(difference_Q[difference_Q != 0]).astype(int), return_counts=True)
    chance = np.ones(1)  # of each possible sum, from −Σ|d| to Σ|d|
    for size, count in zip(sizes, counts, strict=True):
        of_size = np.zeros(2 * size * count + 1)
        of_size[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chance = signal.convolve(chance, of_size)
    sums = np.arange(len(chance)) - len(chance) // 2
    return float(min(1.0, chance[np.abs(sums) >= abs(difference_Q.sum()) - 1e-9].sum()))


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's step-down correction: the k-th smallest of m times m − k + 1, never falling. NaN was not tested."""
    p = np.asarray(p, dtype=float)
    corrected = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def smallest_difference(found: Difference, num_comparisons: int = 1) -> float:
    """What such an experiment would find with 80 % power at α = 0.05 / comparisons; NaN where nothing tells.

    Infinite where it would be more than a fraction can differ by.

    The largest of what its tests need, with z = z(1 − α/2) + z(0.8): z·error by the bootstrap; z² of n answers, all one
    way, by the sign test, however few differ here (of a sum of n signs the variance is n at least); and by Student's t
    over seeds the shift at which the noncentral t passes the critical value in 80 %, in units of seed_error.
    """
    alpha, needed = LEVEL / num_comparisons, [np.nan]
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


def cohens_h(first: float, second: float) -> float:
    """Effect size of two fractions, 2·asin √second − 2·asin √first; 0.2 is called small, 0.5 medium, 0.8 large."""
    return float(2 * np.arcsin(np.sqrt(second)) - 2 * np.arcsin(np.sqrt(first)))


def odds_ratio(won: int, lost: int) -> float:
    """Of discordant pairs: how many times as often only the second run was right as only the first one was."""
    return won / lost if lost else np.inf if won else np.nan


def standardised(difference_S: Sequence[float] | np.ndarray) -> float:
    """Cohen's d of paired differences: their mean over their standard deviation; NaN for a single one."""
    spread = np.std(difference_S, ddof=1) if len(difference_S) > 1 else 0.0
    return float(np.mean(difference_S) / spread) if spread > 0 else np.nan


@dataclass(frozen=True)
class Variance:
    """table: df, sum of squares, F, p and partial η² of each effect; model: what was fitted, in words."""

    table: pd.DataFrame
    model: str
    mean_square: float
    df: int


def anova(runs: pd.DataFrame) -> Variance | None:
    """Analysis of variance (type II) of `value` over `arm` and, where there are several, `task`; one row a run.

    The interaction is part of the model where every arm has several runs on every task, and of the residual otherwise.
    None where there is nothing to compare, or no run left to tell chance by.
    """
    cells = runs.groupby(["arm", "task"]).size().unstack(fill_value=0)
    num_arms, num_tasks = cells.shape
    crossed = num_tasks > 1 and bool(cells.to_numpy().min() > 1)
    terms = ["C(arm)", *["C(task)"] * (num_tasks > 1), *["C(arm):C(task)"] * crossed]
    df = len(runs) - (cells.size if crossed else num_arms + num_tasks - 1)
    if num_arms < 2 or df < 1 or len(set(runs["value"])) < 2:
        return None
    with warnings.catch_warnings():  # of pandas 3, about statsmodels
        warnings.simplefilter("ignore", DeprecationWarning)
        from statsmodels.formula.api import ols  # takes a second, and every run imports this package
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
    return Variance(shown, model, float(squares[-1] / df), df)


def tukey(runs: pd.DataFrame, variance: Variance) -> pd.DataFrame:
    """Tukey's HSD (Kramer's for unequal numbers) of every two arms, by the residual of `variance`.

    An arm's mean is that of its means on the tasks, so that a run that is missing does not weigh a task less; arms must
    have run on the same tasks. p is of the family of all pairs: no correction on top.
    """
    means, spreads = {}, {}
    for arm, group in runs.groupby("arm", sort=False):
        cells = [cell["value"].to_numpy(float) for _, cell in group.groupby("task")]
        means[str(arm)] = float(np.mean([cell.mean() for cell in cells]))
        spreads[str(arm)] = sum(1 / len(cell) for cell in cells) / len(cells) ** 2
    names, critical = list(means), stats.studentized_range.ppf(1 - LEVEL, len(means), variance.df)
    rows = []
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            error = np.sqrt(variance.mean_square / 2 * (spreads[first] + spreads[second]))
            mean = means[second] - means[first]
            p = float(stats.studentized_range.sf(abs(mean) / error, len(means), variance.df)) if error > 0 else np.nan
            low, high = mean - critical * error, mean + critical * error
            rows.append({"from": first, "to": second, "difference": mean, "low": low, "high": high, "p": p})
    return pd.DataFrame(rows)
