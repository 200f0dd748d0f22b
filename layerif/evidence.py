"""The types of evidence that estimators are given: spectra, activations, removals, skips, gates, Grams and influences.

Letters in shape suffixes: L layers, S samples, H hidden size, I inputs and O outputs of a linear layer, R rows, N train
samples, M validation samples, P parameters of a matrix, U units that can be left out.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
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
    fingerprint: str

    def metric(self, param: str) -> Tensor:
        """Gives Wanda's |W_ij|·‖X_j‖₂ (O×I), the size of each weight's part in its output over the samples."""
        weight_OI = self.weight(param).detach()
        norms_I = self.input_square_norms[param].sqrt().to(weight_OI.device, torch.float32)
        return weight_OI.float().abs() * norms_I

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
        if classes == "answer":
            rows_LRH, labels, samples = self.prompts, list(self.answers), numbers
        else:
            rows_LRH, labels, samples = self.right, ["right"] * len(numbers), numbers
            if not bool(self.wrong.isnan().all()):
                rows_LRH = torch.cat([self.right, self.wrong], dim=1)
                labels, samples = labels + ["wrong"] * len(numbers), numbers + numbers
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
class LayerSkips:
    """The predicted changes of the loss if a unit, a block or one of its two parts, is left out.

    With r what the unit adds to the hidden state, γ the gradient of a window's mean loss there and z = −γᵀr:

    Attributes:
        units: the names of the units.
        numel: the weights of each.
        unit: `block` or `sublayer`.
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
class LayerGates:
    """The score s of each block (L) whose gate σ(s) was learned on the change a trained adapter makes there."""

    layers: LayerMap
    scores: Tensor
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
class LayerInfluences:
    """I (M×N) of every matrix in `layers`, by parameter name, for estimators without Grams; I < 0 is helpful.

    Every matrix must have an influence, and all of them must have the same samples.
    """

    layers: LayerMap
    influences: Mapping[str, Tensor]
    fingerprint: str

    def __post_init__(self) -> None:
        shapes = {name: tuple(self.influences[name].shape) for name in self.layers.matrices}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"influences must be M×N of the same samples for every matrix, got {shapes}")

    @cached_property
    def halves(self) -> tuple[LayerInfluences, LayerInfluences]:
        """The influences of every other sample, and those of the others, preconditioned with all samples alike."""
        first, second = (
            LayerInfluences(self.layers, {name: I[half, half] for name, I in self.influences.items()}, self.fingerprint)
            for half in _HALVES
        )
        return first, second


def _in_float64(name: str, gram: MatrixGram) -> MatrixGram:
    solved = MatrixGram(gram.train_train.double(), gram.val_train.double(), gram.val_norms.double(), gram.numel)
    for what in GRAM_TENSORS:
        if not bool(getattr(solved, what).isfinite().all()):
            raise ValueError(
                f"the Gram {what} of {name!r} is not finite, so its gradients overflowed or are NaN; "
                "look at the loss of the probed samples, or probe in float32"
            )
    return solved
