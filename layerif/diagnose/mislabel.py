"""Mislabel detection: some training answers are made wrong, and influence should call those rows the most harmful.

The harm of a row is Σ_j I_ji over the validation rows, whose answers stay right. If it is above zero, up-weighting the
row raises the validation loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

import numpy as np
from sklearn.metrics import roc_auc_score

from layerif.data.render import Example
from layerif.data.rows import AnyExample, ChatExample, CompletionExample, TextExample, wrong_options
from layerif.stats import INTERVAL_RESAMPLES, known_mean

_E = TypeVar("_E", bound=AnyExample)


@dataclass(frozen=True)
class Detection:
    """The success of one ranking by harm.

    Attributes:
        found: the share of flipped rows among the F most harmful ones, where F rows were flipped. For a random order
            it is the share of flipped rows among all rows.
        auc: the chance that a flipped row is more harmful than an unflipped one. For a random order it is 0.5.
    """

    found: float
    auc: float


def flip(examples: Sequence[_E], share: float, *, seed: int) -> tuple[list[_E], np.ndarray]:
    """Gives round(share·N) of the examples, but at least one, a wrong answer.

    It is another of their options, or the completion or last message of another row. A text, or token ids, are made
    wrong by another order of words or ids.

    Returns:
        The examples, and an array (N) that is True for those with a wrong answer.

    Raises:
        ValueError: a row has no other option, or all rows would be flipped.
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
        wrong = _wrong(example, examples, chosen)
        if not wrong:
            raise ValueError(
                f"example {example.id} has no other answer that could be made its own; a wrong one needs a task "
                "with at least two options a row, or with answers that differ"
            )
        flipped.append(chosen.choice(wrong) if is_flipped else example)
    return flipped, is_flipped_N


def _wrong(example: _E, examples: Sequence[_E], chosen: Random) -> list[_E]:
    """Gives the example with each of its wrong answers."""
    if isinstance(example, Example):
        return [replace(example, answer=index) for index in wrong_options(example)]
    if isinstance(example, CompletionExample):
        others = dict.fromkeys(each.completion for each in examples if isinstance(each, CompletionExample))
        return [replace(example, completion=each) for each in others if each != example.completion]
    if isinstance(example, ChatExample):
        last = {str(each.messages[-1]): each.messages[-1] for each in examples if isinstance(each, ChatExample)}
        last.pop(str(example.messages[-1]), None)
        return [replace(example, messages=(*example.messages[:-1], each)) for each in last.values()]
    if isinstance(example, TextExample):
        words = example.text.split(" ")
        return [replace(example, text=" ".join(chosen.sample(words, len(words))))] if len(set(words)) > 1 else []
    pairs = list(zip(example.input_ids, example.labels, strict=True))
    ids, labels = zip(*chosen.sample(pairs, len(pairs)), strict=True)
    return [replace(example, input_ids=ids, labels=labels)] if len(set(ids)) > 1 else []


def harm(influence_MN: np.ndarray) -> np.ndarray:
    """Sums I over the validation rows: (N)."""
    return influence_MN.sum(axis=0)


def detection(harm_N: np.ndarray, is_flipped_N: np.ndarray) -> Detection:
    """Measures how well a ranking by harm tells the flipped rows from the others."""
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
    """Draws the mean AUC over trials by a bootstrap over train rows and over validation rows.

    All trials share the rows of a draw. A trial is left out of a draw whose rows are all flipped or all unflipped. The
    draws depend only on the seed and the sizes, so that those of two estimators are paired.

    Args:
        influences: I (M×N) of each trial.
        is_flipped: True for the flipped rows (N), for each trial.
        seed: the seed of the draws.
        resamples: the number of draws.
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
    """Returns the shares of the flipped rows that are among the 0, 1, …, N most harmful ones: (N+1)."""
    ordered = is_flipped_N[np.argsort(-harm_N, kind="stable")]
    return np.concatenate([[0.0], ordered.cumsum() / ordered.sum()])


def _auc(bad_F: np.ndarray, good_G: np.ndarray) -> float:
    """Does the same as `roc_auc_score` without its checks, because it is called thousands of times."""
    good_G = np.sort(good_G)
    below, not_above = np.searchsorted(good_G, bad_F, "left"), np.searchsorted(good_G, bad_F, "right")
    return float((below + not_above).mean() / 2 / len(good_G))
