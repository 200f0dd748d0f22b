"""A linear probe on the outputs of chosen blocks of two models, beside probes on those of each model alone.

Letters in shape suffixes: L layers, R rows, H columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerif.estimators.linear_probe import classifier, stratified_parts
from layerif.evidence import Classes, LayerActivations
from layerif.stats import Difference, all_paired_by_question, holm, wilson

FUSED = "fused"


@dataclass(frozen=True)
class Seen:
    """The block outputs of one model for the rows of one part.

    Attributes:
        features: pooled block outputs (L×R×H).
        labels: the class of each row.
        samples: the sample that each row belongs to.
    """

    features: Tensor
    labels: list[str]
    samples: list[int]

    @classmethod
    def of(cls, activations: LayerActivations, classes: Classes) -> Seen:
        """Takes the rows of these classes, see `LayerActivations.labelled`."""
        return cls(*activations.labelled(classes))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One probe.

    Attributes:
        name: of the arm.
        layers: the places of the blocks whose outputs it reads, for each model.
        right: for each held-out sample, whether the probe is right.
    """

    name: str
    layers: Mapping[str, tuple[int, ...]]
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """The share of held-out samples that the probe gets right."""
        return sum(self.right) / len(self.right)

    def row(self) -> dict[str, Any]:
        """Gives its accuracy with Wilson's 95 % interval."""
        low, high = wilson(sum(self.right), len(self.right))
        layers = {model: list(places) for model, places in self.layers.items() if places}
        return {"arm": self.name, "layers": layers, "accuracy": self.accuracy, "low": low, "high": high}


def answered(probabilities: np.ndarray, classes: Sequence[str], labels: Sequence[str], samples: Sequence[int]) -> list:
    """Tells for each sample whether a probe is right about it.

    A sample of two rows, a right output and a wrong one, is right where the right one is the likelier to be `right`. A
    sample of one row is right where its label is the likeliest.

    Args:
        probabilities: of each class for each row (R×classes).
        classes: in the order of the columns.
        labels: the class of each row.
        samples: the sample that each row belongs to.

    Returns:
        True or False for each sample, in ascending order.
    """
    if len(set(samples)) == len(samples):
        found = {sample: classes[row.argmax()] == label for sample, row, label in _rows(samples, probabilities, labels)}
    else:
        odds = probabilities[:, list(classes).index("right")]
        of = {(sample, label): odd for sample, odd, label in _rows(samples, odds, labels)}
        found = {sample: of[sample, "right"] > of[sample, "wrong"] for sample in samples}
    return [bool(found[sample]) for sample in sorted(found)]


def _rows(samples: Sequence[int], values: np.ndarray, labels: Sequence[str]) -> zip:
    return zip(samples, values, labels, strict=True)


def accuracies(train: Seen, *, folds: int) -> list[float]:
    """Gives the cross-validated accuracy of a probe on each layer, on train rows alone."""
    from sklearn.model_selection import cross_val_predict

    found = []
    for rows_RH in train.features:
        probabilities: Any = cross_val_predict(
            classifier(),
            rows_RH.numpy(),
            train.labels,
            groups=train.samples,
            cv=stratified_parts(folds),
            method="predict_proba",
        )
        right = answered(probabilities, sorted(set(train.labels)), train.labels, train.samples)
        found.append(sum(right) / len(right))
    return found


def arms(
    train: Mapping[str, Seen], held_out: Mapping[str, Seen], of_layer: Mapping[str, Sequence[float]], *, num_layers: int
) -> list[Arm]:
    """Fits a probe for each arm on train rows, and applies it to held-out rows.

    The arms are the best layers of each model, twice as many of each, so that their probe is as wide as the fused one,
    and the best layers of both together.

    Args:
        train: by model, the rows that probes are fitted on.
        held_out: by model, the rows that they are judged on.
        of_layer: by model, what the layers are chosen by, see `accuracies`.
        num_layers: the layers that are taken of each model.
    """
    ranked = {
        model: sorted(range(len(values)), key=lambda place: (-values[place], place))
        for model, values in of_layer.items()
    }
    best = {model: tuple(sorted(order[:num_layers])) for model, order in ranked.items()}
    more = {model: tuple(sorted(order[: 2 * num_layers])) for model, order in ranked.items()}
    chosen = {f"best of {model}": {model: places} for model, places in best.items()}
    chosen |= {f"{len(places)} of {model}": {model: places} for model, places in more.items()}
    chosen[FUSED] = best
    return [
        Arm(name=name, layers=layers, right=tuple(_judged(train, held_out, layers))) for name, layers in chosen.items()
    ]


def _judged(train: Mapping[str, Seen], held_out: Mapping[str, Seen], layers: Mapping[str, Sequence[int]]) -> list[bool]:
    fitted, first = classifier(), next(iter(layers))
    fitted.fit(_side_by_side(train, layers), train[first].labels)
    probabilities = fitted.predict_proba(_side_by_side(held_out, layers))
    seen = held_out[first]
    return answered(probabilities, list(fitted.classes_), seen.labels, seen.samples)


def _side_by_side(seen: Mapping[str, Seen], layers: Mapping[str, Sequence[int]]) -> np.ndarray:
    columns = [seen[model].features[place] for model, places in layers.items() for place in places]
    return torch.cat(columns, dim=1).numpy()


def differences(found: Sequence[Arm]) -> list[dict[str, Any]]:
    """Compares the last arm with every other one, paired by sample; p is corrected for all of them by Holm's rule."""
    *others, fused = found
    compared: list[Difference] = all_paired_by_question(
        (np.array([one.right], dtype=float), np.array([fused.right], dtype=float)) for one in others
    )
    corrected = holm([each.p for each in compared])
    return [
        {
            "from": one.name,
            "to": fused.name,
            "difference": each.value,
            "low": each.low,
            "high": each.high,
            "p": each.p,
            "p Holm": float(p),
        }
        for one, each, p in zip(others, compared, corrected, strict=True)
    ]
