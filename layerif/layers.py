"""Which parameters are which layer, and the Gram matrices a probe leaves of them.

A layer is one decoder block. Everything per layer is indexed by its name, never by a position.

Letters in shape suffixes: N train samples, M validation samples, P parameters of one matrix, L layers.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any, TypeVar

from torch import Tensor

from layerif.names import did_you_mean

T = TypeVar("T")

_HALVES = (slice(0, None, 2), slice(1, None, 2))


@dataclass(frozen=True)
class LayerMap:
    """The measured parameters of each block, in the model's order.

    names: L block names, as in `model.named_modules()`.
    params: per block, the names of its measured weight matrices, as in `model.named_parameters()`.
    numel: per block, the number of entries of those matrices together.
    """

    names: tuple[str, ...]
    params: tuple[tuple[str, ...], ...]
    numel: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.params) == len(self.numel):
            raise ValueError(
                f"a LayerMap needs one entry per block: got {len(self.names)} names, "
                f"{len(self.params)} params, {len(self.numel)} numel"
            )


@dataclass(frozen=True)
class MatrixGram:
    """Inner products of the per-sample gradients of one weight matrix, G (N×P) and V (M×P).

    train_train: K = G Gᵀ (N×N); val_train: C = V Gᵀ (M×N); val_norms: ‖v_j‖ (M); numel: P.
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
        """The Gram of both matrices' gradients laid end to end."""
        return MatrixGram(
            self.train_train + other.train_train,
            self.val_train + other.val_train,
            (self.val_norms.square() + other.val_norms.square()).sqrt(),
            self.numel + other.numel,
        )

    def select(self, train: slice | Tensor, validation: slice | Tensor) -> MatrixGram:
        """The Gram as if only these samples had been measured."""
        return MatrixGram(
            self.train_train[train][:, train],
            self.val_train[validation][:, train],
            self.val_norms[validation],
            self.numel,
        )


@dataclass(frozen=True)
class LayerGrams:
    """Grams of every matrix in `layers`, by parameter name, and the fingerprint of what was measured.

    What is derived of them is kept for the next setting, as long as these Grams are: never change a tensor in place.
    """

    layers: LayerMap
    grams: Mapping[str, MatrixGram]
    fingerprint: str
    _derived: dict[Hashable, tuple[Any, list[Any]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, derive: Callable[[], T]) -> T:
        """`derive()`, and the same object for every later equal key, each time with the warnings that it gave."""
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
        """For solving: λ is about 1e-8 of a gradient's squared norm, and float32 cannot hold their sum.

        Raises ValueError naming the matrix if a Gram is not finite.
        """
        grams = {name: _in_float64(name, gram) for name, gram in self.grams.items()}
        return LayerGrams(self.layers, grams, self.fingerprint)

    @cached_property
    def by_block(self) -> LayerGrams:
        """One Gram per block, of the gradients of its matrices laid end to end; it has the block's name."""
        blocks = zip(self.layers.names, self.layers.params, strict=True)
        grams = {block: reduce(add, (self.grams[name] for name in params)) for block, params in blocks}
        layers = LayerMap(self.layers.names, tuple((block,) for block in self.layers.names), self.layers.numel)
        return LayerGrams(layers, grams, self.fingerprint)

    @cached_property
    def halves(self) -> tuple[LayerGrams, LayerGrams]:
        """Every other sample, and the others: two measurements that share no sample."""
        first, second = (self.select(half, half) for half in _HALVES)
        return first, second

    def select(self, train: slice | Tensor, validation: slice | Tensor) -> LayerGrams:
        """The Grams of a subset of the samples: no gradient is needed again for subsamples, halves or a bootstrap."""
        grams = {param: gram.select(train, validation) for param, gram in self.grams.items()}
        return LayerGrams(self.layers, grams, self.fingerprint)


@dataclass(frozen=True)
class CheckpointGrams:
    """Grams of the same matrices and samples at several checkpoints of one model, in the order of training.

    Raises ValueError if there is none, or if one was measured on other matrices than the first.
    """

    checkpoints: tuple[LayerGrams, ...]

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ValueError("CheckpointGrams need the Grams of at least one checkpoint")
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
        first, second = zip(*(grams.halves for grams in self.checkpoints), strict=True)
        return CheckpointGrams(first), CheckpointGrams(second)

    def select(self, train: slice | Tensor, validation: slice | Tensor) -> CheckpointGrams:
        return CheckpointGrams(tuple(grams.select(train, validation) for grams in self.checkpoints))


@dataclass(frozen=True)
class LayerInfluences:
    """I (M×N) of every matrix in `layers`, by parameter name, where no Gram says it; I < 0: helpful.

    Raises ValueError for a matrix without influence, or of other samples than the first.
    """

    layers: LayerMap
    influences: Mapping[str, Tensor]
    fingerprint: str

    def __post_init__(self) -> None:
        shapes = {name: tuple(self.influences[name].shape) for params in self.layers.params for name in params}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"influences must be M×N of the same samples for every matrix, got {shapes}")

    @cached_property
    def halves(self) -> tuple[LayerInfluences, LayerInfluences]:
        """Of every other sample, and of the others; what each I was preconditioned with stays that of all samples."""
        first, second = (
            LayerInfluences(self.layers, {name: I[half, half] for name, I in self.influences.items()}, self.fingerprint)
            for half in _HALVES
        )
        return first, second


def in_layer_order(by_name: Mapping[str, T], layers: Sequence[str], *, source: str) -> tuple[T, ...]:
    """The values of `by_name`, one for each of `layers`, in their order.

    source: what holds the values, for the message. Raises ValueError for an unknown or a missing layer.
    """
    known = set(layers)
    for name in by_name:
        if name not in known:
            raise ValueError(
                f"{source} names the layer {name!r}, which this model does not have{did_you_mean(name, layers)}; "
                f"its {len(layers)} layers are {layers[0]!r} to {layers[-1]!r}"
            )
    missing = [name for name in layers if name not in by_name]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of the model's {len(layers)} layers, the first is {missing[0]!r}; "
            "give every layer a value"
        )
    return tuple(by_name[name] for name in layers)


def _in_float64(name: str, gram: MatrixGram) -> MatrixGram:
    solved = MatrixGram(gram.train_train.double(), gram.val_train.double(), gram.val_norms.double(), gram.numel)
    for what in ("train_train", "val_train", "val_norms"):
        if not bool(getattr(solved, what).isfinite().all()):
            raise ValueError(
                f"the Gram {what} of {name!r} is not finite, so its gradients overflowed or are NaN; "
                "look at the loss of the probed samples, or probe in float32"
            )
    return solved
