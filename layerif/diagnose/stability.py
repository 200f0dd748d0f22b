"""Do the layers keep their ranks when samples, damping or the fitted model change? Rank 1 is the highest score.

Letters in shape suffixes: B bootstrap draws, L layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from scipy.stats import kendalltau, rankdata
from tqdm import tqdm

from layerif.diagnose.estimate import Estimate, mean, percentile, spearman
from layerif.estimators.gram import DampedEstimator, GramEstimator
from layerif.layers import LayerGrams


@dataclass(frozen=True)
class Correlation:
    """How alike two profiles of the same layers are; NaN where one ranks nothing."""

    first: str
    second: str
    spearman: float
    kendall: float


def ranks(scores: Sequence[float]) -> np.ndarray:
    """(L): 1 for the highest score; equal scores share their mean rank."""
    return rankdata(-np.asarray(scores, dtype=float))


def bootstrap_scores(estimator: GramEstimator, grams: LayerGrams, *, resamples: int, seed: int) -> np.ndarray:
    """Layer scores under `resamples` bootstrap draws of train and of validation samples: (B×L).

    No gradient is taken: a draw selects rows and columns of the Grams.
    """
    generator = torch.Generator().manual_seed(seed)
    num_val, num_train = next(iter(grams.grams.values())).val_train.shape
    scores = []
    with _quiet():
        for _ in tqdm(range(resamples), desc="bootstrap of the layers' ranks", disable=None, leave=False):
            train = torch.randint(num_train, (num_train,), generator=generator)
            validation = torch.randint(num_val, (num_val,), generator=generator)
            scores.append(estimator.score(grams.select(train, validation)).values)
    return np.array(scores)


def rank_intervals(scores: Sequence[float], scores_BL: np.ndarray) -> list[Estimate]:
    """Each layer's rank with its percentile interval over the draws."""
    ranks_BL = np.stack([ranks(draw_L) for draw_L in scores_BL])
    return [percentile(float(rank), ranks_BL[:, l]) for l, rank in enumerate(ranks(scores))]


def profile_stability(scores: Sequence[float], scores_BL: np.ndarray) -> Estimate:
    """Spearman of the whole sample's layer scores with a draw's: the draws' mean and interval.

    A draw holds 63 % of the samples, so that it errs to the cautious side.
    """
    whole_L = np.asarray(scores, dtype=float)
    correlations_B = spearman(scores_BL.T, np.broadcast_to(whole_L[:, None], scores_BL.T.shape))
    return percentile(mean(correlations_B), correlations_B)


def halves(estimator: GramEstimator, grams: LayerGrams, *, draws: int, seed: int) -> list[float]:
    """Spearman of the layer scores of disjoint random halves of the samples, once a draw."""
    generator = torch.Generator().manual_seed(seed)
    num_val, num_train = next(iter(grams.grams.values())).val_train.shape
    found = []
    with _quiet():
        for _ in range(draws):
            train = torch.randperm(num_train, generator=generator)
            validation = torch.randperm(num_val, generator=generator)
            parts = [grams.select(train[part::2], validation[part::2]) for part in (0, 1)]
            first_L, second_L = (np.array(estimator.score(part).values) for part in parts)
            found.append(float(spearman(first_L[:, None], second_L[:, None])[0]))
    return found


def damping_profiles(
    estimator: GramEstimator, grams: LayerGrams, factors: Sequence[float] = (0.1, 1.0, 10.0)
) -> dict[str, tuple[float, ...]]:
    """Layer scores at multiples of the estimator's own damping; none for one without damping."""
    if not isinstance(estimator, DampedEstimator):
        return {}
    dampings = [estimator.damping * factor for factor in factors]
    with _quiet():
        return {f"damping {damping:g}": replace(estimator, damping=damping).score(grams).values for damping in dampings}


def correlations(profiles: Mapping[str, Sequence[float]]) -> list[Correlation]:
    """Of every pair of profiles."""
    found = []
    for (first, one), (second, other) in combinations(profiles.items(), 2):
        constant = len(set(one)) == 1 or len(set(other)) == 1
        rho, tau = (np.nan, np.nan) if constant else (spearman(_column(one), _column(other))[0], _kendall(one, other))
        found.append(Correlation(first, second, float(rho), float(tau)))
    return found


def _column(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, dtype=float)[:, None]


def _kendall(one: Sequence[float], other: Sequence[float]) -> float:
    return float(kendalltau(one, other)[0])  # type: ignore[arg-type]


@contextmanager
def _quiet() -> Iterator[None]:
    """What the whole sample warned of need not be said again for every draw."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
