"""All estimators that work on Grams, and the agreement of their layer rankings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from functools import reduce
from operator import add
from typing import get_args

import numpy as np
from torch import Tensor

import layerif.estimators
from layerif.estimators._base import DampedEstimator, GramEstimator, name_of
from layerif.estimators._curvature import CurvatureEstimator
from layerif.estimators.ekfac import Ekfac
from layerif.estimators.shampoo import Shampoo
from layerif.evidence import LEAST_DAMPING, MOST_DAMPING, LayerGrams
from layerif.probe.grams.request import Grams
from layerif.scores import Aggregation
from layerif.stats import spearman_matrix


def panel(own: GramEstimator) -> dict[str, GramEstimator]:
    """Collects the estimators on Grams in `layerif/estimators/`, each under the name of its file.

    Args:
        own: the user's estimator. It comes first and keeps its settings; the others take its aggregation, granularity,
            normalisation and, where they have one, its damping.
    """
    shared = {field.name: getattr(own, field.name) for field in fields(GramEstimator)}
    damping = {"damping": own.damping, "damping_rule": own.damping_rule} if isinstance(own, DampedEstimator) else {}
    found: dict[str, GramEstimator] = {name_of(own): own}
    for module in pkgutil.iter_modules(layerif.estimators.__path__):
        imported = importlib.import_module(f"layerif.estimators.{module.name}")
        for _, cls in inspect.getmembers(imported, inspect.isclass):
            if cls.__module__ == imported.__name__ and issubclass(cls, GramEstimator) and _stands_alone(cls):
                settings = shared | (damping if issubclass(cls, DampedEstimator) else {})
                found.setdefault(module.name, cls(**settings))
    return found


def curvature_panel(own: GramEstimator) -> dict[str, CurvatureEstimator]:
    """Gives EK-FAC and Shampoo at the user's relative damping, or at their own where it is not measured for them."""
    is_relative = isinstance(own, DampedEstimator) and own.damping_rule == "relative"
    if isinstance(own, DampedEstimator) and is_relative and LEAST_DAMPING <= own.damping <= MOST_DAMPING:
        return {"ekfac": Ekfac(damping=own.damping), "shampoo": Shampoo(damping=own.damping)}
    return {"ekfac": Ekfac(), "shampoo": Shampoo()}


def total_influence(estimator: GramEstimator, grams: LayerGrams) -> Tensor:
    """Sums I (M×N) over all matrices of all layers."""
    return reduce(add, estimator.influences(estimator.solvable(grams).grams).values())


def agreement(estimators: Mapping[str, GramEstimator], grams: LayerGrams) -> tuple[list[str], np.ndarray]:
    """Correlates the layer scores of every estimator under every aggregation.

    Returns:
        The names, each an estimator followed by an aggregation, and the matrix of Spearman correlations in that order.
        A correlation is NaN where all layers score alike.
    """
    scores: dict[str, tuple[float, ...]] = {}
    for name, estimator in estimators.items():
        for how in get_args(Aggregation):
            scores[f"{name} {how}"] = replace(estimator, aggregation=how).score(grams).values
    values_LC = np.array(list(scores.values())).T
    return list(scores), spearman_matrix(values_LC)


def _stands_alone(cls: type[GramEstimator]) -> bool:
    """Returns True for a concrete estimator that needs only Grams and has a default for every setting."""
    required = [field for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]
    return cls.needs == Grams() and not required and cls not in (GramEstimator, DampedEstimator)
