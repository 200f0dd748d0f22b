"""An allocation: a value for each unit, as a type that checks its own budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from layerif.checks import check_choice, check_unique, is_number
from layerif.scores import AllocationKind

COUNTS: tuple[AllocationKind, ...] = ("experts", "rank")  # kinds of which a unit may have any number
BUDGET_TOLERANCE = 1e-6  # allowed error of a mean that is weighted by parameters
MEANS: tuple[AllocationKind, ...] = ("sparsity", "bits")  # kinds whose budget is such a mean, and not a sum of counts


@dataclass(frozen=True)
class Allocation:
    """The values that the units (blocks or matrices) get.

    Attributes:
        units: names of blocks or matrices.
        kind: the meaning of a value.
        values: a count per unit (experts, rank; 0 for one without an adapter), the fraction of the unit's parameters to
            remove (sparsity), the bits of each of its weights (bits), or 1 for a unit that stays (blocks) or is trained
            (layers), else 0.
        budget: the sum of the counts, or the parameter-weighted mean of sparsities or bits. It is checked on
            construction: counts exactly, a mean to 1e-6.
        sizes: parameters per unit, the weights of that mean; only for sparsity and bits.
        source: what the values belong to, by part (the model, the pruner, the text of its masks), where they must not
            be spent elsewhere; empty where they fit anywhere.

    Raises:
        ValueError: names the unit whose value is not allowed, or the budget that the values really spend.
    """

    units: tuple[str, ...]
    kind: AllocationKind
    values: tuple[int, ...] | tuple[float, ...]
    budget: int | float
    sizes: tuple[int, ...] | None = None
    source: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(AllocationKind))
        check_unique(self.units, self.values, what=f"{self.kind} values")
        allowed = _ALLOWED[self.kind]
        for unit, value in zip(self.units, self.values, strict=True):
            if not is_allowed(self.kind, value):
                raise ValueError(f"{self.kind} of {unit!r} must be {allowed}, got {value!r}")
        if self.kind in COUNTS and not any(self.values):
            raise ValueError(f"the {self.kind} of all {len(self.units)} units is 0; give at least one of them 1")
        spent = spent_budget(self.kind, self.values, self.sizes)
        if abs(spent - self.budget) > (BUDGET_TOLERANCE if self.kind in MEANS else 0):
            raise ValueError(
                f"the {self.kind} values spend a budget of {spent}, not the {self.budget} they were given; "
                f"give budget={spent}, or other values"
            )

    def by_name(self) -> dict[str, Any]:
        """Gives the value of each unit, by the unit's name."""
        return dict(zip(self.units, self.values, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values that JSON can hold; `from_dict` is its inverse."""
        return {
            "units": list(self.units),
            "kind": self.kind,
            "values": list(self.values),
            "budget": self.budget,
            "sizes": None if self.sizes is None else list(self.sizes),
            "source": dict(self.source),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Allocation:
        """Makes the allocation that `to_dict` was called on."""
        return cls(
            units=tuple(saved["units"]),
            kind=saved["kind"],
            values=tuple(saved["values"]),
            budget=saved["budget"],
            sizes=None if saved.get("sizes") is None else tuple(saved["sizes"]),
            source=saved.get("source") or {},
        )


_ALLOWED: Mapping[AllocationKind, str] = {
    "experts": "a whole number >= 0",
    "rank": "a whole number >= 0",
    "sparsity": "a fraction in [0, 1]",
    "bits": "a number above 0 and at most 32",
    "blocks": "0 or 1",
    "layers": "0 or 1",
}


def is_allowed(kind: AllocationKind, value: Any) -> bool:
    """Tells if a unit can have this value."""
    if not is_number(value) or (kind not in MEANS and not isinstance(value, int)):
        return False
    if kind == "sparsity":
        return 0 <= value <= 1
    if kind == "bits":
        return 0 < value <= 32
    return value in (0, 1) if kind in ("blocks", "layers") else value >= 0


def spent_budget(kind: AllocationKind, values: Sequence[float], sizes: Sequence[int] | None = None) -> int | float:
    """Gives the sum of counts, or the mean of sparsities or bits weighted by `sizes`."""
    if kind not in MEANS:
        return sum(int(value) for value in values)
    weights = checked_sizes(sizes, len(values))
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def checked_sizes(sizes: Sequence[int] | None, num_units: int) -> list[int]:
    """Gives the sizes as a list, and refuses them unless there is one for each unit, at least 1."""
    if sizes is None or len(sizes) != num_units or not all(size > 0 for size in sizes):
        raise ValueError(
            f"a mean needs sizes, the number of parameters (at least 1) of each of {num_units} units; got {sizes}"
        )
    return [int(size) for size in sizes]
