"""Mislabel detection: flip some training answers and see whether influence calls those rows the most harmful.

A row's harm is Σ_j I_ji over the (clean) validation rows: above zero, up-weighting it raises the validation loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from sklearn.metrics import roc_auc_score

from layerif.data.render import Example
from layerif.stats import INTERVAL_RESAMPLES, known_mean


@dataclass(frozen=True)
class Detection:
    """found: the share of the flipped rows among the most harmful ones, as many as were flipped; auc: the chance that
    a flipped row is more harmful than an unflipped one. A random order finds the flipped share, with an AUC of 0.5.
    """

    found: float
    auc: float


def flip(examples: Sequence[Example], share: float, *, seed: int) -> tuple[list[Example], np.ndarray]:
    """The examples with a wrong answer in round(share·N) of them (at least one), and which those are: (N) of bools.

    The wrong answer is one of the example's other options. Raises ValueError where a row has no other option, or where
    nothing or everything would be flipped.
    """
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise ValueError(
            f"method.flipped={share} of {len(examples)} train rows leaves no right answer to tell them from; "
            "flip fewer, or measure more rows (probe.num_train)"
        )
    chosen = Random(f"{seed} flipped")
    is_flipped_N = np.zeros(len(examples), dtype=bool)
    is_flipped_N[chosen.sample(range(len(examples)), count)] = True
    flipped = []
    for example, is_flipped in zip(examples, is_flipped_N, strict=True):
        others = [index for index in range(len(example.options)) if index != example.answer]
        if not others:
            raise ValueError(
                f"example {example.id} has no other option to flip its answer to; method=diagnose needs a task with "
                "at least two options a row"
            )
        flipped.append(replace(example, answer=chosen.choice(others)) if is_flipped else example)
    return flipped, is_flipped_N


def harm(influence_MN: np.ndarray) -> np.ndarray:
    """Σ over validation rows of I: (N)."""
    return influence_MN.sum(axis=0)


def detection(harm_N: np.ndarray, is_flipped_N: np.ndarray) -> Detection:
    count = int(is_flipped_N.sum())
    worst = np.argsort(-harm_N, kind="stable")[:count]
    return Detection(float(is_flipped_N[worst].mean()), float(roc_auc_score(is_flipped_N, harm_N)))


def auc_draws(
    influences: Sequence[np.ndarray],
    is_flipped: Sequence[np.ndarray],
    *,
    seed: int,
    resamples: int = INTERVAL_RESAMPLES,
) -> np.ndarray:
    """The mean AUC over trials under a bootstrap of train and of validation rows, which all trials share: one draw of
    rows for them all. influences: I (M×N) of each trial, is_flipped: (N) of each.

    A trial none (or all) of whose drawn rows are flipped says nothing in that draw. The draws depend on the seed and
    the sizes alone: those of two estimators are paired.
    """
    rng = np.random.default_rng(seed)
    num_val, num_train = influences[0].shape
    train_BN = rng.integers(num_train, size=(resamples, num_train))
    times_BM = rng.multinomial(num_val, np.full(num_val, 1 / num_val), size=resamples)
    draws = np.full((len(influences), resamples), np.nan)
    for trial, (influence_MN, is_flipped_N) in enumerate(zip(influences, is_flipped, strict=True)):
        for number, (harm_N, drawn_N) in enumerate(zip(times_BM @ influence_MN, train_BN, strict=True)):
            is_bad_N = is_flipped_N[drawn_N]
            if is_bad_N.any() and not is_bad_N.all():
                draws[trial, number] = _auc(harm_N[drawn_N[is_bad_N]], harm_N[drawn_N[~is_bad_N]])
    return np.array([known_mean(draw_T) for draw_T in draws.T])


def curve(harm_N: np.ndarray, is_flipped_N: np.ndarray) -> np.ndarray:
    """The share of flipped rows found among the 0, 1, …, N most harmful ones."""
    ordered = is_flipped_N[np.argsort(-harm_N, kind="stable")]
    return np.concatenate([[0.0], ordered.cumsum() / ordered.sum()])


def _auc(bad_F: np.ndarray, good_G: np.ndarray) -> float:
    """As `roc_auc_score`, without its checks: it is called thousands of times."""
    good_G = np.sort(good_G)
    below, not_above = np.searchsorted(good_G, bad_F, "left"), np.searchsorted(good_G, bad_F, "right")
    return float((below + not_above).mean() / 2 / len(good_G))
