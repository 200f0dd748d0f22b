"""From influence to one number per layer: aggregation, smoothing, and the type that carries the direction.

Letters in shape suffixes: N train samples, M validation samples, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from layerif.checks import check_choice, check_unique, is_number

Aggregation = Literal["all", "positive", "top25"]


Direction = Literal["undertrained", "important"]


Kind = Literal["experts", "rank", "sparsity"]


SPREAD_NOISE = 1e-12  # of the largest value: a smaller spread is the rounding of equal scores


@dataclass(frozen=True)
class LayerScores:
    """One non-negative number per layer and what a higher one means.

    higher_means: `undertrained` (give more experts, rank and sparsity) or
        `important` (give more experts and rank, but less sparsity).
    source: the estimator that made them; fingerprint: what was measured.
    Raises ValueError for a value that is negative or not finite, naming its layer.
    """

    layers: tuple[str, ...]
    values: tuple[float, ...]
    higher_means: Direction
    source: str
    fingerprint: str

    def __post_init__(self) -> None:
        check_choice("higher_means", self.higher_means, get_args(Direction))
        check_unique(self.layers, self.values, what=f"scores from {self.source}")
        for layer, value in zip(self.layers, self.values, strict=True):
            if not is_number(value) or not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"scores from {self.source} must be finite numbers >= 0; got {value!r} for layer {layer!r}"
                )

    def oriented(self, kind: Kind) -> tuple[float, ...]:
        """The values as `to_experts`, `to_rank`, `to_sparsity` take them: higher = give more of `kind`.

        Only important layers under sparsity are turned round, to max − s (all 0 where the values are equal but for
        rounding, which would be all that is left); all other values stay as they are.
        """
        check_choice("kind", kind, get_args(Kind))
        if kind == "sparsity" and self.higher_means == "important":
            highest = max(self.values)
            if highest - min(self.values) <= SPREAD_NOISE * highest:
                return (0.0,) * len(self.values)
            return tuple(highest - value for value in self.values)
        return self.values

    def by_name(self) -> dict[str, float]:
        return dict(zip(self.layers, self.values, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; `from_dict` is its inverse."""
        return {
            "layers": list(self.layers),
            "values": list(self.values),
            "higher_means": self.higher_means,
            "source": self.source,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> LayerScores:
        return cls(
            layers=tuple(saved["layers"]),
            values=tuple(saved["values"]),
            higher_means=saved["higher_means"],
            source=saved["source"],
            fingerprint=saved["fingerprint"],
        )


def aggregate(influence: Tensor, how: Aggregation = "all") -> float:
    """One signed number S from the influence of every train on every validation sample (M×N).

    a_i = Σ_j I_ji over the validation samples; then
    all: S = Σ a_i; positive: only the helpful samples, a_i < 0; top25: the ⌈N/4⌉ most negative a_i, without positive
    ones. Negative S: the train samples lower the validation loss through this layer. `LayerScores` holds |S|.
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
    """Savitzky–Golay smoothing over depth; the ends follow the polynomial of the first and last window.

    window, polyorder: layers under the sliding polynomial and its order. A smoothed value can fall below the lowest
    of `values`, even below zero. Raises ValueError if there are fewer values than the window.
    """
    from scipy.signal import savgol_filter  # half a second that start-up does not pay

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
    # Smoothing the differences to one value keeps constant values exactly constant, which floats otherwise would not.
    base = levels[0]
    smoothed = savgol_filter([level - base for level in levels], window, polyorder, mode="interp")
    return [base + float(level) for level in smoothed]
