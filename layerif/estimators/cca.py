"""Projection-weighted canonical correlation (PWCCA, Morcos et al., NeurIPS 2018) of block outputs, on held-out rows.

Letters: R rows (samples), H and K columns of the two views, C canonical directions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.checks import Count, NonNegative, check_fields, did_you_mean
from layerif.estimators._base import layer_scores
from layerif.estimators._sample_sets import check_sets, over_sets, shuffled_parts
from layerif.evidence import Classes, LayerActivations
from layerif.probe.activations import Activations
from layerif.scores import LayerScores

REGULARISERS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5  # one fold chooses the regulariser, another one is reported, and directions come from the rest

View = tuple[Tensor, Tensor]


def pwcca(first: Tensor, second: Tensor, *, regulariser: float = 0.0, held_out: View | None = None) -> float:
    """Gives Σ_c a_c ρ_c / Σ_c a_c with a_c = Σ_j |⟨h_c, x_j⟩|, the mean canonical correlation of two views.

    Each correlation ρ_c is weighted by the part of the first view's columns x_j that its direction h_c accounts for.
    Columns are centred. λ = regulariser · (the mean variance of a view's principal directions) is added to the
    variances of each view. Without it, any two views with as many columns as rows correlate perfectly on these rows.

    Args:
        first: R×H.
        second: R×K.
        regulariser: 0 or more.
        held_out: other rows of both views, whose correlations are taken along the directions of the rows above; None
            takes the correlations of these rows.

    Returns:
        A number in [0, 1] on the rows themselves, and in [−1, 1] on held-out rows; 0 for a view that does not vary.
    """
    return _Directions(first, second).pwcca(regulariser, held_out or (first, second))


@dataclass(frozen=True, kw_only=True)
class Cca:
    """Scores a block by the correlation of its output with a reference; a block that correlates is important.

    Correlations are of held-out rows, so that a wide view does not correlate by its width. This is an analysis of
    representations and was not made for allocation.

    Attributes:
        reference: `labels` (one column for each class), `embedding` (layer 0, the first block's input), or the name of
            a block.
        classes: the rows, see `linear_probe`.
        sets: disjoint sets of samples. A score is the mean over them, with Student's interval where there are several.
        regulariser: see `pwcca`; None: in each set the one with the highest correlation on rows that are neither fitted
            nor reported.
    """

    needs = Activations()

    reference: str = "labels"
    classes: Classes = "truth"
    sets: Count = 3
    regulariser: NonNegative | None = None

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        features_LRH, labels, samples = evidence.labelled(self.classes)
        reference_RK = self._reference(evidence, features_LRH, labels)
        check_sets(samples, self.sets, least_rows=3 * FOLDS)
        sets = [
            [rows[part] for part in shuffled_parts([samples[row] for row in rows], FOLDS)]
            for rows in shuffled_parts(samples, self.sets)
        ]
        tried = REGULARISERS if self.regulariser is None else (self.regulariser,)
        found = [[held_out_pwcca(rows_RH, reference_RK, parts, tried) for parts in sets] for rows_RH in features_LRH]
        values, intervals = over_sets(found)
        shown = "held-out" if self.regulariser is None else f"{self.regulariser:g}"
        return layer_scores(self, evidence, values, "important", intervals=intervals, regulariser=shown)

    def _reference(self, evidence: LayerActivations, features_LRH: Tensor, labels: Sequence[str]) -> Tensor:
        """Gives the view that every block is compared with (R×K)."""
        layers = evidence.layers.names
        if self.reference == "embedding":
            return evidence.embedding(self.classes)
        if self.reference in layers:
            return features_LRH[layers.index(self.reference)]
        if self.reference != "labels":
            raise ValueError(
                f"estimator.reference={self.reference!r} is neither 'labels', nor 'embedding', nor a block"
                f"{did_you_mean(self.reference, ('labels', 'embedding', *layers))}; the blocks are {layers[0]} to "
                f"{layers[-1]}"
            )
        label, count = min(Counter(labels).items(), key=lambda item: item[1])
        if count < 2:
            raise ValueError(
                f"the class {label!r} has one of {len(labels)} rows, so there is no class to correlate with; raise "
                "probe.num_train, or use estimator.classes=truth, which has two classes of equal size"
            )
        return _one_hot(labels)


def held_out_pwcca(first: Tensor, second: Tensor, parts: Sequence[Tensor], regularisers: Sequence[float]) -> float:
    """Gives the mean PWCCA of held-out rows, each part of the rows in turn.

    Args:
        first: R×H.
        second: R×K.
        parts: the rows of each part, at least three parts. While one part is reported, the next one chooses the
            regulariser, and the directions come from the others.
        regularisers: those to choose from.
    """
    found = []
    for place, reported in enumerate(parts):
        chooses = parts[(place + 1) % len(parts)]
        fitted = torch.cat([part for part in parts if part is not reported and part is not chooses])
        directions = _Directions(first[fitted], second[fitted])
        best = regularisers[0]
        if len(regularisers) > 1:
            best = max(regularisers, key=lambda each: directions.pwcca(each, (first[chooses], second[chooses])))
        found.append(directions.pwcca(best, (first[reported], second[reported])))
    return sum(found) / len(found)


class _Directions:
    """The canonical directions of two views, under any regulariser."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.views = first.double(), second.double()
        self.principal = [_principal(view) for view in self.views]

    def pwcca(self, regulariser: float, rows: View) -> float:
        """Gives the projection-weighted correlation of rows along the directions."""
        if any(singular_C.numel() == 0 for _, singular_C, _ in self.principal):
            return 0.0
        shrunk = [
            singular_C / (singular_C.square() + regulariser * singular_C.square().mean()).sqrt()
            for _, singular_C, _ in self.principal
        ]
        (left_RC, *_), (right_RC, *_) = self.principal
        turns = torch.linalg.svd((left_RC * shrunk[0]).mT @ (right_RC * shrunk[1]), full_matrices=False)
        sides = turns[0], turns[2].mT
        maps = [
            basis_HC * (shrink_C / singular_C) @ turn_CC
            for (_, singular_C, basis_HC), shrink_C, turn_CC in zip(self.principal, shrunk, sides, strict=True)
        ]
        view_RH = self.views[0] - self.views[0].mean(dim=0)
        along_RC = torch.nn.functional.normalize(view_RH @ maps[0], dim=0)
        weights_C = (along_RC.mT @ view_RH).abs().sum(dim=1)
        first, second = (
            _centred((given.double() - view.mean(dim=0)) @ each)
            for given, view, each in zip(rows, self.views, maps, strict=True)
        )
        norms_C = first.norm(dim=0) * second.norm(dim=0)
        correlations_C = torch.where(norms_C > 0, (first * second).sum(dim=0) / norms_C, 0.0).clamp(-1, 1)
        return float((weights_C * correlations_C).sum() / weights_C.sum())


def _principal(view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gives the principal directions that vary: coordinates (R×C), singular values (C) and basis (H×C)."""
    left, singular, right = torch.linalg.svd(_centred(view), full_matrices=False)
    # Against the size before centring: what is left of a constant column is rounding.
    noise = float(view.norm()) * max(view.shape) * torch.finfo(torch.float64).eps
    number = int((singular > noise).sum())
    return left[:, :number], singular[:number], right[:number].mT


def _centred(view: Tensor) -> Tensor:
    return view - view.mean(dim=0)


def _one_hot(labels: Sequence[str]) -> Tensor:
    known = sorted(set(labels))
    return torch.nn.functional.one_hot(torch.tensor([known.index(label) for label in labels])).double()
