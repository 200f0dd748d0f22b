"""Gain curves: the predicted fall of the loss by ranks, or experts, of an adapter, and the parameters that these take.

Letters in shape suffixes: U units, K levels, R directions of a matrix, H the two halves of the samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerif.allocate._counts import Counted, concave_majorant, sizes_of_levels
from layerif.allocate._hulls import interpolated
from layerif.allocate.curves import Curves
from layerif.layers import LayerMap

MOST_RANK = 128  # directions of a matrix, unless the user wants another number
MOST_EXPERTS = 16  # unless a matrix has directions for more


def gain_curves(
    layers: LayerMap,
    gains: Sequence[Tensor] | None,
    *,
    kind: Counted = "rank",
    expert_rank: int = 8,
    most_rank: int | None = None,
    source: Mapping[str, str] | None = None,
    fingerprint: str = "none",
) -> Curves:
    """Makes the concave curves of matrices out of the gains of their directions.

    Args:
        layers: the matrices with their shapes.
        gains: of each direction of each matrix, in the order in which directions are taken, as each half of the samples
            adds to them (2×R); None: every parameter gains the same, to try a request.
        kind: the meaning of a level. E experts of rank r are given what rank r·E gains, which is an upper bound.
        expert_rank: the rank of an expert.
        most_rank: the directions of a matrix; None: as many as its rank, and 128 at most.
        source: see `Curves`.
        fingerprint: of the measurement.
    """
    assert layers.matrix_shapes is not None
    shapes = layers.matrix_shapes
    most = [min(*shape, most_rank or MOST_RANK) for shape in shapes]
    top = max(most) if kind == "rank" else max(max(most) // expert_rank, MOST_EXPERTS)
    levels, step = tuple(range(top + 1)), 1 if kind == "rank" else expert_rank
    sizes_UK = sizes_of_levels(kind, shapes, levels, expert_rank)

    def at_levels(gains_R: Tensor) -> list[float]:
        curve = concave_majorant(gains_R.tolist())
        return [interpolated(range(len(curve)), curve, level * step) for level in levels]

    by_half = None
    if gains is None:
        costs_UK = sizes_UK / sizes_UK[:, -1].sum()
    else:
        costs_UK = torch.tensor([at_levels(each_HR.sum(0)) for each_HR in gains], dtype=torch.float64)
        halves = [[at_levels(2 * each_HR[half]) for each_HR in gains] for half in (0, 1)]
        by_half = torch.tensor(halves, dtype=torch.float64) / 2
    return Curves(
        tuple(param.removesuffix(".weight") for param in layers.matrices),
        tuple(map(float, levels)),
        costs_UK,
        sizes_UK,
        kind=kind,
        sense="gain",
        source=source or {},
        fingerprint=fingerprint,
        is_stepped=True,
        by_half=by_half,
        most=tuple(map(float, most)) if kind == "rank" else None,
    )
