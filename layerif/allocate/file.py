"""An allocation read from a file. It looks at no scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from layerif.allocate.allocation import Allocation, spent_budget
from layerif.checks import check_fields, check_object, check_unique, is_finite, is_number, shown
from layerif.files import read_json
from layerif.layers import LayerMap, in_layer_order
from layerif.record.older import in_todays_shape
from layerif.scores import AllocationKind, LayerScores


@dataclass(frozen=True, kw_only=True)
class SavedAllocation:
    """Reads an allocation that was written by hand or by an earlier run.

    The budget is the one that the values spend.

    Attributes:
        path: a JSON file with one of
            {"layer name": value, …} in any order; [value, …], one per layer in the model's order;
            the `record.json` of an earlier run, or its `allocation` alone with "units" and "values".
        kind: the meaning of a value. A file that states its kind must agree.
    """

    spends: ClassVar[Literal["nothing"]] = "nothing"

    path: str
    kind: AllocationKind = "experts"

    def __post_init__(self) -> None:
        check_fields(self, "allocator")

    @property
    def source(self) -> str:
        return f"file({self.path})"

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        what = f"allocation file {self.path!r}"
        names, values, kind = _saved_allocation(read_json(self.path, what="allocation file"), layers, what)
        if kind not in (None, self.kind):
            raise ValueError(f"{what} allocates {kind}, not {self.kind}; use allocator.kind={kind}")
        check_unique(names, values, what=what)
        ordered = in_layer_order(dict(zip(names, values, strict=True)), layers.names, source=what)
        for value in values:
            if not is_number(value) or not is_finite(value):
                raise ValueError(f"{what} must hold finite numbers, got {shown(value)}")
        sizes = layers.numel if self.kind == "sparsity" else None
        try:
            return Allocation(layers.names, self.kind, ordered, spent_budget(self.kind, ordered, sizes), sizes)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error


def _saved_allocation(content: Any, layers: LayerMap, what: str) -> tuple[list[str], list[Any], str | None]:
    """Finds names, values and, if the file states it, the kind."""
    if isinstance(content, list):
        return list(layers.names), content, None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{what} must hold a value per layer, as an object by layer name or as a list")
    content = in_todays_shape(content, what)
    if not content.keys() & {"decision", "allocation", "values"}:
        return list(content), list(content.values()), None
    around = check_object(content.get("decision", content), what=f"decision in {what}")
    allocation = check_object(around.get("allocation", around), what=f"allocation in {what}")
    names, values = allocation.get("units", allocation.get("layers")), allocation.get("values")
    if not isinstance(names, list) or not isinstance(values, list):
        raise ValueError(f"{what} holds no allocation: it needs lists for allocation.units and allocation.values")
    return names, values, allocation.get("kind")
