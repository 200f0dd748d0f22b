"""Linear probes (Alain and Bengio, 2017): what can be read off a block's output by a straight line?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import Tensor

from layerif.checks import check_choice
from layerif.evidence import Classes, LayerActivations
from layerif.scores import LayerScores


def probe_accuracy(features: Tensor, labels: Sequence[str], samples: Sequence[int], *, folds: int) -> float:
    """Accuracy (0–1) of logistic regression on standardised features (R×H), mean over rows of `folds` parts.

    samples: the sample each row belongs to; rows of one sample are never on both sides, classes are spread evenly.
    Raises ValueError for a class of fewer samples than folds.
    """
    from sklearn.linear_model import LogisticRegression  # a second that start-up does not pay
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    label, count = min(Counter(labels).items(), key=lambda item: item[1])
    if count < folds:
        raise ValueError(
            f"the class {label!r} has {count} of {len(labels)} rows, fewer than estimator.folds={folds}; raise "
            "probe.num_train, lower the folds, or use estimator.classes=truth, which has two classes of equal size"
        )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    predicted = cross_val_predict(classifier, features.numpy(), labels, groups=samples, cv=parts)
    return sum(guess == label for guess, label in zip(predicted, labels, strict=True)) / len(labels)


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """classes: `truth` tells the right output from a wrong one, on outputs averaged over the answer's tokens (chance
        is ½ on every task); `answer` tells which label is right from the prompt alone, for tasks whose questions
        share their labels.
    folds: of the cross-validation.

    An analysis of representations, not made for allocation: a block whose output already tells the classes apart is
    taken as important. It sees what a block passes on, its input included.
    """

    needs: ClassVar[str] = "activations"

    classes: Classes = "truth"
    folds: int = 5

    def __post_init__(self) -> None:
        check_choice("estimator.classes", self.classes, get_args(Classes))
        if self.folds < 2:
            raise ValueError(f"estimator.folds={self.folds} must be at least 2")

    def score(self, evidence: LayerActivations, /) -> LayerScores:
        features_LRH, labels, samples = evidence.labelled(self.classes)
        values = tuple(probe_accuracy(rows_RH, labels, samples, folds=self.folds) for rows_RH in features_LRH)
        source = f"linear_probe(classes={self.classes}, folds={self.folds})"
        return LayerScores(evidence.layers.names, values, "important", source, evidence.fingerprint)
