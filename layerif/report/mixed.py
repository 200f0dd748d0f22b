"""A linear mixed model of runs: arms are fixed effects, tasks and seeds are random ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from layerif.checks import how_many
from layerif.stats import ALPHA, holm

FEWEST_LEVELS = 3  # tasks, and seeds: two say next to nothing about a spread
_RANDOM = ("task", "seed")


class TooLittle(Exception):
    """Says in plain words why there is no mixed model."""


@dataclass(frozen=True, kw_only=True)
class MixedModel:
    """A fitted mixed model.

    Attributes:
        table: each arm against the first one: `from`, `to`, `difference`, its 95 % interval `low` and `high`, `p`, and
            `p Holm`, which is corrected for the arms.
        spreads: the standard deviation of `task`, of `seed` and of the `rest`.
        df: the degrees of freedom of the interval: the runs that arms, tasks and seeds leave.
    """

    table: pd.DataFrame
    spreads: dict[str, float]
    df: int


def mixed_model(runs: pd.DataFrame) -> MixedModel:
    """Fits value = arm + task + seed + rest by restricted maximum likelihood, with crossed random tasks and seeds.

    Intervals and p are Student's, which is exact where every arm ran on the same tasks and seeds.

    Args:
        runs: one row a run, with the columns `value`, `arm`, `task` and `seed`; the first arm is the one that the
            others are compared with.

    Raises:
        TooLittle: there are too few tasks, seeds or runs, or the fit fails.
    """
    from scipy import stats

    arms = list(dict.fromkeys(runs["arm"]))
    if len(arms) < 2:
        raise TooLittle("there is one arm")
    for name in _RANDOM:
        number = len(set(runs[name]))
        if number < FEWEST_LEVELS:
            raise TooLittle(
                f"there {'is' if number == 1 else 'are'} {how_many(number, name)}, and the spread of {name}s needs at "
                f"least {FEWEST_LEVELS}"
            )
    dummies = {name: pd.get_dummies(runs[name], dtype=float).to_numpy() for name in ("arm", *_RANDOM)}
    df = len(runs) - int(np.linalg.matrix_rank(np.hstack(list(dummies.values()))))
    if df < 1:
        raise TooLittle(f"{how_many(len(runs), 'run')} leave nothing to tell chance by, after arms, tasks and seeds")
    if np.ptp(runs["value"]) == 0:
        raise TooLittle("all runs have the same value")
    fit = _fitted(runs.assign(arm=pd.Categorical(runs["arm"], arms)))
    difference, error = np.asarray(fit.fe_params)[1:], np.asarray(fit.bse_fe)[1:]
    if not (fit.converged and np.isfinite(error).all() and (error > 0).all()):
        raise TooLittle("the fit does not converge on these runs")
    half = float(stats.t.ppf(1 - ALPHA / 2, df)) * error
    p = 2 * stats.t.sf(abs(difference) / error, df)
    table = pd.DataFrame(
        {
            "from": arms[0],
            "to": arms[1:],
            "difference": difference,
            "low": difference - half,
            "high": difference + half,
            "p": p,
            "p Holm": holm(p),
        }
    )
    named = dict(zip(fit.model.exog_vc.names, np.sqrt(fit.vcomp), strict=True))
    spreads = {**{name: float(named[name]) for name in _RANDOM}, "rest": float(np.sqrt(fit.scale))}
    return MixedModel(table=table, spreads=spreads, df=df)


def _fitted(runs: pd.DataFrame) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pandas 3 warns about statsmodels
        from statsmodels.regression.mixed_linear_model import MixedLM
    crossed = {name: f"0 + C({name})" for name in _RANDOM}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a spread at its bound is 0, and shown as such
        try:
            model = MixedLM.from_formula(
                "value ~ C(arm)", runs, groups=np.ones(len(runs)), vc_formula=crossed, re_formula="0"
            )
            # The second one takes over where the first one stops at a spread of 0.
            return model.fit(reml=True, method=["lbfgs", "powell"])
        except (np.linalg.LinAlgError, ValueError) as error:
            raise TooLittle(f"the fit fails on these runs ({error})") from error
