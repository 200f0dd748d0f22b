"""Figures of trust in scores: agreement of halves of the samples, and agreement with exact Grams."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from layerif.estimators import Estimator
from layerif.estimators._base import GramEstimator, quiet
from layerif.estimators.lissa import Diverges
from layerif.evidence import CheckpointGrams, LayerGrams, LayerInfluences
from layerif.stats import spearman


def split_half(estimator: Estimator, grams: LayerGrams | CheckpointGrams | LayerInfluences) -> float | None:
    """Compares the scores of two disjoint halves of the samples.

    Returns:
        Spearman's rank correlation; None where a half ranks nothing (all layers are equal) and, with a warning, where
        a fixed step diverges on a half.
    """
    try:
        with quiet():
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
        with quiet():
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
