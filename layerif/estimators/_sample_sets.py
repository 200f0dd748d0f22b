"""A figure on several disjoint sets of samples, and the interval of its mean over them.

Letters in shape suffixes: L layers, S sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layerif.stats import t_interval


def shuffled_parts(samples: Sequence[int], parts: int) -> list[Tensor]:
    """Deals the samples out to parts of nearly equal size, in a fixed random order.

    Args:
        samples: the sample that each row belongs to.
        parts: the number of parts.

    Returns:
        The rows of each part, ascending. All rows of a sample are in one part.
    """
    known = sorted(set(samples))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    part_of = {known[sample]: place % parts for place, sample in enumerate(order)}
    parts_R = torch.tensor([part_of[sample] for sample in samples])
    return [(parts_R == part).nonzero()[:, 0] for part in range(parts)]


def check_sets(samples: Sequence[int], sets: int, *, least_rows: int) -> None:
    """Refuses sets of fewer rows than a figure needs.

    Args:
        samples: the sample that each row belongs to.
        sets: the number of sets.
        least_rows: the rows that a set needs.

    Raises:
        ValueError: says how many samples there are in a set, and how many are needed.
    """
    num_samples = len(set(samples))
    least = math.ceil(least_rows * num_samples / len(samples))
    if num_samples // sets < least:
        raise ValueError(
            f"estimator.sets={sets} of {num_samples} samples have {num_samples // sets} samples each, and {least} are "
            "needed; raise probe.num_train, or lower estimator.sets"
        )


def over_sets(values_LS: Sequence[Sequence[float]]) -> tuple[list[float], tuple[tuple[float, float], ...] | None]:
    """Gives the mean over the sets for each layer, at least 0, and Student's 95 % interval of it.

    Args:
        values_LS: the figure of each layer on each set.

    Returns:
        The means (L) and the intervals (L); None in place of the intervals where there is one set.
    """
    means = [max(0.0, float(np.mean(values_S))) for values_S in values_LS]
    if len(values_LS[0]) < 2:
        return means, None
    return means, tuple(_interval(values_S) for values_S in values_LS)


def _interval(values_S: Sequence[float]) -> tuple[float, float]:
    low, high = t_interval(values_S)
    return (values_S[0], values_S[0]) if math.isnan(low) else (low, high)  # all sets agree
