"""Projection-weighted canonical correlation (PWCCA, Morcos et al., NeurIPS 2018) of block outputs.

Letters: R rows (samples), H and K columns of the two views, C components kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerif.checks import Count, check_fields, did_you_mean
from layerif.estimators._base import layer_scores
from layerif.evidence import Classes, LayerActivations
from layerif.probe.activations import Activations
from layerif.scores import LayerScores


def pwcca(first: Tensor, second: Tensor, *, components: int) -> float:
    """Gives Σ_c a_c ρ_c / Σ_c a_c with a_c = Σ_j |⟨h_c, x_j⟩|, the mean canonical correlation of two views.

    Each correlation is weighted by the part of the first view that its direction h_c accounts for. Columns are centred.

    Args:
        first: R×H.
        second: R×K.
        components: both views are first reduced to at most so many principal directions. Near R, any two views would
            correlate perfectly.

    Returns:
        A number in [0, 1]; 0 for a view that does not vary.
    """
    view_RH = first.double() - first.double().mean(dim=0)
    basis_RC, other_RC = _principal(view_RH, components), _principal(second.double(), components)
    if 0 in (basis_RC.shape[1], other_RC.shape[1]):
        return 0.0
    left_CC, correlations_C, _ = torch.linalg.svd(basis_RC.mT @ other_RC, full_matrices=False)
    weights_C = ((basis_RC @ left_CC).mT @ view_RH).abs().sum(dim=1)
    return float((weights_C * correlations_C.clamp(0, 1)).sum() / weights_C.sum())


@dataclass(frozen=True, kw_only=True)
class Cca:
    """Scores a block by the correlation of its output with a reference; a block that correlates is important.

    This is an analysis of representations and was not made for allocation.

    Attributes:
        reference: `labels` (one column for each class), or the name of a block.
        classes: the rows, see `linear_probe`.
        components: the principal directions that are kept; None: a tenth of the rows.
    """

    needs = Activations()

    reference: str = "labels"
    classes: Classes = "truth"
    components: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        layers = evidence.layers.names
        features_LRH, labels, _ = evidence.labelled(self.classes)
        components = self.components or max(1, len(labels) // 10)
        if components >= len(labels) // 2:
            raise ValueError(
                f"estimator.components={components} of {len(labels)} rows would correlate with anything; use fewer "
                "than half as many, or raise probe.num_train"
            )
        if self.reference != "labels" and self.reference not in layers:
            raise ValueError(
                f"estimator.reference={self.reference!r} is neither 'labels' nor a block"
                f"{did_you_mean(self.reference, layers)}; the blocks are {layers[0]} to {layers[-1]}"
            )
        label, count = min(Counter(labels).items(), key=lambda item: item[1])
        if self.reference == "labels" and count < 2:
            raise ValueError(
                f"the class {label!r} has one of {len(labels)} rows, so there is no class to correlate with; raise "
                "probe.num_train, or use estimator.classes=truth, which has two classes of equal size"
            )
        reference = _one_hot(labels) if self.reference == "labels" else features_LRH[layers.index(self.reference)]
        values = (pwcca(rows_RH, reference, components=components) for rows_RH in features_LRH)
        return layer_scores(self, evidence, values, "important", components=components)


def _principal(view: Tensor, components: int) -> Tensor:
    """Gives orthonormal coordinates (R×C) of the rows along the leading principal directions that vary."""
    centred = view - view.mean(dim=0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    # Against the size before centring: what is left of a constant column is rounding.
    noise = float(view.norm()) * max(view.shape) * torch.finfo(torch.float64).eps
    return left[:, : min(components, int((singular > noise).sum()))]


def _one_hot(labels: Sequence[str]) -> Tensor:
    known = sorted(set(labels))
    return torch.nn.functional.one_hot(torch.tensor([known.index(label) for label in labels])).double()
