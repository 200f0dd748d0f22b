"""The stability of the layers' ranks when samples, damping or the fitted model change. Rank 1 is the highest score.

Letters in shape suffixes: B bootstrap draws, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from scipy.stats import kendalltau, t

from layerif.estimators._base import DampedEstimator, GramEstimator
from layerif.estimators._reliability import unwarned
from layerif.evidence import LayerGrams
from layerif.progress import progress
from layerif.stats import LEVEL, UNDETERMINED, Estimate, known_mean, spearman

_GROUPS = 10  # the jackknife leaves out one group of samples at a time


@dataclass(frozen=True)
class Correlation:
    """The rank correlations of two profiles of the same layers; NaN where all layers of a profile score alike."""

    first: str
    second: str
    spearman: float
    kendall: float


def halves(estimator: GramEstimator, grams: LayerGrams, *, draws: int, seed: int) -> tuple[np.ndarray, Estimate]:
    """Correlates the layer scores of disjoint random halves of the samples.

    The spread over splits of the same samples is not a sampling error. So the interval is Student's, over a jackknife
    that leaves out one of G groups of samples at a time and keeps the splits (delete-a-group; Shao and Tu, 1995). Its
    standard error is √((G−1)/G · Σ (mean without g − their mean)²). It is cut off at −1 and 1.

    Returns:
        Spearman's correlation for each of the `draws` splits, and their mean with its interval.
    """
    generator = torch.Generator().manual_seed(seed)
    num_val, num_train = next(iter(grams.grams.values())).val_train.shape
    splits = [[torch.randperm(num, generator=generator) for num in (num_train, num_val)] for _ in range(draws)]
    num_groups = min(_GROUPS, max(num_train, num_val))  # with few samples, each is a group of its own
    groups = [torch.randperm(num, generator=generator) % num_groups for num in (num_train, num_val)]
    with unwarned():
        found = np.array([_half_agreement(estimator, grams, split) for split in splits])
        without = []
        for group in progress(range(num_groups), "jackknife of the halves"):
            kept = [of_sample != group for of_sample in groups]
            without.append(known_mean(np.array([_half_agreement(estimator, grams, split, kept) for split in splits])))
    error = np.sqrt((num_groups - 1) * np.var(without)) * t.ppf((1 + LEVEL) / 2, num_groups - 1)
    value = known_mean(found)
    if np.isnan(value + error):
        return found, UNDETERMINED
    return found, Estimate(value, max(-1.0, value - float(error)), min(1.0, value + float(error)))


def _half_agreement(
    estimator: GramEstimator,
    grams: LayerGrams,
    split: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor] | None = None,
) -> float:
    """Correlates the layer scores of the two halves of one split.

    Args:
        estimator: gives the scores.
        grams: the Grams of all samples.
        split: an order of the train samples and one of the validation samples; every other sample is in the first half.
        kept: True for the train samples (N) and the validation samples (M) that take part; None: all.
    """
    scores = []
    for part in (0, 1):
        rows = [order[part::2] for order in split]
        if kept is not None:
            rows = [row[is_kept[row]] for row, is_kept in zip(rows, kept, strict=True)]
        scores.append(estimator.score(grams.select(*rows)).values)
    return spearman(*scores)


def stepped_up(half: Estimate) -> Estimate:
    """Estimates the agreement of two samples as large as the whole from that of halves, by 2r/(1 + r).

    The formula of Spearman and Brown is exact for Pearson's correlation of scores that are sums over samples, and a
    rule of thumb for ranks. A correlation that is not above zero stays as it is.
    """
    return Estimate(*(2 * r / (1 + r) if r > 0 else r for r in (half.value, half.low, half.high)))


def damping_profiles(
    estimator: GramEstimator, grams: LayerGrams, factors: Sequence[float] = (0.1, 1.0, 10.0)
) -> dict[str, tuple[float, ...]]:
    """Returns the layer scores at multiples of the estimator's own damping; empty for an estimator without damping."""
    if not isinstance(estimator, DampedEstimator):
        return {}
    dampings = [estimator.damping * factor for factor in factors]
    with unwarned():
        return {f"damping {damping:g}": replace(estimator, damping=damping).score(grams).values for damping in dampings}


def profile_correlations(profiles: Mapping[str, Sequence[float]]) -> list[Correlation]:
    """Correlates every two profiles."""
    found = []
    for (first, one), (second, other) in combinations(profiles.items(), 2):
        constant = len(set(one)) == 1 or len(set(other)) == 1
        rho, tau = (np.nan, np.nan) if constant else (spearman(one, other), _kendall(one, other))
        found.append(Correlation(first, second, float(rho), float(tau)))
    return found


def _kendall(one: Sequence[float], other: Sequence[float]) -> float:
    return float(kendalltau(one, other)[0])  # type: ignore[arg-type]
