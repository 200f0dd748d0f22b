"""Hierarchical clustering of layer profiles by their rank correlation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerif.stats import spearman_matrix

FEWEST_PROFILES = 3  # profiles: two always join


@dataclass(frozen=True)
class Tree:
    """The order in which profiles join.

    Attributes:
        names: of the profiles, by alphabet.
        joins: SciPy's linkage matrix over `names`.
        leaves: the places in `names`, from one end of the dendrogram to the other.
    """

    names: tuple[str, ...]
    joins: np.ndarray
    leaves: tuple[int, ...]

    def closest(self) -> tuple[str, str, float]:
        """Gives the two profiles that join first, and their rank correlation."""
        first, second, distance, _ = self.joins[0]
        return self.names[int(first)], self.names[int(second)], 1 - float(distance)


def tree(profiles: Mapping[str, Sequence[float]]) -> Tree:
    """Joins profiles by average linkage of the distances 1 − Spearman's rank correlation.

    The result does not depend on the order of the profiles, and neighbours in the dendrogram are as alike as its tree
    permits.

    Args:
        profiles: the scores of the same layers by name, none of them constant; at least two.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    names = tuple(sorted(profiles))
    distances = 1 - spearman_matrix(np.array([profiles[name] for name in names], dtype=float).T)
    # Rounding would order profiles that are equally far apart.
    rounded = np.clip((distances + distances.T) / 2, 0, 2).round(12)
    np.fill_diagonal(rounded, 0)
    joins = linkage(squareform(rounded), method="average", optimal_ordering=True)
    return Tree(names, joins, tuple(map(int, leaves_list(joins))))
