"""Linear probes (Alain and Bengio, 2017): the classes that a straight line tells apart in a block's output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor

from layerif.checks import check_fields
from layerif.estimators._base import layer_scores
from layerif.evidence import Classes, LayerActivations
from layerif.probe.activations import Activations
from layerif.scores import LayerScores


def classifier() -> Any:
    """Makes scikit-learn's logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def stratified_parts(folds: int) -> Any:
    """Makes the folds of a cross-validation: rows of one sample stay together, and classes are spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    return StratifiedGroupKFold(folds, shuffle=True, random_state=0)


def probe_accuracy(features: Tensor, labels: Sequence[str], samples: Sequence[int], *, folds: int) -> float:
    """Cross-validates a logistic regression on standardised features.

    Args:
        features: R×H.
        labels: the class of each row.
        samples: the sample that each row belongs to. Rows of one sample are never on both sides, and classes are
            spread evenly.
        folds: the parts of the cross-validation.

    Returns:
        The accuracy (0–1) over all rows.

    Raises:
        ValueError: for a class with fewer samples than folds.
    """
    from sklearn.model_selection import cross_val_predict  # a second that start-up does not pay

    label, count = min(Counter(labels).items(), key=lambda item: item[1])
    if count < folds:
        raise ValueError(
            f"the class {label!r} has {count} of {len(labels)} rows, fewer than estimator.folds={folds}; raise "
            "probe.num_train, lower the folds, or use estimator.classes=truth, which has two classes of equal size"
        )
    parts = stratified_parts(folds)
    predicted = cross_val_predict(classifier(), features.numpy(), labels, groups=samples, cv=parts)
    return sum(guess == label for guess, label in zip(predicted, labels, strict=True)) / len(labels)


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Scores a block by the accuracy of a linear probe; a block whose output tells the classes apart is important.

    This is an analysis of representations and was not made for allocation. It sees a block's output, which includes
    its input.

    Attributes:
        classes: `truth` tells the right output from a wrong one, on outputs averaged over the answer's tokens (chance
            is ½ on every task); `answer` tells which label is right from the prompt alone, for tasks whose questions
            share their labels.
        folds: of the cross-validation.
    """

    needs = Activations()

    classes: Classes = "truth"
    folds: Annotated[int, Ge(2)] = 5

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        features_LRH, labels, samples = evidence.labelled(self.classes)
        values = (probe_accuracy(rows_RH, labels, samples, folds=self.folds) for rows_RH in features_LRH)
        return layer_scores(self, evidence, values, "important")
