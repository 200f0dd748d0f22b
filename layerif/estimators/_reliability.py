"""Figures of trust in scores: agreement of halves of the samples, agreement with exact Grams, intervals of ranks.

Letters in shape suffixes: B bootstrap draws, L layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from layerif.estimators import Estimator
from layerif.estimators._base import GramEstimator
from layerif.estimators.lissa import Diverges
from layerif.evidence import CheckpointGrams, LayerCurvature, LayerGrams
from layerif.progress import progress
from layerif.stats import Estimate, percentile, spearman


def split_half(estimator: Estimator, grams: LayerGrams | CheckpointGrams | LayerCurvature) -> float | None:
    """Compares the scores of two disjoint halves of the samples.

    Returns:
        Spearman's rank correlation; None where a half ranks nothing (all layers are equal) and, with a warning, where
        a fixed step diverges on a half.
    """
    try:
        with unwarned():  # zero gradients were named when the whole was scored
            first, second = (estimator.score(half).values for half in grams.halves)
    except Diverges as error:
        warnings.warn(f"no reliability: on a half of the samples {error}", RuntimeWarning, stacklevel=2)
        return None
    return known_spearman(first, second)


def fidelity_of(estimator: Estimator, grams: LayerGrams, reference: LayerGrams) -> dict[str, float]:
    """Compares scores and influences with those on exact Grams of the same samples.

    Returns:
        Spearman's rank correlation of the layer `scores` and, for an estimator that takes influence from Grams, of
        the entries of each matrix's influence (`influences`, a mean over the matrices). Empty, with a warning, where a
        fixed step diverges on these Grams.
    """
    try:
        with unwarned():  # warnings would concern fewer samples than the scores do
            found = {"scores": known_spearman(estimator.score(grams).values, estimator.score(reference).values)}
            if isinstance(estimator, GramEstimator):
                solvable = [estimator.solvable(each) for each in (grams, reference)]
                ours, theirs = (estimator.influences(each.grams) for each in solvable)
                each = [known_spearman(ours[name].flatten(), theirs[name].flatten()) for name in ours]
                ranked = [value for value in each if value is not None]
                found["influences"] = sum(ranked) / len(ranked) if ranked else None
    except Diverges as error:
        warnings.warn(f"no fidelity: on the samples of the comparison {error}", RuntimeWarning, stacklevel=2)
        return {}
    return {name: value for name, value in found.items() if value is not None}


def known_spearman(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> float | None:
    """Gives Spearman's rank correlation as a record holds it: None where a side is constant and so ranks nothing."""
    found = spearman(first, second)
    return None if math.isnan(found) else found


def ranks(scores: Sequence[float]) -> np.ndarray:
    """Returns the rank of each layer (L), 1 for the highest score; equal scores share their mean rank."""
    from scipy.stats import rankdata  # it takes half a second, which start-up should not pay

    return rankdata(-np.asarray(scores, dtype=float))


def bootstrap_scores(estimator: GramEstimator, grams: LayerGrams, *, resamples: int, seed: int) -> np.ndarray:
    """Returns the layer scores (B×L) under `resamples` bootstrap draws of train and of validation samples.

    A draw selects rows and columns of the Grams, so that no gradient is computed again.
    """
    generator = torch.Generator().manual_seed(seed)
    num_val, num_train = next(iter(grams.grams.values())).val_train.shape
    scores = []
    with unwarned():
        for _ in progress(range(resamples), "bootstrap of the layers' ranks"):
            train = torch.randint(num_train, (num_train,), generator=generator)
            validation = torch.randint(num_val, (num_val,), generator=generator)
            scores.append(estimator.score(grams.select(train, validation)).values)
    return np.array(scores)


def rank_intervals(scores: Sequence[float], scores_BL: np.ndarray) -> list[Estimate]:
    """Returns each layer's rank with the interval that holds it in 95 % of the draws.

    Each interval is for a single layer. That all layers stay within theirs at once is less likely.
    """
    ranks_BL = np.stack([ranks(draw_L) for draw_L in scores_BL])
    return [percentile(float(rank), ranks_BL[:, l]) for l, rank in enumerate(ranks(scores))]


@contextmanager
def unwarned() -> Iterator[None]:
    """Silences the warnings of estimators, where they were given for the whole sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
