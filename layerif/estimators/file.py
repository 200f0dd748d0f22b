"""Saved scores in place of measured ones: those of an earlier run, or scores written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from layerif.checks import check_choice, check_object, check_unique
from layerif.files import read_json
from layerif.layers import LayerMap, in_layer_order
from layerif.probe.nothing import Nothing
from layerif.record.older import in_todays_shape
from layerif.scores import Direction, LayerScores


@dataclass(frozen=True, kw_only=True)
class SavedScores:
    """Reads scores by layer name, in any order.

    A file that is missing, broken or incomplete is refused, and so are names that are not the model's layers.

    Attributes:
        path: a JSON file, either the `record.json` of an earlier run or
            {"layers": [names], "values": [numbers >= 0], "higher_means": "undertrained" | "important"}.
    """

    path: str

    @property
    def needs(self) -> Nothing:
        return Nothing((self.path,))

    def score(self, evidence: LayerMap, /) -> LayerScores:
        what = f"scores file {self.path!r}"
        saved = _saved_scores(read_json(self.path, what="scores file"), what)
        check_choice(f"higher_means in {what}", saved["higher_means"], get_args(Direction))
        check_unique(saved["layers"], saved["values"], what=what)
        values = in_layer_order(dict(zip(saved["layers"], saved["values"], strict=True)), evidence.names, source=what)
        source = f"file({self.path}: {saved['source']})" if saved.get("source") else f"file({self.path})"
        return LayerScores(evidence.names, values, saved["higher_means"], source, str(saved.get("fingerprint", "none")))


def _saved_scores(content: Any, what: str) -> dict[str, Any]:
    """Finds `layers`, `values`, `higher_means` and, if they are there, `source` and `fingerprint`."""
    saved = in_todays_shape(content, what) if isinstance(content, dict) else {}
    if "decision" in saved:  # a record
        decision = check_object(saved["decision"], what=f"decision in {what}")
        scores = check_object(decision.get("scores"), what=f"decision.scores in {what}")
        saved = {**scores, "source": decision.get("source"), "fingerprint": saved.get("fingerprint") or "none"}
    missing = [key for key in ("layers", "values", "higher_means") if saved.get(key) is None]
    if missing:
        raise ValueError(
            f"{what} lacks {', '.join(missing)}; it must be a run's record.json or hold layers (names), "
            "values (numbers) and higher_means (undertrained or important)"
        )
    if not isinstance(saved["layers"], list) or not isinstance(saved["values"], list):
        raise ValueError(f"{what} must hold lists for layers and values, as many values as layers")
    return saved
