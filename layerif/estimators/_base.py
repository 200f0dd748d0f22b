"""What all estimators on Gram matrices share: from one matrix's influence to the scores of all layers.

Letters in shape suffixes: N train samples, M validation samples, P parameters of one matrix.
K = G Gᵀ (N×N) and C = V Gᵀ (M×N) for per-sample gradients G (N×P) of train and V (M×P) of validation samples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from layerif.checks import check_choice
from layerif.compat import changes_of
from layerif.evidence import LayerGrams, MatrixGram
from layerif.layers import LayerMap
from layerif.scores import Aggregation, LayerScores, aggregate

Granularity = Literal["matrix", "block"]
Normalisation = Literal["none", "numel"]
DampingRule = Literal["relative", "absolute"]


class InfluenceEstimator:
    """Scores |S| per block from the influence of train on validation samples; the fields are the subclass's.

    aggregation: which train samples count towards S, see `layerif.scores.aggregate`.
    normalisation: `none` keeps |S| (the paper's). |S| grows with the number of parameters, so blocks of unequal size
        compare only under `numel`: |S| divided by the block's measured parameters.
    """

    aggregation: Aggregation
    normalisation: Normalisation

    def __post_init__(self) -> None:
        check_choice("estimator.aggregation", self.aggregation, get_args(Aggregation))
        check_choice("estimator.normalisation", self.normalisation, get_args(Normalisation))

    def scores(self, influences: Mapping[str, Tensor], layers: LayerMap, fingerprint: str) -> LayerScores:
        """|S| of every block, from its influence: (M×N), or (1×N) summed over the validation samples."""
        values = []
        for block, numel in zip(layers.names, layers.numel, strict=True):
            size = abs(aggregate(influences[block], self.aggregation))
            values.append(size / numel if self.normalisation == "numel" else size)
        return LayerScores(layers.names, tuple(values), "undertrained", self.source, fingerprint)

    @property
    def source(self) -> str:
        return described(self)


@dataclass(frozen=True, kw_only=True)
class GramEstimator(InfluenceEstimator):
    """An estimator that needs nothing but Grams.

    granularity: `matrix` sums the influences of the block's matrices (the paper's); `block` takes the influence of one
        Gram of the whole block. They differ where an estimator is not linear in the Gram.
    Raises ValueError naming the matrix if a Gram is not finite. A matrix whose gradients are all zero has no
    influence; a RuntimeWarning names it.
    """

    needs: ClassVar[str] = "grams"

    aggregation: Aggregation = "all"
    granularity: Granularity = "matrix"
    normalisation: Normalisation = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("estimator.granularity", self.granularity, get_args(Granularity))

    def influence(self, gram: MatrixGram) -> Tensor:
        """I (M×N) in float64; I_ji < 0: up-weighting train sample i lowers the loss of validation sample j."""
        raise NotImplementedError

    def influences(self, grams: Mapping[str, MatrixGram]) -> dict[str, Tensor]:
        """I of every Gram, by its name; the place for what an estimator has to say about all of them together."""
        return {name: self.influence(gram) for name, gram in grams.items()}

    def score(self, evidence: Any, /) -> LayerScores:
        """evidence: `LayerGrams`, unless `needs` says otherwise. They keep what all aggregations are taken of."""
        solver = replace(self, aggregation="all", normalisation="none")  # these two come after solving
        influences = evidence.once(solver, lambda: self._of_train(evidence))
        return self.scores(influences, evidence.layers, evidence.fingerprint)

    def _of_train(self, evidence: LayerGrams) -> dict[str, Tensor]:
        """Σ_j I_ji (1×N) of every block: of the influence all that scores need, and a small thing to keep."""
        grams = self.solvable(evidence)
        warn_of_zero_gradients(evidence.grams)
        influences = by_block(self.influences(grams.grams), grams.layers)
        return {block: influence_MN.sum(dim=0, keepdim=True) for block, influence_MN in influences.items()}

    def solvable(self, evidence: LayerGrams) -> LayerGrams:
        """The Grams that influence is taken of: in float64, all finite, one per matrix or one per block."""
        return evidence.in_float64.by_block if self.granularity == "block" else evidence.in_float64


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
        blocks = evidence.in_float64.by_block.grams
        warn_of_zero_gradients(evidence.grams)
        values = tuple(
            self.size(blocks[block].train_train, numel=numel if self.normalisation == "numel" else 1)
            for block, numel in zip(evidence.layers.names, evidence.layers.numel, strict=True)
        )
        return LayerScores(evidence.layers.names, values, "undertrained", described(self), evidence.fingerprint)


def by_block(influences: Mapping[str, Tensor], layers: LayerMap) -> dict[str, Tensor]:
    """I (M×N) of every block: the sum over what `layers.params` names in it."""
    blocks = zip(layers.names, layers.params, strict=True)
    return {block: reduce(add, (influences[name] for name in params)) for block, params in blocks}


def described(estimator: Any) -> str:
    """An estimator by its file's name, and its settings: `datainf(aggregation=all, …, damping=0.1)`."""
    settings = ", ".join(f"{field.name}={getattr(estimator, field.name)}" for field in fields(estimator))
    return f"{type(estimator).__module__.rpartition('.')[2]}({settings})"


def damping_lambda(train_train: Tensor, *, numel: int, damping: float) -> float:
    """λ = damping · tr K / (N·P): damping times the mean squared entry of the train gradients."""
    return float(damping_lambdas(train_train, numel=numel, damping=damping))


def damping_lambdas(train_train: Tensor, *, numel: int, damping: float) -> Tensor:
    """`damping_lambda` of each matrix of a batch (…×N×N) of the same size: (…), float64."""
    check_damping(damping)
    if numel < 1:
        raise ValueError(f"numel={numel} must be the number of parameters behind the Gram, at least 1")
    square_N = train_train.diagonal(dim1=-2, dim2=-1).double()
    return damping * square_N.sum(dim=-1) / (square_N.shape[-1] * numel)


def eigenbasis(train_train: Tensor) -> tuple[Tensor, Tensor]:
    """Spectrum (N, ascending, >= 0) and eigenvectors (N×N, columns) of K in float64.

    Remembered as long as the tensor lives and is not changed in place: it is nearly all that exact and LiSSA cost, and
    the same at every damping.
    """
    version = changes_of(train_train)
    known = _EIGENBASES.get(train_train)
    if known is not None and known[0] == version:
        return known[1]
    gram_NN = train_train.double()
    spectrum_N, basis_NN = torch.linalg.eigh((gram_NN + gram_NN.T) / 2)
    # A Gram built in float32 has noise eigenvalues below zero that can cancel the far smaller damping.
    found = spectrum_N.clamp(min=0), basis_NN
    if version is not None:  # an inference tensor does not tell of changes
        _EIGENBASES[train_train] = version, found
    return found


# Of K by its identity: (version, eigenbasis).
_EIGENBASES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_damping(damping: float) -> None:
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"estimator.damping={damping} must be finite and > 0; the reference uses 0.1")


def warn_of_zero_gradients(grams: Mapping[str, MatrixGram]) -> None:
    zero = [name for name, gram in grams.items() if not (gram.train_train.diagonal().any() and gram.val_norms.any())]
    if zero:
        listed = ", ".join(zero[:4]) + (f" and {len(zero) - 4} more" if len(zero) > 4 else "")
        warnings.warn(
            f"all gradients are zero, so they count as nothing, in {listed} ({len(zero)} of {len(grams)} "
            "matrices); for LoRA's A this is so while B is zero",
            RuntimeWarning,
            stacklevel=3,
        )
