"""An allocation read from a file. It looks at no scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from layerif.allocate.allocation import COUNTS, MEANS, Allocation, spent_budget
from layerif.allocate.curves import sizes_of
from layerif.checks import check_fields, check_object, check_unique, is_finite, is_number, shown
from layerif.files import read_json
from layerif.layers import LayerMap, Unit, in_layer_order, within_block
from layerif.record.older import in_todays_shape
from layerif.scores import AllocationKind, LayerScores


@dataclass(frozen=True, kw_only=True)
class SavedAllocation:
    """Reads an allocation that was written by hand or by an earlier run.

    The budget is the one that the values spend. An allocation that an earlier run made by curves keeps its source, so
    that it is not spent on another model or by another pruner.

    Attributes:
        path: a JSON file with one of
            {"layer name": value, …} in any order, or {"matrix name": value, …} for sparsity, bits, rank and experts (of
            these two only the matrices that get an adapter need one), or {"name of an attention or MLP": value, …} for
            blocks;
            [value, …], one per layer in the model's order;
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
        names, values, kind, source = _saved_allocation(read_json(self.path, what="allocation file"), layers, what)
        if kind not in (None, self.kind):
            raise ValueError(f"{what} allocates {kind}, not {self.kind}; use allocator.kind={kind}")
        check_unique(names, values, what=what)
        unit = self._unit(names, layers, what)
        units, numel = sizes_of(layers, unit)
        if unit == "matrix" and self.kind in COUNTS:  # the adapter knows which matrices need a value
            units = tuple(name for name in units if name in {*names}) or units
        ordered = in_layer_order(dict(zip(names, values, strict=True)), units, source=what, unit=unit)
        for value in values:
            if not is_number(value) or not is_finite(value):
                raise ValueError(f"{what} must hold finite numbers, got {shown(value)}")
        sizes = numel if self.kind in MEANS else None
        try:
            return Allocation(units, self.kind, ordered, spent_budget(self.kind, ordered, sizes), sizes, source)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error

    def _unit(self, names: Sequence[str], layers: LayerMap, what: str) -> Unit:
        """Tells if the names are those of blocks, of matrices or of parts of blocks, and refuses a mixture."""
        blocks = [name for name in names if name in layers.names]
        matrices = [name for name in names if name not in layers.names and within_block(name)]
        if blocks and matrices:
            raise ValueError(
                f"{what} gives values to blocks ({blocks[0]}) and to matrices ({matrices[0]}), and an allocator gives "
                f"them to one or the other; name matrices alone, or use method=prune method.allocation={self.path}, "
                "which takes an object of both"
            )
        if matrices and self.kind == "blocks":
            return "sublayer"
        if matrices and self.kind not in (*MEANS, *COUNTS):
            raise ValueError(
                f"{what} gives {self.kind} to matrices ({matrices[0]}), and only {', '.join((*MEANS, *COUNTS))} can be "
                f"given to matrices; name the {len(layers.names)} layers {layers.names[0]!r} to {layers.names[-1]!r}"
            )
        return "matrix" if matrices else "block"


def _saved_allocation(
    content: Any, layers: LayerMap, what: str
) -> tuple[list[str], list[Any], str | None, dict[str, str]]:
    """Finds names, values and, if the file states them, the kind and the source."""
    if isinstance(content, list):
        return list(layers.names), content, None, {}
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{what} must hold a value per layer, as an object by layer name or as a list")
    content = in_todays_shape(content, what)
    if not content.keys() & {"decision", "allocation", "values"}:
        return list(content), list(content.values()), None, {}
    around = check_object(content.get("decision", content), what=f"decision in {what}")
    allocation = check_object(around.get("allocation", around), what=f"allocation in {what}")
    names, values = allocation.get("units", allocation.get("layers")), allocation.get("values")
    if not isinstance(names, list) or not isinstance(values, list):
        raise ValueError(f"{what} holds no allocation: it needs lists for allocation.units and allocation.values")
    return names, values, allocation.get("kind"), _source(allocation, what)


def _source(allocation: dict[str, Any], what: str) -> dict[str, str]:
    source = allocation.get("source")
    if source is not None and (
        not isinstance(source, dict) or any(not isinstance(part, str) for part in source.values())
    ):
        raise ValueError(f"allocation.source in {what} must be an object of texts; got {shown(source)}")
    return source or {}
