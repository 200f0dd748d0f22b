"""The way from the influence of one matrix to the scores of all layers, which all estimators on Grams share.

Letters in shape suffixes: N train samples, M validation samples, P parameters of one matrix.
K = G Gᵀ (N×N) and C = V Gᵀ (M×N) for per-sample gradients G (N×P) of train and V (M×P) of validation samples.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from layerif.allocate.curves import Curves, equal_curves, with_base
from layerif.allocate.spans import Spans
from layerif.checks import Count, check_fields, check_value, listed
from layerif.compat import changes_of
from layerif.evidence import (
    CrossGram,
    LayerActivations,
    LayerExperts,
    LayerGates,
    LayerGrams,
    LayerMasks,
    LayerRemovals,
    LayerSpectra,
    MatrixGram,
)
from layerif.layers import LayerMap, MatrixOrBlock
from layerif.probe.grams.request import Grams
from layerif.probe.request import Request
from layerif.scores import Aggregation, AllocationKind, Direction, LayerScores, aggregate

Damping = Annotated[float, Gt(0), "the reference uses 0.1"]
Normalisation = Literal["none", "numel"]
DampingRule = Literal["relative", "absolute"]
Reads = Literal["diagonal", "columns", "whole"]
# evidence that keeps the layers apart
Evidence = LayerSpectra | LayerActivations | LayerRemovals | LayerMasks | LayerGates | LayerExperts | LayerGrams


class CurveEstimator(ABC):
    """An estimator that prices levels instead of scoring layers. Subclasses are dataclasses.

    Attributes:
        kind: the kind of allocation whose levels are priced.
    """

    kind: ClassVar[AllocationKind] = "sparsity"

    @property
    @abstractmethod
    def needs(self) -> Request:
        """The request for the evidence that `curves` is given."""

    @property
    def source(self) -> str:
        """The origin of the curves, for the record."""
        return described(self)

    @abstractmethod
    def curves(self, evidence: Any, /) -> Curves | Spans:
        """Gives the price of every level of every unit."""

    def equal(self, layers: LayerMap) -> Curves | Spans:
        """Gives curves that tell no unit from another, so that a request can be tried before anything is measured."""
        needs: Any = self.needs
        levels = with_base(self.kind, needs.levels)
        return equal_curves(layers, needs.granularity, levels, needs.is_stepped, self.kind)


class InfluenceEstimator(ABC):
    """Scores a block by |S|, from the influence of train samples on validation samples. Subclasses are dataclasses.

    Attributes:
        aggregation: the train samples that count towards S, see `layerif.scores.aggregate`.
        normalisation: `none` keeps |S|, as the paper does. |S| grows with the number of parameters, so that blocks of
            unequal size compare only under `numel`: |S| divided by the block's measured parameters.
    """

    needs: ClassVar[Any]
    aggregation: Aggregation
    normalisation: Normalisation

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    @property
    def needs_of_rows(self) -> Request:
        """The request for the evidence that `by_layer` takes, where scores need less than the influence of each row."""
        return self.needs

    @abstractmethod
    def by_layer(self, evidence: Any, /) -> dict[str, Tensor]:
        """Gives I (M×N) of every block, by its name. Scores keep the sum of it alone."""

    def scores(self, influences: Mapping[str, Tensor], layers: LayerMap, fingerprint: str) -> LayerScores:
        """Gives |S| of every block.

        Args:
            influences: I of every block (M×N), or its sum over the validation samples (1×N), by the block's name.
            layers: the blocks.
            fingerprint: of what was measured.
        """
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

    A matrix whose gradients are all zero has no influence; a RuntimeWarning names it. A Gram that is not finite is
    refused by the name of its matrix.

    Attributes:
        granularity: `matrix` sums the influences of the block's matrices, as the paper does; `block` takes the
            influence of one Gram of the whole block. They differ where an estimator is not linear in the Gram.
        reads: the part of K that `influence` looks at: its diagonal alone, its columns one after the other
            (`influence_of`), or all of it at once. The first two spare thousands of rows a K.
    """

    needs = Grams()
    reads: ClassVar[Reads] = "whole"

    aggregation: Aggregation = "all"
    granularity: MatrixOrBlock = "matrix"
    normalisation: Normalisation = "none"

    @abstractmethod
    def influence(self, gram: MatrixGram) -> Tensor:
        """Gives I (M×N) in float64. I_ji < 0: up-weighting train sample i lowers the loss of validation sample j."""

    def influence_of(self, gram: MatrixGram, others: CrossGram) -> Tensor:
        """Gives the influence (M×T) that further gradients would have, in float64. It is linear in them.

        For those of the train samples themselves it is `influence`.

        Args:
            gram: of the samples that the Fisher is made of.
            others: the products of the further gradients with these.
        """
        raise ValueError(
            f"estimator={name_of(self)} does not tell the influence of a part of a row; use datainf, exact, lissa, "
            "grad_dot or cosine"
        )

    def influences(self, grams: Mapping[str, MatrixGram]) -> dict[str, Tensor]:
        """Gives I of every Gram, by its name. An estimator that refuses or warns of all Grams together overrides it."""
        return {name: self.influence(gram) for name, gram in grams.items()}

    def score(self, evidence: Any, /) -> LayerScores:
        """Scores every block. The Grams keep the influence that all aggregations are taken of.

        Args:
            evidence: `LayerGrams`, unless `needs` says otherwise.
        """
        solver = replace(self, aggregation="all", normalisation="none")  # these two come after solving
        influences = evidence.once(solver, lambda: self._of_train(evidence))
        return self.scores(influences, evidence.layers, evidence.fingerprint)

    def by_layer(self, evidence: LayerGrams, /) -> dict[str, Tensor]:
        grams = self.solvable(evidence)
        return by_block(self.influences(grams.grams), grams.layers)

    def _of_train(self, evidence: LayerGrams) -> dict[str, Tensor]:
        """Gives Σ_j I_ji (1×N) of every block: scores need no more of the influence, and it is small to keep."""
        warn_of_zero_gradients(evidence.grams)
        influences = self.by_layer(evidence)
        return {block: influence_MN.sum(dim=0, keepdim=True) for block, influence_MN in influences.items()}

    def solvable(self, evidence: LayerGrams) -> LayerGrams:
        """Gives the Grams that influence is taken of: in float64, all finite, one per matrix or one per block."""
        return evidence.in_float64.by_block if self.granularity == "block" else evidence.in_float64


@dataclass(frozen=True, kw_only=True)
class DampedEstimator(GramEstimator):
    """An estimator that inverts a damped Fisher matrix, F + λ.

    Attributes:
        damping: see `damping_rule`.
        damping_rule: `relative`, as in the paper, is λ = damping · the matrix's mean squared gradient entry, so that
            one damping suits matrices and models of any size; `absolute` is λ = damping itself for every matrix.
    """

    damping: Damping = 0.1
    damping_rule: DampingRule = "relative"

    def relative_damping(self, gram: MatrixGram) -> float:
        """Gives `relative_damping` of this estimator's settings."""
        return relative_damping(gram, self.damping, self.damping_rule)


@dataclass(frozen=True, kw_only=True)
class NormEstimator(ABC):
    """Scores a block by the size of its train gradients, those of all its matrices laid end to end.

    Large gradients mark an undertrained block. A Gram that is not finite is refused by the name of its matrix.

    Attributes:
        normalisation: `none`, or `numel`: the size for each of the block's parameters, so that blocks of unequal size
            compare.
    """

    needs = Grams()

    normalisation: Normalisation = "none"

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    @abstractmethod
    def size(self, train_train: Tensor, *, numel: int) -> float:
        """Gives the size of gradients with inner products K (N×N), for each of `numel` parameters."""

    def score(self, evidence: LayerGrams, /) -> LayerScores:
        blocks = evidence.in_float64.by_block.grams
        warn_of_zero_gradients(evidence.grams)
        values = (
            self.size(blocks[block].train_train, numel=numel if self.normalisation == "numel" else 1)
            for block, numel in zip(evidence.layers.names, evidence.layers.numel, strict=True)
        )
        return layer_scores(self, evidence, values, "undertrained")


def check_whole_influence(estimator: InfluenceEstimator) -> None:
    """Refuses settings that make a score of influences, where the influence of each row is asked for."""
    for setting, usual in (("aggregation", "all"), ("normalisation", "none")):
        if (given := getattr(estimator, setting)) != usual:
            raise ValueError(
                f"estimator.{setting}={given} makes a score of a layer, and the influence of single rows does not look "
                f"at it; use {usual}"
            )


def by_block(influences: Mapping[str, Tensor], layers: LayerMap) -> dict[str, Tensor]:
    """Gives I (M×N) of every block: the sum over its matrices."""
    return {block: reduce(add, (influences[param] for param in params)) for block, params in layers.by_block.items()}


def name_of(estimator: Any) -> str:
    """Gives the name of an estimator's file, as `estimator=` takes it."""
    return type(estimator).__module__.rpartition(".")[2]


def described(estimator: Any, **shown: object) -> str:
    """Names an estimator by its file, with its settings: `datainf(aggregation=all, …, damping=0.1)`.

    Args:
        estimator: a dataclass.
        **shown: settings that are shown in another form than they have.
    """
    values = {field.name: getattr(estimator, field.name) for field in fields(estimator)} | shown
    settings = ", ".join(f"{name}={value}" for name, value in values.items())
    return f"{name_of(estimator)}({settings})" if settings else name_of(estimator)


def layer_scores(
    estimator: Any,
    evidence: Evidence,
    values: Iterable[float],
    higher_means: Direction,
    *,
    intervals: tuple[tuple[float, float], ...] | None = None,
    **shown: object,
) -> LayerScores:
    """Gives the scores that an estimator found, one value for each layer of the evidence.

    Args:
        estimator: the source of the scores, see `described`.
        evidence: holds the layers and the fingerprint.
        values: in the order of the layers.
        higher_means: the meaning of a higher value.
        intervals: of the values, if the estimator has them.
        **shown: as for `described`.
    """
    source = described(estimator, **shown)
    return LayerScores(evidence.layers.names, tuple(values), higher_means, source, evidence.fingerprint, intervals)


def relative_damping(gram: MatrixGram, damping: float, rule: DampingRule) -> float:
    """Gives the damping, in units of the mean squared gradient entry, that makes this Gram's λ under the rule."""
    mean_square = damping_lambda(gram.train_train, numel=gram.numel, damping=1.0)
    return damping if rule == "relative" or mean_square == 0 else damping / mean_square


def damping_lambda(train_train: Tensor, *, numel: int, damping: float) -> float:
    """Gives λ = damping · tr K / (N·P): damping times the mean squared entry of the train gradients."""
    return float(damping_lambdas(train_train, numel=numel, damping=damping))


def damping_lambdas(train_train: Tensor, *, numel: int, damping: float) -> Tensor:
    """Gives `damping_lambda` of each matrix in a batch of the same size.

    Args:
        train_train: K of each (…×N×N).
        numel: P, the number of parameters behind each.
        damping: above 0.

    Returns:
        The λ of each (…), in float64.
    """
    check_value("estimator.damping", damping, Damping)
    check_value("numel", numel, Count)
    square_N = train_train.diagonal(dim1=-2, dim2=-1).double()
    return damping * square_N.sum(dim=-1) / (square_N.shape[-1] * numel)


def eigenbasis(train_train: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the spectrum of K (N, ascending, >= 0) and its eigenvectors (N×N, in columns), in float64.

    They are remembered as long as the tensor lives and is not changed in place: they are nearly all the cost of exact
    and LiSSA, and the same at every damping.
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


# (version, eigenbasis) of each K, by its identity.
_EIGENBASES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def warn_of_zero_gradients(grams: Mapping[str, MatrixGram]) -> None:
    """Warns of matrices whose train or validation gradients are all zero, by their names."""
    zero = [name for name, gram in grams.items() if not (gram.train_train.diagonal().any() and gram.val_norms.any())]
    warn_of_zero(zero, len(grams))


def warn_of_zero(zero: Sequence[str], num_matrices: int) -> None:
    """Warns of the matrices without a gradient, if there are any."""
    if zero:
        warnings.warn(
            f"all gradients are zero, so they count as nothing, in {listed(zero, 4)} ({len(zero)} of {num_matrices} "
            "matrices); for LoRA's A this is so while B is zero",
            RuntimeWarning,
            stacklevel=4,
        )
