"""The information that k-means clusters of a block's output have about labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from layerif.checks import Count, check_fields
from layerif.estimators._base import layer_scores
from layerif.estimators._sample_sets import check_sets, over_sets, shuffled_parts
from layerif.evidence import Classes, LayerActivations
from layerif.probe.activations import Activations
from layerif.scores import LayerScores

CLUSTERS_OF_CLASS = 4
_STARTS = 4  # k-means keeps the best one


def mutual_information(first: Sequence[object], second: Sequence[object]) -> float:
    """Gives Σ p(a, b)·ln(p(a, b)/(p(a)·p(b))) of two lists of labels, in nats.

    Two lists that determine each other have their entropy. Frequencies stand for probabilities, so independent labels
    have a little more than 0: about (kinds of the first − 1)·(kinds of the second − 1)/(2·rows).

    Args:
        first: a label for each row.
        second: another label for each row.
    """
    together, num_rows = Counter(zip(first, second, strict=True)), len(first)
    of_first, of_second = Counter(first), Counter(second)
    return sum(
        count / num_rows * math.log(count * num_rows / (of_first[one] * of_second[other]))
        for (one, other), count in together.items()
    )


def clusters(features: Tensor, number: int) -> list[int]:
    """Gives the k-means cluster of each row of standardised features (R×H)."""
    from sklearn.cluster import KMeans  # a second that start-up does not pay

    spread_H = features.std(dim=0, correction=0)
    scaled_RH = (features - features.mean(dim=0)) / torch.where(spread_H > 0, spread_H, 1.0)
    means: Any = KMeans(number, n_init=_STARTS, random_state=0)  # type: ignore[arg-type] - its stub knows a word alone
    return means.fit_predict(scaled_RH.numpy()).tolist()


@dataclass(frozen=True, kw_only=True)
class ClusterInformation:
    """Scores a block by the information (nats) of its clusters about labels; a block that has it is important.

    This is an analysis of representations and was not made for allocation.

    Attributes:
        classes: the rows and their labels, see `linear_probe`.
        clusters: the number of k-means clusters; None: four for each class.
        sets: disjoint sets of samples. A score is the mean over them, with Student's interval where there are several.
    """

    needs = Activations()

    classes: Classes = "truth"
    clusters: Annotated[int, Ge(2)] | None = None
    sets: Count = 3

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        features_LRH, labels, samples = evidence.labelled(self.classes)
        number = self.clusters or CLUSTERS_OF_CLASS * len(set(labels))
        check_sets(samples, self.sets, least_rows=2 * number)
        sets = shuffled_parts(samples, self.sets)
        found = [
            [mutual_information(clusters(rows_RH[rows], number), [labels[row] for row in rows]) for rows in sets]
            for rows_RH in features_LRH
        ]
        values, intervals = over_sets(found)
        return layer_scores(self, evidence, values, "important", intervals=intervals, clusters=number)
