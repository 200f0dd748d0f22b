"""What all estimators on Gram matrices share: from one matrix's influence to the scores of all layers.

Letters in shape suffixes: N train samples, M validation samples, P parameters of one matrix.
K = G Gᵀ (N×N) and C = V Gᵀ (M×N) for per-sample gradients G (N×P) of train and V (M×P) of validation samples.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import ClassVar, Literal, get_args

from torch import Tensor

from layerif.layers import LayerGrams, MatrixGram
from layerif.names import check_choice
from layerif.scores import Aggregation, LayerScores, aggregate

Granularity = Literal["matrix", "block"]
Normalisation = Literal["none", "numel"]


@dataclass(frozen=True, kw_only=True)
class GramEstimator:
    """Scores |S| per block from the influence of train on validation samples.

    aggregation: which train samples count towards S, see `layerif.scores.aggregate`.
    granularity: `matrix` sums the influences of the block's matrices (the paper's); `block` takes the influence of one
        Gram of the whole block. They differ where an estimator is not linear in the Gram.
    normalisation: `none` keeps |S| (the paper's). |S| grows with the number of parameters, so blocks of unequal size
        compare only under `numel`: |S| divided by the block's measured parameters.
    Raises ValueError naming the matrix if a Gram is not finite. A matrix whose gradients are all zero has no
    influence; a RuntimeWarning names it.
    """

    needs: ClassVar[str] = "grams"

    aggregation: Aggregation = "all"
    granularity: Granularity = "matrix"
    normalisation: Normalisation = "none"

    def __post_init__(self) -> None:
        check_choice("estimator.aggregation", self.aggregation, get_args(Aggregation))
        check_choice("estimator.granularity", self.granularity, get_args(Granularity))
        check_choice("estimator.normalisation", self.normalisation, get_args(Normalisation))

    def influence(self, gram: MatrixGram) -> Tensor:
        """I (M×N) in float64; I_ji < 0: up-weighting train sample i lowers the loss of validation sample j."""
        raise NotImplementedError

    def score(self, evidence: LayerGrams, /) -> LayerScores:
        grams = {name: _in_float64(name, gram) for name, gram in evidence.grams.items()}
        _warn_of_zero_gradients(grams)
        layers = evidence.layers
        values = []
        for params, numel in zip(layers.params, layers.numel, strict=True):
            of_block = [grams[name] for name in params]
            if self.granularity == "block":
                of_block = [reduce(add, of_block)]
            influence_MN = reduce(add, (self.influence(gram) for gram in of_block))
            size = abs(aggregate(influence_MN, self.aggregation))
            values.append(size / numel if self.normalisation == "numel" else size)
        return LayerScores(layers.names, tuple(values), "undertrained", self.source, evidence.fingerprint)

    @property
    def source(self) -> str:
        """The estimator by its file's name, and its settings: `datainf(aggregation=all, …, damping=0.1)`."""
        settings = ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{type(self).__module__.rpartition('.')[2]}({settings})"


def damping_lambda(train_train: Tensor, *, numel: int, damping: float) -> float:
    """λ = damping · tr K / (N·P): damping times the mean squared entry of the train gradients."""
    check_damping(damping)
    if numel < 1:
        raise ValueError(f"numel={numel} must be the number of parameters behind the Gram, at least 1")
    return damping * float(train_train.double().trace()) / (len(train_train) * numel)


def check_damping(damping: float) -> None:
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"estimator.damping={damping} must be finite and > 0; the reference uses 0.1")


def _in_float64(name: str, gram: MatrixGram) -> MatrixGram:
    # λ is about 1e-8 of a gradient's squared norm: float32 cannot hold their sum, however the Gram was built.
    solved = MatrixGram(gram.train_train.double(), gram.val_train.double(), gram.val_norms.double(), gram.numel)
    for what in ("train_train", "val_train", "val_norms"):
        if not bool(getattr(solved, what).isfinite().all()):
            raise ValueError(
                f"the Gram {what} of {name!r} is not finite, so its gradients overflowed or are NaN; "
                "look at the loss of the probed samples, or probe in float32"
            )
    return solved


def _warn_of_zero_gradients(grams: dict[str, MatrixGram]) -> None:
    zero = [name for name, gram in grams.items() if not (gram.train_train.any() and gram.val_norms.any())]
    if zero:
        listed = ", ".join(zero[:4]) + (f" and {len(zero) - 4} more" if len(zero) > 4 else "")
        warnings.warn(
            f"all gradients are zero, so the influence counts as zero, in {listed} ({len(zero)} of {len(grams)} "
            "matrices); for LoRA's A this is so while B is zero",
            RuntimeWarning,
            stacklevel=3,
        )
