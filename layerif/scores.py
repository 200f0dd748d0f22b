"""One score per layer: the aggregation of influence, smoothing over depth, and the type that carries the direction.

Letters in shape suffixes: N train samples, M validation samples, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from layerif.checks import check_choice, check_unique, is_finite, is_number

Aggregation = Literal["all", "positive", "top25"]
Direction = Literal["undertrained", "important"]
AllocationKind = Literal["experts", "rank", "sparsity", "bits", "blocks", "layers"]

_TURNED_ROUND: Mapping[AllocationKind, Direction] = {
    "sparsity": "important",
    "bits": "undertrained",
    "blocks": "undertrained",
}

SPREAD_NOISE = 1e-12  # times the largest value; a smaller spread is the rounding of equal scores


@dataclass(frozen=True)
class LayerScores:
    """One non-negative number per layer, and the meaning of a higher one.

    A value that is negative or not finite is refused by the name of its layer.

    Attributes:
        layers: the names of the layers.
        values: one for each layer.
        higher_means: `undertrained` (train it, give it more experts, rank and sparsity, but fewer bits, and drop it
            first) or `important` (train it, give it more experts, rank and bits, but less sparsity, and keep it).
        source: the estimator that made the scores.
        fingerprint: of what was measured.
        intervals: the 95 % interval (low, high) of each value, from an estimator that measures several sets of samples;
            a bound may lie below 0.
    """

    layers: tuple[str, ...]
    values: tuple[float, ...]
    higher_means: Direction
    source: str
    fingerprint: str
    intervals: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        check_choice("higher_means", self.higher_means, get_args(Direction))
        check_unique(self.layers, self.values, what=f"scores from {self.source}")
        for layer, value in zip(self.layers, self.values, strict=True):
            if not is_number(value) or not is_finite(value) or value < 0:
                raise ValueError(
                    f"scores from {self.source} must be finite numbers >= 0; got {value!r:.40} for layer {layer!r}"
                )
        if self.intervals is not None:
            check_unique(self.layers, self.intervals, what=f"intervals from {self.source}")

    def oriented(self, kind: AllocationKind) -> tuple[float, ...]:
        """Gives the values as `to_experts`, `to_rank`, `to_sparsity` and their like take them: a higher one gets more.

        Important layers under sparsity, and undertrained ones under bits and blocks, are turned round, to max − s, or
        to 0 where the values differ by rounding alone. All other values stay as they are.
        """
        check_choice("kind", kind, get_args(AllocationKind))
        if self.higher_means == _TURNED_ROUND.get(kind):
            highest = max(self.values)
            if highest - min(self.values) <= SPREAD_NOISE * highest:
                return (0.0,) * len(self.values)
            return tuple(highest - value for value in self.values)
        return self.values

    def by_name(self) -> dict[str, float]:
        """Gives the value of each layer, by the layer's name."""
        return dict(zip(self.layers, self.values, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values that JSON can hold; `from_dict` is its inverse."""
        return {
            "layers": list(self.layers),
            "values": list(self.values),
            "higher_means": self.higher_means,
            "source": self.source,
            "fingerprint": self.fingerprint,
            **({} if self.intervals is None else {"intervals": [list(bounds) for bounds in self.intervals]}),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> LayerScores:
        """Makes the scores that `to_dict` was called on."""
        return cls(
            layers=tuple(saved["layers"]),
            values=tuple(saved["values"]),
            higher_means=saved["higher_means"],
            source=saved["source"],
            fingerprint=saved["fingerprint"],
            intervals=tuple((low, high) for low, high in saved["intervals"]) if "intervals" in saved else None,
        )


def aggregate(influence: Tensor, how: Aggregation = "all") -> float:
    """Sums the influence of all train samples on all validation samples to one signed number S.

    A negative S says that the train samples lower the validation loss through this layer. `LayerScores` holds |S|.

    Args:
        influence: I (M×N); a_i = Σ_j I_ji is its sum over the validation samples.
        how: `all` sums all a_i; `positive` only those of helpful samples, a_i < 0; `top25` the ⌈N/4⌉ most negative
            a_i, without positive ones.
    """
    check_choice("aggregation", how, get_args(Aggregation))
    if influence.ndim != 2 or 0 in influence.shape:
        raise ValueError(f"influence must be M×N (validation × train samples), got shape {tuple(influence.shape)}")
    of_train_N = influence.double().sum(dim=0)
    if how == "all":
        return float(of_train_N.sum())
    helpful = of_train_N.clamp(max=0)
    if how == "positive":
        return float(helpful.sum())
    return float(helpful.sort().values[: math.ceil(len(helpful) / 4)].sum())


def smooth(values: Sequence[float], window: int = 7, polyorder: int = 3) -> list[float]:
    """Smooths over depth by Savitzky and Golay; the ends follow the polynomial of the first and the last window.

    A smoothed value can fall below the lowest of `values`, even below zero.

    Args:
        values: one per layer.
        window: the layers under the sliding polynomial.
        polyorder: its order.

    Raises:
        ValueError: if there are fewer values than the window.
    """
    from scipy.signal import savgol_filter  # it takes half a second, which start-up should not pay

    if window % 2 == 0 or not 0 <= polyorder < window:
        raise ValueError(f"smoothing needs an odd window > polyorder >= 0; got window={window}, polyorder={polyorder}")
    if len(values) < window:
        raise ValueError(
            f"smoothing with window={window} needs at least {window} layers, got {len(values)}; "
            "use allocator.smoothing=false"
        )
    levels = [float(value) for value in values]
    if not all(math.isfinite(level) for level in levels):
        raise ValueError(f"smoothing needs finite values, got {levels}")
    # Smoothing the differences to one value keeps constant values exactly constant, in spite of rounding.
    base = levels[0]
    smoothed = savgol_filter([level - base for level in levels], window, polyorder, mode="interp")
    return [base + float(level) for level in smoothed]
