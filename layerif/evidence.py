"""The types of evidence that estimators are given: spectra, activations, masks, skips, gates, Grams and curvature.

Letters in shape suffixes: L layers, S samples, H hidden size, I inputs and O outputs of a linear layer, R rows, N train
samples, M validation samples, Q queries, P parameters of a matrix, K dampings, E eigenvalues, U units that can be left
out.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from layerif.checks import check_choice
from layerif.layers import LayerMap, T, Unit

Classes = Literal["truth", "answer"]


@dataclass(frozen=True)
class LayerSpectra:
    """The eigenvalues of WᵀW, the squared singular values of W, of every matrix in `layers`.

    Attributes:
        layers: the blocks and their matrices.
        eigenvalues: by parameter name, ascending, float64.
        seconds: the time of the decomposition of each block's matrices.
        fingerprint: of what was measured.
    """

    layers: LayerMap
    eigenvalues: Mapping[str, Tensor]
    seconds: tuple[float, ...]
    fingerprint: str


@dataclass(frozen=True)
class LayerActivations:
    """The statistics of one forward pass over S train samples; every token of a sample counts, padding does not.

    Attributes:
        layers: the blocks and their matrices.
        input_square_norms: by parameter name, Σ over tokens of x_j² for each input j of the matrix (I).
        weight: gives a matrix (O×I) by its parameter name; the model is loaded at the first call.
        cosines: mean over tokens of cos(x_in, x_out), the block's input and output (L).
        variances: of the block's output over all tokens and dimensions (L).
        sparsities: the fraction of its entries with |a| < epsilon (L).
        num_entries: the number of these entries.
        epsilon: see `sparsities`.
        prompts, right, wrong: block outputs averaged over the tokens of the prompt, of the right output and of one
            wrong option's output in its place (L×S×H); NaN where a sample has no such token left.
        answers: the label of the right option of each sample.
        embedded: the same for the first block's input (S×H), by the names `prompts`, `right` and `wrong`.
        moments: of the `right` and the `wrong` answer of each sample, by block (L×S×4): the number of entries of the
            block's output over the answer's tokens, their sum, the sum of their squares, and the number of those with
            |a| < epsilon. All are 0 where a sample has no such token.
        fingerprint: of what was measured.
    """

    layers: LayerMap
    input_square_norms: Mapping[str, Tensor]
    weight: Callable[[str], Tensor]
    cosines: Tensor
    variances: Tensor
    sparsities: Tensor
    num_entries: int
    epsilon: float
    prompts: Tensor
    right: Tensor
    wrong: Tensor
    answers: tuple[str, ...]
    embedded: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    fingerprint: str

    def metric(self, param: str) -> Tensor:
        """Gives Wanda's |W_ij|·‖X_j‖₂ (O×I), the size of each weight's part in its output over the samples."""
        weight_OI = self.weight(param).detach()
        norms_I = self.input_square_norms[param].sqrt().to(weight_OI.device, torch.float32)
        return weight_OI.float().abs() * norms_I

    def check_epsilon(self, epsilon: float) -> None:
        """Refuses activations whose entries near zero were counted below another bound."""
        if self.epsilon != epsilon:
            raise ValueError(
                f"the activations were counted below {self.epsilon}, not below estimator.epsilon={epsilon}; take them "
                "again"
            )

    def labelled(self, classes: Classes) -> tuple[Tensor, list[str], list[int]]:
        """Gives pooled block outputs with their classes.

        Args:
            classes: `truth` sets the right output against a wrong one, two rows a sample; `answer` takes the prompt
                alone, with the label of its right answer.

        Returns:
            The outputs (L×R×H), the class of each row, and the sample that each row belongs to.

        Raises:
            ValueError: where there is one class only, or a row without tokens.
        """
        check_choice("estimator.classes", classes, get_args(Classes))
        numbers = list(range(len(self.answers)))
        parts = self._parts(classes)
        rows_LRH = torch.cat([getattr(self, part) for part in parts], dim=1)
        labels = list(self.answers) if classes == "answer" else [part for part in parts for _ in numbers]
        samples = numbers * len(parts)
        lost = int(rows_LRH.isnan().any(dim=2).any(dim=0).sum())
        if lost:
            raise ValueError(
                f"{lost} of {len(labels)} rows of estimator.classes={classes} have no token to look at: their samples "
                "are cut at probe.max_length before the answer, or have one option only; raise probe.max_length, "
                "or leave such rows out with task.keep"
            )
        if len(set(labels)) < 2:
            raise ValueError(
                f"all {len(labels)} rows of estimator.classes={classes} are of one class, {labels[0]!r}: there is "
                "nothing to tell apart; use a task with more answers, or the other of "
                f"estimator.classes={', '.join(get_args(Classes))}"
            )
        return rows_LRH.double(), labels, samples

    def embedding(self, classes: Classes) -> Tensor:
        """Gives the first block's input (R×H) for the rows of `labelled`."""
        return torch.cat([self.embedded[part] for part in self._parts(classes)]).double()

    def _parts(self, classes: Classes) -> tuple[str, ...]:
        """Names the pooled outputs whose rows have classes; the wrong ones only where there are any."""
        if classes == "answer":
            return ("prompts",)
        return ("right",) if bool(self.wrong.isnan().all()) else ("right", "wrong")


@dataclass(frozen=True)
class LayerRemovals:
    """The error that removing weights makes in the output of every matrix in `layers`, over the train samples.

    Attributes:
        layers: the blocks and their matrices.
        errors: by parameter name, Σ over tokens of ‖Δx‖² for the inputs x of the matrix and the weights Δ (O×I) that
            are removed.
        fingerprint: of what was measured.
    """

    layers: LayerMap
    errors: Mapping[str, float]
    fingerprint: str


@dataclass(frozen=True)
class LayerMasks:
    """The shares of an update that SPIDER's mask lets through, for every matrix in `layers`.

    Attributes:
        layers: the blocks and their matrices.
        sums: by parameter name, the sum of the mask over the weights of the matrix.
        fingerprint: of what was measured.
    """

    layers: LayerMap
    sums: Mapping[str, float]
    fingerprint: str


@dataclass(frozen=True)
class LayerSkips:
    """The predicted changes of the loss if a unit, a block or one of its two parts, is left out.

    With r what the unit adds to the hidden state, γ the gradient of a window's mean loss there and z = −γᵀr:

    Attributes:
        units: the names of the units.
        numel: the weights of each.
        unit: `block`, `sublayer` or `expert`.
        first: Σ z over the tokens, averaged over the windows, as each half of the windows adds to it (2×U), in nats.
        second: ½·T·Σ z² over the tokens, averaged in the same way (2×U), for T counted tokens of a window.
        source: the model and the text.
        fingerprint: of what was measured.
    """

    units: tuple[str, ...]
    numel: tuple[int, ...]
    unit: Unit
    first: Tensor
    second: Tensor
    source: Mapping[str, str]
    fingerprint: str


@dataclass(frozen=True)
class LayerExperts:
    """The norms of what every expert adds to the hidden state, with g the router's weight and f the output.

    Attributes:
        layers: the experts, each as a layer of its own.
        sums: Σ g·‖f‖ over the tokens that are sent to each expert (L, float64).
        counts: the number of these tokens (L).
        num_tokens: of all windows.
        fingerprint: of what was measured.
    """

    layers: LayerMap
    sums: Tensor
    counts: Tensor
    num_tokens: int
    fingerprint: str


@dataclass(frozen=True)
class LayerGates:
    """The score s of each block (L) whose gate σ(s) was learned on the change a trained adapter makes there."""

    layers: LayerMap
    scores: Tensor
    fingerprint: str


@dataclass(frozen=True)
class MatrixGains:
    """The effect of R leading directions of a matrix's mean train gradient on the losses.

    With Ḡ = U Σ Vᵀ the mean train gradient (O×I) and G_i that of one sample:

    Attributes:
        strengths: σ_k (R), descending.
        products: u_kᵀ Ḡᵛ v_k with the mean validation gradient, as each half of the validation samples adds to it
            (2×R).
        curvatures: the mean of (u_kᵀ G_i v_k)² over the train samples (R).
        mean_square: the mean squared entry of the G_i.
        rights: the rows of Vᵀ (R×I) in float16: they begin a fine-tuning, which needs no more.
    """

    strengths: Tensor
    products: Tensor
    curvatures: Tensor
    mean_square: float
    rights: Tensor


@dataclass(frozen=True)
class LayerGains:
    """The directions of every matrix in `layers`, by parameter name.

    Attributes:
        layers: the blocks with their matrices and shapes.
        gains: by parameter name.
        source: the model and the rows.
        fingerprint: of what was measured.
    """

    layers: LayerMap
    gains: Mapping[str, MatrixGains]
    source: Mapping[str, str]
    fingerprint: str


_HALVES = (slice(0, None, 2), slice(1, None, 2))
GRAM_TENSORS = ("train_train", "val_train", "val_norms")  # the tensors of a `MatrixGram`, in the order of its fields


@dataclass(frozen=True)
class MatrixGram:
    """Inner products of the per-sample gradients of one weight matrix, G (N×P) and V (M×P).

    Attributes:
        train_train: K = G Gᵀ (N×N).
        val_train: C = V Gᵀ (M×N).
        val_norms: ‖v_j‖ (M).
        numel: P.
    """

    train_train: Tensor
    val_train: Tensor
    val_norms: Tensor
    numel: int

    def __post_init__(self) -> None:
        num_val, num_train = self.val_train.shape
        if self.train_train.shape != (num_train, num_train) or self.val_norms.shape != (num_val,):
            raise ValueError(
                f"val_train {tuple(self.val_train.shape)} (M×N) needs train_train (N×N) and val_norms (M), "
                f"got {tuple(self.train_train.shape)} and {tuple(self.val_norms.shape)}"
            )

    def __add__(self, other: MatrixGram) -> MatrixGram:
        """Gives the Gram of both matrices' gradients laid end to end."""
        return MatrixGram(
            self.train_train + other.train_train,
            self.val_train + other.val_train,
            (self.val_norms.square() + other.val_norms.square()).sqrt(),
            self.numel + other.numel,
        )

    def select(self, train: slice | Tensor, validation: slice | Tensor) -> MatrixGram:
        """Gives the Gram as if only these samples had been measured."""
        return MatrixGram(
            self.train_train[train][:, train],
            self.val_train[validation][:, train],
            self.val_norms[validation],
            self.numel,
        )


@dataclass(frozen=True)
class CrossGram:
    """Inner products of T further gradients H (T×P), such as those of single tokens, with the gradients of a Gram.

    Attributes:
        train: G Hᵀ (N×T).
        validation: V Hᵀ (M×T).
        norms: the length of the train sample that each of them belongs to (T).
    """

    train: Tensor
    validation: Tensor
    norms: Tensor


@dataclass(frozen=True)
class LayerGrams:
    """Grams of every matrix in `layers`, by parameter name, and the fingerprint of what was measured.

    They keep the results that are derived from them for the next setting: never change a tensor in place.
    """

    layers: LayerMap
    grams: Mapping[str, MatrixGram]
    fingerprint: str
    _derived: dict[Hashable, tuple[Any, list[Any]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, derive: Callable[[], T]) -> T:
        """Derives a result once for each key, and gives the same object later, each time with the warnings it gave."""
        if key not in self._derived:
            with warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always")
                derived = derive()
            self._derived[key] = derived, [warning.message for warning in given]
        derived, messages = self._derived[key]
        for message in messages:
            warnings.warn(message, stacklevel=3)
        return derived

    @cached_property
    def in_float64(self) -> LayerGrams:
        """The Grams for solving: λ is about 1e-8 of a gradient's squared norm, and float32 cannot hold their sum.

        A Gram that is not finite is refused by the name of its matrix.
        """
        grams = {name: _in_float64(name, gram) for name, gram in self.grams.items()}
        return LayerGrams(self.layers, grams, self.fingerprint)

    @cached_property
    def by_block(self) -> LayerGrams:
        """One Gram per block, of the gradients of its matrices laid end to end; it has the block's name."""
        blocks = self.layers.by_block.items()
        grams = {block: reduce(add, (self.grams[param] for param in params)) for block, params in blocks}
        layers = LayerMap(self.layers.names, tuple((block,) for block in self.layers.names), self.layers.numel)
        return LayerGrams(layers, grams, self.fingerprint)

    @cached_property
    def halves(self) -> tuple[LayerGrams, LayerGrams]:
        """The Grams of every other sample, and those of the others: two measurements that share no sample."""
        first, second = (self.select(half, half) for half in _HALVES)
        return first, second

    def select(self, train: slice | Tensor, validation: slice | Tensor) -> LayerGrams:
        """Gives the Grams of some of the samples, without a gradient: for subsamples, halves or a bootstrap."""
        grams = {param: gram.select(train, validation) for param, gram in self.grams.items()}
        return LayerGrams(self.layers, grams, self.fingerprint)


@dataclass(frozen=True)
class CheckpointGrams:
    """Grams of the same matrices and samples at several checkpoints of one model, in the order of training.

    There must be at least one, and all of them must have the same matrices.
    """

    checkpoints: tuple[LayerGrams, ...]

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ValueError("CheckpointGrams must have the Grams of at least one checkpoint")
        for number, grams in enumerate(self.checkpoints, 1):
            if grams.layers != self.checkpoints[0].layers:
                raise ValueError(
                    f"checkpoint {number} of {len(self.checkpoints)} has other layers or matrices than the first: "
                    "give checkpoints of one model, all adapters of the same shape or all whole models"
                )

    @property
    def fingerprint(self) -> str:
        """A hash of all fingerprints in their order."""
        return hashlib.sha256(" ".join(grams.fingerprint for grams in self.checkpoints).encode()).hexdigest()

    @cached_property
    def halves(self) -> tuple[CheckpointGrams, CheckpointGrams]:
        """The Grams of every checkpoint on two disjoint halves of the samples."""
        first, second = zip(*(grams.halves for grams in self.checkpoints), strict=True)
        return CheckpointGrams(first), CheckpointGrams(second)

    def select(self, train: slice | Tensor, validation: slice | Tensor) -> CheckpointGrams:
        """Returns the Grams of every checkpoint on some of the samples."""
        return CheckpointGrams(tuple(grams.select(train, validation) for grams in self.checkpoints))


@dataclass(frozen=True)
class LayerGradients:
    """The gradients of S samples in every matrix of `layers`, laid flat, mostly projected to fewer numbers.

    Attributes:
        layers: the blocks and their matrices.
        gradients: by parameter name (S×R, for R numbers that are left of P).
        numel: P, by parameter name.
        fingerprint: of what was measured.
    """

    layers: LayerMap
    gradients: Mapping[str, Tensor]
    numel: Mapping[str, int]
    fingerprint: str

    def select(self, samples: slice | Tensor) -> LayerGradients:
        """Gives the gradients of some of the samples."""
        chosen = {param: gradient_SR[samples] for param, gradient_SR in self.gradients.items()}
        return LayerGradients(self.layers, chosen, self.numel, self.fingerprint)


# The relative dampings λ/mean g² at which influence under curvature is kept: 10⁻⁵ to 10⁵, four in every decade.
DAMPINGS = tuple(10.0 ** (number / 4) for number in range(-20, 21))
LEAST_DAMPING, MOST_DAMPING = 1e-4, 1e4
_EIGENVALUES = (0.0, *(10.0 ** (number / 40) for number in range(-400, 401)))  # relative to the mean one


def damping_weights(damping: float, kept: Sequence[float] = DAMPINGS) -> Tensor:
    """Gives the weights w_k of `DAMPINGS` with 1/(Λ + λ) = Σ_k w_k/(Λ + λ_k), whatever the eigenvalue Λ ≥ 0.

    Influence under a damped curvature is a sum of such fractions, so that its values at `DAMPINGS` give it at every
    other damping: exactly at 0.1, 1 and the other ones listed, and in between to 10⁻⁶ of each fraction.

    Args:
        damping: in units of the mean squared gradient entry, from `LEAST_DAMPING` to `MOST_DAMPING`.
        kept: the λ_k: all of `DAMPINGS`, or `damping` alone.
    """
    if not LEAST_DAMPING <= damping <= MOST_DAMPING:
        raise ValueError(
            f"the damping is {damping:.3g} times the mean squared gradient entry; curvature is kept for others, so use "
            f"one from {LEAST_DAMPING:g} to {MOST_DAMPING:g}"
        )
    kept_K = torch.tensor(list(kept), dtype=torch.float64)
    nearest = int((kept_K.log() - math.log(damping)).abs().argmin())
    if math.isclose(kept[nearest], damping, rel_tol=1e-12):
        return torch.eye(len(kept), dtype=torch.float64)[nearest]
    eigenvalues_E = torch.tensor(_EIGENVALUES, dtype=torch.float64)
    fractions_EK = (eigenvalues_E[:, None] + damping) / (eigenvalues_E[:, None] + kept_K)
    size_K = fractions_EK.amax(dim=0)
    solved = torch.linalg.lstsq(fractions_EK / size_K, torch.ones(len(eigenvalues_E), 1).double(), driver="gelsd")
    return solved.solution[:, 0] / size_K


@dataclass(frozen=True)
class MatrixCurvature:
    """Influence on some queries under several approximations of one matrix's curvature, at all of `DAMPINGS`.

    A query is a validation sample, or the sum of the losses of some of them.

    Attributes:
        influences: I at every damping (K×Q×N), by the approximation: `kfac`, `ekfac`, `shampoo`.
        mean_square: the mean squared entry of the train gradients, the unit of dampings.
        dampings: the relative dampings: all of `DAMPINGS`, or one, which alone can then be asked for.
    """

    influences: Mapping[str, Tensor]
    mean_square: float
    dampings: tuple[float, ...] = DAMPINGS

    def influence(self, approximation: str, damping: float, *, relative: bool = True) -> Tensor:
        """Gives I (Q×N) in float64; zero train gradients give zero.

        Args:
            approximation: a key of `influences`.
            damping: see `relative`.
            relative: λ = damping · `mean_square`; otherwise λ = damping.

        Raises:
            ValueError: the damping is out of the range that is kept.
        """
        influence_KQN = self.influences[approximation].double()
        if self.mean_square == 0:
            return torch.zeros_like(influence_KQN[0])
        weights_K = damping_weights(damping if relative else damping / self.mean_square, self.dampings)
        return torch.tensordot(weights_K, influence_KQN, dims=1)

    def select(self, train: slice | Tensor, queries: slice | Tensor) -> MatrixCurvature:
        """Gives the influence of some train samples on some queries, under the curvature of all train samples."""
        some = {name: found[:, queries][:, :, train] for name, found in self.influences.items()}
        return MatrixCurvature(some, self.mean_square, self.dampings)


@dataclass(frozen=True)
class LayerCurvature:
    """Influence under the curvature of every matrix in `layers`, by parameter name.

    Attributes:
        layers: the blocks and their matrices.
        matrices: of the same samples each. With two queries these are the sums over every other validation sample and
            over the others.
        fingerprint: of what was measured.
    """

    layers: LayerMap
    matrices: Mapping[str, MatrixCurvature]
    fingerprint: str

    @cached_property
    def halves(self) -> tuple[LayerCurvature, LayerCurvature]:
        """The influence of every other sample, and of the others, under the curvature of all train samples alike."""
        first, second = (
            LayerCurvature(
                self.layers, {name: each.select(half, half) for name, each in self.matrices.items()}, self.fingerprint
            )
            for half in _HALVES
        )
        return first, second


def by_expert(evidence: Any) -> Any:
    """Gives evidence in which every expert is a layer of its own, and nothing else is.

    Args:
        evidence: of a kind that keeps matrices apart, or of experts.
    """
    if isinstance(evidence, LayerMap):
        return evidence.each_expert
    if isinstance(evidence, LayerExperts):
        return evidence
    if isinstance(evidence, CheckpointGrams):
        return CheckpointGrams(tuple(map(by_expert, evidence.checkpoints)))
    return replace(evidence, layers=evidence.layers.each_expert)


def by_matrix(evidence: Any) -> Any:
    """Gives evidence in which every matrix is a layer of its own, so that it gets a score of its own.

    Args:
        evidence: of a kind that keeps matrices apart.
    """
    if isinstance(evidence, LayerMap):
        return evidence.each_matrix
    if isinstance(evidence, CheckpointGrams):
        return CheckpointGrams(tuple(map(by_matrix, evidence.checkpoints)))
    return replace(evidence, layers=evidence.layers.each_matrix)


def _in_float64(name: str, gram: MatrixGram) -> MatrixGram:
    solved = MatrixGram(gram.train_train.double(), gram.val_train.double(), gram.val_norms.double(), gram.numel)
    for what in GRAM_TENSORS:
        if not bool(getattr(solved, what).isfinite().all()):
            raise ValueError(
                f"the Gram {what} of {name!r} is not finite, so its gradients overflowed or are NaN; "
                "look at the loss of the probed samples, or probe in float32"
            )
    return solved
