"""Predicted against actual loss change when training rows are left out: the linear datamodeling score (LDS).

Influence I (M×N) is the change of a validation loss per unit of up-weighting a train sample whose weight is 1/N.
Leaving a row out takes that 1/N away. So influence predicts that leaving out a set R changes the loss of validation
row j by

    Δ_j(R) = −(1/N) Σ_{i in R} I_ji,

which is above zero where R holds helpful rows (I < 0). The LDS (Park et al., 2023) of a validation row is Spearman's
rank correlation of predicted and actual change over the sets, and the LDS as such is its mean over validation rows. It
is 1 where influence orders the sets as retraining does, and 0 where it does no better than chance.

Letters in shape suffixes: S left-out sets, N train rows, M validation rows, E seeds, C columns of
several draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from random import Random

import numpy as np
from torch import Tensor

from layerif.stats import INTERVAL_RESAMPLES, Estimate, known_mean, percentile, spearman

_AT_ONCE = 50  # draws that are ranked together, which takes hardly longer than ranking one


def left_out_sets(num_rows: int, size: int, count: int, *, seed: int) -> list[tuple[int, ...]]:
    """Draws `count` different random sets of `size` of `num_rows` rows, each in ascending order.

    The first sets do not depend on `count`.

    Raises:
        ValueError: there are not so many different sets.
    """
    if not 1 <= size < num_rows:
        raise ValueError(
            f"leaving {size} of {num_rows} training rows out is impossible: between 1 and {num_rows - 1} can be left "
            "out; change method.removed or method.num_train"
        )
    if math.comb(num_rows, size) < count:
        raise ValueError(
            f"method.subsets={count} different sets of {size} of {num_rows} rows do not exist, there are only "
            f"{math.comb(num_rows, size)}; use fewer subsets or more rows (method.num_train)"
        )
    chosen, found = Random(f"{seed} left out"), {}
    while len(found) < count:
        found.setdefault(tuple(sorted(chosen.sample(range(num_rows), size))))
    return list(found)


def membership(sets: Sequence[Sequence[int]], num_rows: int) -> np.ndarray:
    """Marks the rows that each set leaves out: (S×N), 1 where a row is left out and 0 elsewhere."""
    left_out_SN = np.zeros((len(sets), num_rows))
    for number, rows in enumerate(sets):
        left_out_SN[number, list(rows)] = 1
    return left_out_SN


def predicted_change(influence_MN: Tensor, left_out_SN: np.ndarray) -> np.ndarray:
    """Predicts the loss changes: −(1/N) Σ of I over the left-out rows, (S×M)."""
    return -left_out_SN @ influence_MN.double().cpu().numpy().T / left_out_SN.shape[1]


def lds(predicted_SM: np.ndarray, actual_SM: np.ndarray) -> float:
    """Averages Spearman's correlation over sets over the validation rows; NaN where no change was predicted."""
    return known_mean(spearman(predicted_SM, actual_SM))


def lds_draws(
    predicted: Mapping[str, np.ndarray], actual_SM: np.ndarray, *, seed: int, resamples: int = INTERVAL_RESAMPLES
) -> dict[str, np.ndarray]:
    """Draws the LDS of every prediction by a bootstrap over sets and over validation rows.

    The trained seeds are not drawn anew. All predictions see the same draws, so that their differences are paired.
    """
    num_sets, num_val = actual_SM.shape
    rng = np.random.default_rng(seed)
    drawn = [
        np.ix_(rng.integers(num_sets, size=num_sets), rng.integers(num_val, size=num_val)) for _ in range(resamples)
    ]
    draws: dict[str, list[float]] = {name: [] for name in predicted}
    for start in range(0, resamples, _AT_ONCE):
        some = drawn[start : start + _AT_ONCE]
        actual_SC = np.hstack([actual_SM[each] for each in some])
        for name, predicted_SM in predicted.items():
            found_C = spearman(np.hstack([predicted_SM[each] for each in some]), actual_SC)
            draws[name] += map(known_mean, found_C.reshape(len(some), num_val))
    return {name: np.array(values) for name, values in draws.items()}


def lds_estimates(
    predicted: Mapping[str, np.ndarray], actual_SM: np.ndarray, *, than: Sequence[str] = (), seed: int
) -> tuple[dict[str, Estimate], dict[str, dict[str, Estimate]]]:
    """Returns the LDS of every prediction with its interval, and its excess over each prediction in `than`."""
    draws = lds_draws(predicted, actual_SM, seed=seed)
    values = {name: lds(predicted_SM, actual_SM) for name, predicted_SM in predicted.items()}
    return (
        {name: percentile(values[name], draws[name]) for name in predicted},
        {
            rival: {name: percentile(values[name] - values[rival], draws[name] - draws[rival]) for name in predicted}
            for rival in than
        },
    )


def most_helpful(influence_MN: Tensor, size: int) -> tuple[int, ...]:
    """Returns the `size` train rows of the most negative influence on all validation rows together, ascending."""
    order = influence_MN.sum(dim=0).argsort(stable=True)
    return tuple(sorted(order[:size].tolist()))


def beyond_random(removed_M: np.ndarray, random_SM: np.ndarray, *, seed: int) -> Estimate:
    """Compares the mean loss change without some chosen rows with that without random sets of as many rows.

    Args:
        removed_M: the change of each validation row's loss without the chosen rows.
        random_SM: the same without each random set.
        seed: of the bootstrap over validation rows and over sets.

    Returns:
        The excess in nats.
    """
    (num_sets, num_val), rng = random_SM.shape, np.random.default_rng(seed)
    draws = []
    for _ in range(INTERVAL_RESAMPLES):
        sets, rows = rng.integers(num_sets, size=num_sets), rng.integers(num_val, size=num_val)
        draws.append(removed_M[rows].mean() - random_SM[np.ix_(sets, rows)].mean())
    return percentile(float(removed_M.mean() - random_SM.mean()), np.array(draws))


def seed_agreement(actual_ESM: np.ndarray) -> float:
    """Averages the LDS between the actual changes of two seeds over all pairs of seeds; NaN for a single seed.

    It tells how reliable the changes of one seed are. Predictions are compared with the mean over seeds, which is more
    reliable, so their LDS may be higher.
    """
    pairs = combinations(actual_ESM, 2)
    return known_mean(np.array([lds(first_SM, second_SM) for first_SM, second_SM in pairs]))


def noise(actual_ESM: np.ndarray, full_EM: np.ndarray) -> tuple[float, float]:
    """Compares the effect of the rows left out with that of the seed.

    Where the second figure is not well below the first, another seed moves a loss as much as other rows do.

    Returns:
        The standard deviation of the loss change over sets, and that of the loss of the full training over seeds, each
        as a mean over validation rows, in nats.
    """
    over_sets = float(actual_ESM.std(axis=1, ddof=1).mean())
    over_seeds = float(full_EM.std(axis=0, ddof=1).mean()) if len(full_EM) > 1 else math.nan
    return over_sets, over_seeds
