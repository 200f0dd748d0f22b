"""What each layer gets, as a type that checks its own budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from layerif.checks import check_choice, check_unique, is_number
from layerif.scores import Kind

BUDGET_TOLERANCE = 1e-6  # of a sparsity, as a fraction of all parameters


@dataclass(frozen=True)
class Allocation:
    """What each layer gets.

    values: a count per layer (experts, rank), or the fraction of the layer's parameters to remove (sparsity).
    budget: the sum of the counts, or the parameter-weighted mean of the sparsities; checked on construction, exactly
        and to 1e-6. numel: parameters per layer, the weights of that mean; only for sparsity.
    """

    layers: tuple[str, ...]
    kind: Kind
    values: tuple[int, ...] | tuple[float, ...]
    budget: int | float
    numel: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))
        check_unique(self.layers, self.values, what=f"{self.kind} values")
        allowed = "a fraction in [0, 1]" if self.kind == "sparsity" else "a whole number >= 1"
        for layer, value in zip(self.layers, self.values, strict=True):
            if self.kind == "sparsity":
                valid = is_number(value) and 0 <= value <= 1
            else:
                valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not valid:
                raise ValueError(f"{self.kind} of layer {layer!r} must be {allowed}, got {value!r}")
        spent = spent_budget(self.kind, self.values, self.numel)
        if abs(spent - self.budget) > (BUDGET_TOLERANCE if self.kind == "sparsity" else 0):
            raise ValueError(f"the {self.kind} values spend a budget of {spent}, not the {self.budget} they were given")

    def by_name(self) -> dict[str, Any]:
        return dict(zip(self.layers, self.values, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; `from_dict` is its inverse."""
        return {
            "layers": list(self.layers),
            "kind": self.kind,
            "values": list(self.values),
            "budget": self.budget,
            "numel": None if self.numel is None else list(self.numel),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Allocation:
        return cls(
            layers=tuple(saved["layers"]),
            kind=saved["kind"],
            values=tuple(saved["values"]),
            budget=saved["budget"],
            numel=None if saved.get("numel") is None else tuple(saved["numel"]),
        )


def spent_budget(kind: Kind, values: Sequence[float], numel: Sequence[int] | None = None) -> int | float:
    """The sum of counts, or the mean of sparsities weighted by `numel`."""
    if kind != "sparsity":
        return sum(int(value) for value in values)
    weights = checked_sizes(numel, len(values))
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def checked_sizes(numel: Sequence[int] | None, num_layers: int) -> list[int]:
    if numel is None or len(numel) != num_layers or not all(weight > 0 for weight in numel):
        raise ValueError(
            f"sparsity needs numel, the number of parameters (>= 1) of each of the {num_layers} layers; got {numel}"
        )
    return [int(weight) for weight in numel]
