"""An allocation read from a file; no scores are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from layerif.allocate.allocation import Allocation, spent_budget
from layerif.checks import check_choice, check_unique, is_number
from layerif.files import read_json
from layerif.layers import LayerMap, in_layer_order
from layerif.scores import Kind, LayerScores


@dataclass(frozen=True, kw_only=True)
class SavedAllocation:
    """An allocation written by hand or by an earlier run.

    path: a JSON file with one of
        {"layer name": value, …} in any order; [value, …], one per layer in the model's order;
        the `record.json` of an earlier run, or its `allocation` alone with "layers" and "values".
    kind: what the values are; a file that states its kind must agree. The budget is what the values add up to.
    """

    needs_scores: ClassVar[bool] = False

    path: str
    kind: Kind = "experts"

    def __post_init__(self) -> None:
        check_choice("allocator.kind", self.kind, get_args(Kind))

    @property
    def source(self) -> str:
        return f"file({self.path})"

    def __call__(self, scores: LayerScores, layers: LayerMap) -> Allocation:
        what = f"allocation file {self.path!r}"
        names, values, kind = _saved_allocation(read_json(self.path, what="allocation file"), layers, what)
        if kind not in (None, self.kind):
            raise ValueError(f"{what} allocates {kind}, not {self.kind}; use allocator.kind={kind}")
        check_unique(names, values, what=what)
        ordered = in_layer_order(dict(zip(names, values, strict=True)), layers.names, source=what)
        if not all(is_number(value) for value in values):
            raise ValueError(f"{what} must hold numbers, got {next(v for v in values if not is_number(v))!r}")
        sizes = layers.numel if self.kind == "sparsity" else None
        try:
            return Allocation(layers.names, self.kind, ordered, spent_budget(self.kind, ordered, sizes), sizes)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error


def _saved_allocation(content: Any, layers: LayerMap, what: str) -> tuple[list[str], list[Any], str | None]:
    """Names, values and, if the file states it, the kind."""
    if isinstance(content, list):
        return list(layers.names), content, None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{what} must hold a value per layer, as an object by layer name or as a list")
    if "allocation" not in content and "values" not in content:
        return list(content), list(content.values()), None
    allocation = content.get("allocation", content)
    names = allocation.get("layers", content.get("layers")) if isinstance(allocation, dict) else None
    values = allocation.get("values") if isinstance(allocation, dict) else None
    if not isinstance(names, list) or not isinstance(values, list):
        raise ValueError(f"{what} holds no allocation: it needs lists for layers and allocation.values")
    return names, values, allocation.get("kind")
