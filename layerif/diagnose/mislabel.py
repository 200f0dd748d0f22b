"""Mislabel detection: flip some training answers and see whether influence calls those rows the most harmful.

A row's harm is Σ_j I_ji over the (clean) validation rows: above zero, up-weighting it raises the validation loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from sklearn.metrics import roc_auc_score
from torch import Tensor

from layerif.data.task import Example
from layerif.diagnose.estimate import RESAMPLES


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


def harm(influence_MN: Tensor) -> np.ndarray:
    """Σ over validation rows of I: (N)."""
    return influence_MN.double().sum(dim=0).cpu().numpy()


def detection(harm_N: np.ndarray, is_flipped_N: np.ndarray) -> Detection:
    count = int(is_flipped_N.sum())
    worst = np.argsort(-harm_N, kind="stable")[:count]
    return Detection(float(is_flipped_N[worst].mean()), float(roc_auc_score(is_flipped_N, harm_N)))


def auc_draws(
    harms: Sequence[np.ndarray], is_flipped: Sequence[np.ndarray], *, seed: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """The mean AUC over trials under a bootstrap of the flipped and of the unflipped rows of each, apart.

    The draws depend on the seed and on which rows are flipped alone: those of two estimators are paired.
    """
    rng = np.random.default_rng(seed)
    draws = np.zeros(resamples)
    for harm_N, is_flipped_N in zip(harms, is_flipped, strict=True):
        kinds = [np.flatnonzero(is_flipped_N), np.flatnonzero(~is_flipped_N)]
        for number in range(resamples):
            bad_F, good_G = (harm_N[rng.choice(kind, len(kind))] for kind in kinds)
            draws[number] += _auc(bad_F, good_G)
    return draws / len(harms)


def curve(harm_N: np.ndarray, is_flipped_N: np.ndarray) -> np.ndarray:
    """The share of flipped rows found among the 0, 1, …, N most harmful ones."""
    ordered = is_flipped_N[np.argsort(-harm_N, kind="stable")]
    return np.concatenate([[0.0], ordered.cumsum() / ordered.sum()])


def _auc(bad_F: np.ndarray, good_G: np.ndarray) -> float:
    """As `roc_auc_score`, without its checks: it is called thousands of times."""
    good_G = np.sort(good_G)
    below, not_above = np.searchsorted(good_G, bad_F, "left"), np.searchsorted(good_G, bad_F, "right")
    return float((below + not_above).mean() / 2 / len(good_G))
