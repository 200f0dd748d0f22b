"""What one record holds, as frames: for a run's own folder and for its loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from layerif.record.record import RunRecord


def frames(record: RunRecord) -> dict[str, pd.DataFrame]:
    """By name; what the record does not hold is left out."""
    found: dict[str, pd.DataFrame] = {}
    if record.allocation:
        scores = {"score": record.scores} if record.scores else {}  # none with an allocation from a file
        values = {record.allocation["kind"]: record.allocation["values"]}
        found["layers"] = pd.DataFrame({"depth": range(len(record.layers)), "layer": record.layers, **scores, **values})
    if metrics := numbers(record.metrics):
        found["metrics"] = pd.DataFrame({"metric": list(metrics), "value": list(metrics.values())})
    if record.questions:
        found["questions"] = pd.DataFrame(record.questions).rename_axis("question").reset_index()
    if record.routing:
        found["routing"] = pd.DataFrame(routing_rows(record.routing))
    if record.sparsity:
        found["sparsity"] = pd.DataFrame({"matrix": record.sparsity.keys(), "sparsity": record.sparsity.values()})
    return found


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def routing_rows(routing: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of `RunRecord.routing`, one row a block."""
    return [
        {
            "layer": block,
            "entropy": usage["entropy"],
            "lowest load": min(usage["load"]),
            "highest load": max(usage["load"]),
            "load": " ".join(f"{load:.3f}" for load in usage["load"]),
        }
        for block, usage in routing.items()
    ]
