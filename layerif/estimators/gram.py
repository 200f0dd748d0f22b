"""What all estimators on Gram matrices share: from one matrix's influence to the scores of all layers.

Letters in shape suffixes: N train samples, M validation samples, P parameters of one matrix.
K = G Gᵀ (N×N) and C = V Gᵀ (M×N) for per-sample gradients G (N×P) of train and V (M×P) of validation samples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from layerif.layers import LayerGrams, LayerMap, MatrixGram
from layerif.names import check_choice
from layerif.scores import Aggregation, LayerScores, aggregate

Granularity = Literal["matrix", "block"]
Normalisation = Literal["none", "numel"]
DampingRule = Literal["relative", "absolute"]


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

    def influences(self, grams: Mapping[str, MatrixGram]) -> dict[str, Tensor]:
        """I of every Gram, by its name; the place for what an estimator has to say about all of them together."""
        return {name: self.influence(gram) for name, gram in grams.items()}

    def score(self, evidence: Any, /) -> LayerScores:
        """evidence: `LayerGrams`, unless `needs` says otherwise."""
        grams = self.solvable(evidence)
        warn_of_zero_gradients(evidence.grams)
        return self.scores(self.influences(grams.grams), grams.layers, evidence.fingerprint)

    def solvable(self, evidence: LayerGrams) -> LayerGrams:
        """The Grams that influence is taken of: in float64, all finite, one per matrix or one per block."""
        grams = {name: _in_float64(name, gram) for name, gram in evidence.grams.items()}
        layers = evidence.layers
        if self.granularity == "block":
            blocks = zip(layers.names, layers.params, strict=True)
            grams = {block: reduce(add, (grams[name] for name in params)) for block, params in blocks}
            layers = LayerMap(layers.names, tuple((block,) for block in layers.names), layers.numel)
        return LayerGrams(layers, grams, evidence.fingerprint)

    def scores(self, influences: Mapping[str, Tensor], layers: LayerMap, fingerprint: str) -> LayerScores:
        """|S| of every block, from the influences of what `layers.params` names in it."""
        values = []
        for params, numel in zip(layers.params, layers.numel, strict=True):
            influence_MN = reduce(add, (influences[name] for name in params))
            size = abs(aggregate(influence_MN, self.aggregation))
            values.append(size / numel if self.normalisation == "numel" else size)
        return LayerScores(layers.names, tuple(values), "undertrained", self.source, fingerprint)

    @property
    def source(self) -> str:
        return described(self)


@dataclass(frozen=True, kw_only=True)
class DampedEstimator(GramEstimator):
    """An estimator that inverts a damped Fisher matrix, F + λ.

    damping, damping_rule: `relative` (the paper's) is λ = damping · the matrix's mean squared gradient entry, so that
        one damping suits matrices and models of any size; `absolute` is λ = damping itself, the same for every matrix.
    """

    damping: float = 0.1
    damping_rule: DampingRule = "relative"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        check_choice("estimator.damping_rule", self.damping_rule, get_args(DampingRule))

    def relative_damping(self, gram: MatrixGram) -> float:
        """The damping, in units of the mean squared gradient entry, that gives this Gram its λ under the rule."""
        mean_square = damping_lambda(gram.train_train, numel=gram.numel, damping=1.0)
        return self.damping if self.damping_rule == "relative" or mean_square == 0 else self.damping / mean_square


@dataclass(frozen=True, kw_only=True)
class NormEstimator:
    """Scores a block by the size of its train gradients, those of all its matrices laid end to end.

    normalisation: `none`, or `numel`: the size of a vector of as many entries of the same mean square, so that blocks
        of unequal size compare.
    Large gradients mark an undertrained block. Raises ValueError naming the matrix if a Gram is not finite.
    """

    needs: ClassVar[str] = "grams"

    normalisation: Normalisation = "none"

    def __post_init__(self) -> None:
        check_choice("estimator.normalisation", self.normalisation, get_args(Normalisation))

    def size(self, train_train: Tensor, *, numel: int) -> float:
        """Of gradients with these inner products K (N×N), for each of `numel` parameters."""
        raise NotImplementedError

    def score(self, evidence: LayerGrams, /) -> LayerScores:
        warn_of_zero_gradients(evidence.grams)
        values = []
        for params, numel in zip(evidence.layers.params, evidence.layers.numel, strict=True):
            gram = reduce(add, (_in_float64(name, evidence.grams[name]) for name in params))
            values.append(self.size(gram.train_train, numel=numel if self.normalisation == "numel" else 1))
        layers = evidence.layers.names
        return LayerScores(layers, tuple(values), "undertrained", described(self), evidence.fingerprint)


def described(estimator: Any) -> str:
    """An estimator by its file's name, and its settings: `datainf(aggregation=all, …, damping=0.1)`."""
    settings = ", ".join(f"{field.name}={getattr(estimator, field.name)}" for field in fields(estimator))
    return f"{type(estimator).__module__.rpartition('.')[2]}({settings})"


def damping_lambda(train_train: Tensor, *, numel: int, damping: float) -> float:
    """λ = damping · tr K / (N·P): damping times the mean squared entry of the train gradients."""
    check_damping(damping)
    if numel < 1:
        raise ValueError(f"numel={numel} must be the number of parameters behind the Gram, at least 1")
    return damping * float(train_train.double().trace()) / (len(train_train) * numel)


def eigenbasis(train_train: Tensor) -> tuple[Tensor, Tensor]:
    """Spectrum (N, ascending, >= 0) and eigenvectors (N×N, columns) of K in float64."""
    gram_NN = train_train.double()
    spectrum_N, basis_NN = torch.linalg.eigh((gram_NN + gram_NN.T) / 2)
    # A Gram built in float32 has noise eigenvalues below zero that can cancel the far smaller damping.
    return spectrum_N.clamp(min=0), basis_NN


def check_damping(damping: float) -> None:
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"estimator.damping={damping} must be finite and > 0; the reference uses 0.1")


def warn_of_zero_gradients(grams: Mapping[str, MatrixGram]) -> None:
    zero = [name for name, gram in grams.items() if not (gram.train_train.any() and gram.val_norms.any())]
    if zero:
        listed = ", ".join(zero[:4]) + (f" and {len(zero) - 4} more" if len(zero) > 4 else "")
        warnings.warn(
            f"all gradients are zero, so they count as nothing, in {listed} ({len(zero)} of {len(grams)} "
            "matrices); for LoRA's A this is so while B is zero",
            RuntimeWarning,
            stacklevel=3,
        )


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
