"""The sections of the report: each puts one question to the Grams or the retrainings and answers it in figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor, nn

from layerif.data.batches import padding_id
from layerif.decide import Decider
from layerif.diagnose.agreement import agreement, curvature_panel, total_influence
from layerif.diagnose.controls import bm25, hidden_cosine, pooled
from layerif.diagnose.convex import convex_check
from layerif.diagnose.gradients import gradient_health
from layerif.diagnose.leave_out import (
    beyond_random,
    lds,
    lds_estimates,
    membership,
    most_helpful,
    noise,
    predicted_change,
    seed_agreement,
)
from layerif.diagnose.mislabel import auc_draws, curve, detection, flip, harm
from layerif.diagnose.retrainings import Retrainings
from layerif.diagnose.solver import Solved, solver_residuals
from layerif.diagnose.stability import damping_profiles, halves, profile_correlations, stepped_up
from layerif.estimators._base import DampedEstimator, GramEstimator, name_of
from layerif.estimators._reliability import bootstrap_scores, rank_intervals, unwarned
from layerif.evidence import LayerGrams
from layerif.probe.curvature.request import Curvature
from layerif.probe.grams.request import Grams
from layerif.stats import known_mean, percentile

Panel = Mapping[str, GramEstimator]  # the user's own comes first
# Beside the user's own, the predictions whose most helpful rows are removed.
_REMOVED = ("datainf", "grad_dot", "ekfac", "shampoo", "bm25", "hidden_cosine")


def instrument() -> dict[str, Any]:
    """Checks influence on a convex model, where theory is exact."""
    found = convex_check()
    predicted = {name: change_SM.mean(axis=1) for name, change_SM in found.predicted.items()}
    return {"lds": found.lds, "actual": found.actual_SM.mean(axis=1), "predicted": predicted}


def solver(estimators: Panel, grams: LayerGrams) -> dict[str, Any]:
    """Summarises how well the damped estimators solve their systems, and keeps the figures of every matrix."""
    with unwarned():
        found = {
            name: solver_residuals(estimator, grams)
            for name, estimator in estimators.items()
            if isinstance(estimator, DampedEstimator)
        }
    return {"estimators": {name: _summary(each) for name, each in found.items() if each}, "matrices": found}


def _summary(matrices: list[Solved]) -> dict[str, Any]:
    residuals, off = [each.residual for each in matrices], [each.off for each in matrices]
    steps = [each.step for each in matrices if each.step is not None]
    return {
        "residual_median": median(residuals),
        "residual_max": max(residuals),
        "off_median": median(off),
        "off_max": max(off),
        "worst": max(matrices, key=lambda each: each.off).matrix,
        "condition_max": max(each.condition for each in matrices),
        "rounding_max": max(each.rounding for each in matrices),
        "step": [min(steps), max(steps)] if steps else None,
    }


def agreements(estimators: Panel, grams: LayerGrams) -> dict[str, Any]:
    """Compares the layer rankings of all estimators."""
    with unwarned():
        names, matrix = agreement(estimators, grams)
    return {"names": names, "spearman": matrix}


def stability(
    own: GramEstimator, grams: LayerGrams, at_adapters: Mapping[int, LayerGrams], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Tests if the layers keep their ranks under other samples, other dampings and the seeds of the adapters.

    Args:
        own: the user's estimator.
        grams: the Grams that the scores were taken from.
        at_adapters: the Grams at the adapter of each seed.
        resamples: bootstrap draws behind the layers' ranks.
        seed: the seed of the draws and of the splits into halves.
    """
    with unwarned():
        scores = own.score(grams).values
        by_seed = {f"seed {number}": own.score(found).values for number, found in at_adapters.items()}
    draws_BL = bootstrap_scores(own, grams, resamples=resamples, seed=seed)
    splits, half = halves(own, grams, draws=20, seed=seed)
    return {
        "scores": scores,
        "ranks": rank_intervals(scores, draws_BL),
        "samples": stepped_up(half),
        "half": half,
        "halves": splits,
        "damping": profile_correlations(damping_profiles(own, grams)),
        "seeds": profile_correlations(by_seed),
    }


def mislabel(
    estimators: Panel, decider: Decider, model: Callable[[], nn.Module], *, share: float, trials: int
) -> dict[str, Any]:
    """Makes a share of the answers wrong and tests if each estimator finds them.

    Args:
        estimators: the user's own first; it also gives the figures of single layers.
        decider: chooses the rows and measures them.
        model: loads the model.
        share: the share of the answers made wrong.
        trials: the number of times, each with its own wrong answers.
    """
    chosen = decider.chosen("train")
    is_flipped: list[np.ndarray] = []
    influences: dict[str, list[np.ndarray]] = {name: [] for name in estimators}
    by_layer: dict[str, list[float]] = {}
    for trial in range(trials):
        examples, is_flipped_N = flip(chosen, share, seed=decider.seed + trial)
        grams, _ = Grams().take(replace(decider, splits=replace(decider.splits, train=tuple(examples))), model)
        is_flipped.append(is_flipped_N)
        with unwarned():
            for name, estimator in estimators.items():
                influences[name].append(_array(total_influence(estimator, grams)))
            for layer, influence_MN in next(iter(estimators.values())).by_layer(grams).items():
                by_layer.setdefault(layer, []).append(detection(harm(_array(influence_MN)), is_flipped_N).auc)
    draws = {name: auc_draws(found, is_flipped, seed=decider.seed) for name, found in influences.items()}
    found: dict[str, dict[str, Any]] = {}
    for name in estimators:
        pairs = list(zip(map(harm, influences[name]), is_flipped, strict=True))
        detected = [detection(*pair) for pair in pairs]
        found[name] = {
            "found": float(np.mean([each.found for each in detected])),
            "auc": percentile(float(np.mean([each.auc for each in detected])), draws[name]),
            "trials": detected,
            "curve": np.mean([curve(*pair) for pair in pairs], axis=0),
        }
    for name, figures in found.items():
        gain = figures["auc"].value - found["grad_dot"]["auc"].value
        figures["beyond_grad_dot"] = percentile(gain, draws[name] - draws["grad_dot"])
    num_flipped = int(is_flipped[0].sum())
    return {
        "num_trials": trials,
        "num_train": len(chosen),
        "num_flipped": num_flipped,
        "random": {"found": num_flipped / len(chosen), "auc": 0.5},
        "estimators": found,
        "auc_by_layer": {layer: float(np.mean(aucs)) for layer, aucs in by_layer.items()},
    }


def controls(retrainings: Retrainings) -> dict[str, Tensor]:
    """Gives minus the resemblance of rows (M×N), which stands for an influence that needs no gradient."""
    decider, (train, validation) = retrainings.decider, retrainings.decider.samples()
    texts = [
        [decider.tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in part]
        for part in (train, validation)
    ]
    model, pad_id = retrainings.model(), padding_id(decider.tokenizer)
    states = [pooled(model, part, decider.probe.batch_size, pad_id) for part in (train, validation)]
    return {"bm25": -bm25(*texts), "hidden_cosine": -hidden_cosine(*states)}


def leave_out(estimators: Panel, retrainings: Retrainings) -> dict[str, Any]:
    """Compares predicted with actual loss changes when rows are left out.

    EK-FAC, Shampoo and controls without gradients stand beside the estimators on Grams. The headline figures compare
    means over seeds, because a single training also holds the noise of its seed.
    """
    train, validation = retrainings.decider.samples()
    seed, num_train = retrainings.decider.seed, len(train)
    untrained_M, full_EM, left_out_ESM = retrainings.losses()
    actual_ESM = left_out_ESM - full_EM[:, None]
    actual_SM = actual_ESM.mean(axis=0)
    adapters = list(retrainings.grams().values())
    by_curvature = curvature_panel(next(iter(estimators.values())))
    curvatures = retrainings.curvatures(Curvature(("ekfac", "shampoo"), "each"))
    with unwarned():
        influences = {
            name: [total_influence(estimator, each) for each in adapters] for name, estimator in estimators.items()
        }
        influences |= {
            name: [reduce(add, estimator.influences(each).values()) for each in curvatures]
            for name, estimator in by_curvature.items()
        }
    influences |= {name: [influence_MN] * len(adapters) for name, influence_MN in controls(retrainings).items()}
    left_out_SN = membership(retrainings.sets, num_train)
    predicted = {
        name: np.stack([predicted_change(influence_MN, left_out_SN) for influence_MN in each])
        for name, each in influences.items()
    }
    means = {name: change_ESM.mean(axis=0) for name, change_ESM in predicted.items()}
    scores, beyond = lds_estimates(means, actual_SM, than=("grad_dot", "bm25"), seed=seed)
    of_mean, _ = lds_estimates(
        {name: change_SM.mean(axis=1, keepdims=True) for name, change_SM in means.items()},
        actual_SM.mean(axis=1, keepdims=True),
        seed=seed,
    )
    over_sets, over_seeds = noise(actual_ESM, full_EM)
    return {
        "num_seeds": len(full_EM),
        "num_subsets": len(retrainings.sets),
        "num_train": num_train,
        "num_validation": len(validation),
        "left_out": len(retrainings.sets[0]),
        "loss": {"untrained": known_mean(untrained_M), "trained": full_EM.mean(axis=1)},
        "lds": scores,
        "lds_of_mean": of_mean,
        "beyond_grad_dot": beyond["grad_dot"],
        "beyond_bm25": beyond["bm25"],
        "lds_by_seed": {name: [*map(lds, predicted[name], actual_ESM)] for name in predicted},
        "damping": {name: estimator.damping for name, estimator in by_curvature.items()},
        "removed": removed(influences, retrainings, full_EM, actual_SM, own=next(iter(estimators))),
        "seed_agreement": seed_agreement(actual_ESM),
        "sd_over_sets": over_sets,
        "sd_over_seeds": over_seeds,
        "common": [gradient_health(each).common for each in adapters],
        "actual": actual_SM.mean(axis=1),
        "predicted": {name: change_SM.mean(axis=1) for name, change_SM in means.items()},
    }


def num_chosen_sets(own: GramEstimator) -> int:
    """Counts the predictions whose most helpful rows are removed."""
    return len({name_of(own), *_REMOVED})


def removed(
    influences: Mapping[str, Sequence[Tensor]],
    retrainings: Retrainings,
    full_EM: np.ndarray,
    random_SM: np.ndarray,
    *,
    own: str,
) -> dict[str, Any]:
    """Trains once more without the rows that each prediction calls the most helpful, as many as in a random set.

    Args:
        influences: I (M×N) of each seed's adapter, by the prediction.
        retrainings: trains.
        full_EM: the losses after training on all rows.
        random_SM: the change of the losses without each random set, as a mean over seeds.
        own: the user's estimator.
    """
    found, size = {}, len(retrainings.sets[0])
    for name in dict.fromkeys((own, *_REMOVED)):
        rows = most_helpful(sum(influences[name][1:], influences[name][0]), size)
        change_M = (retrainings.without(rows) - full_EM).mean(axis=0)
        found[name] = {
            "rows": [retrainings.decider.chosen("train")[row].id for row in rows],
            "change": change_M.mean(),
            "beyond_random": beyond_random(change_M, random_SM, seed=retrainings.decider.seed),
            "above": int((change_M.mean() > random_SM.mean(axis=1)).sum()),
        }
    return {"size": size, "random": random_SM.mean(), "by": found}


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
