"""The content of one record as frames: for the folder of a run and for its loggers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from layerif.layers import block_of, depths, within_block
from layerif.record.names import UNTOUCHED, arm_name, has_method
from layerif.record.record import RunRecord

# Metrics that are means over questions whose answers are kept, and the name that they are kept by.
QUESTIONS = {"accuracy": "options", "generation_accuracy": "generation"}
BEFORE = "before/"  # prefix of all measurements of the untouched model
# Figures of a smaller model that stand beside those of the dense one.
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "memory_bytes", "weight_bytes", "folder_bytes")
_LEFT_OUT_IF_EMPTY = ("questions", "prune s", "fit s", "trainable", "memory GB", "state")


def frames(record: RunRecord) -> dict[str, pd.DataFrame]:
    """Returns the frames of a record by name.

    They are layers, metrics, questions, routing and sparsity, as far as the record holds them.
    """
    found: dict[str, pd.DataFrame] = {}
    if record.decision:
        found["layers"] = _layers(record)
    if metrics := numbers(record.metrics):
        found["metrics"] = pd.DataFrame({"metric": list(metrics), "value": list(metrics.values())})
    if by_row := {**record.answers, **record.losses}:
        found["questions"] = pd.DataFrame(by_row).rename_axis("question").reset_index()
    if record.routing:
        found["routing"] = pd.DataFrame(routing_rows(record.routing))
    if record.sparsity:
        found["sparsity"] = pd.DataFrame({"matrix": record.sparsity.keys(), "sparsity": record.sparsity.values()})
    return found


def _layers(record: RunRecord) -> pd.DataFrame:
    """Returns one row for each unit of the allocation, with the score of its block where there are scores.

    Rows of matrices have a column `matrix`: the name inside the block.
    """
    assert record.decision is not None
    given, scores = record.decision.allocation, record.decision.scores
    blocks, depth = [block_of(unit) for unit in given.units], depths(list(given.by_block()))
    found: dict[str, Any] = {"depth": [depth[block] for block in blocks], "layer": blocks}
    if given.is_by_matrix:
        found["matrix"] = [within_block(unit) for unit in given.units]
    if scores is not None:
        score_of = dict(zip(scores.layers, scores.values, strict=True))
        layer_of = [unit if unit in score_of else block for unit, block in zip(given.units, blocks, strict=True)]
        found["score"] = [score_of.get(layer) for layer in layer_of]
        if scores.intervals is not None:
            bounds_of = dict(zip(scores.layers, scores.intervals, strict=True))
            found["low"], found["high"] = zip(*(bounds_of.get(layer, (None, None)) for layer in layer_of), strict=True)
    return pd.DataFrame(found | {given.kind: given.values})


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics that are numbers."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def routing_rows(routing: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each block of `RunRecord.routing`."""
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


def metrics_of(record: RunRecord, prefix: str = "") -> dict[str, float]:
    """Returns the numbers that a run measured.

    Args:
        record: of the run.
        prefix: `BEFORE` gives those of its untouched model, without the prefix.
    """
    return {
        name.removeprefix(prefix): value
        for name, value in record.metrics.items()
        if isinstance(value, int | float) and name.startswith(BEFORE) == bool(prefix)
    }


def is_logarithmic(metric: str) -> bool:
    """Returns True for perplexities. Their logarithms are compared, because a change of model changes their ratio."""
    return "perplexity" in metric.rpartition("/")[2]


def is_row_loss(metric: str) -> bool:
    """Tells the loss of evaluated rows from other figures, such as the loss on validation rows while training."""
    return metric.rpartition("/")[2] == "loss" and metric != "validation/loss"


def is_fraction(metric: str) -> bool:
    """Tells accuracies, which no interval may leave 0 to 1 for, from other figures."""
    last = metric.rpartition("/")[2]
    return "accuracy" in last or (metric.startswith("lm_eval/") and last.startswith(("acc", "exact_match")))


def is_better(metric: str, difference: float) -> bool:
    """Tells if a difference is for the better: losses and perplexities should be low, all else high."""
    return (difference < 0) == (is_logarithmic(metric) or is_row_loss(metric))


def headline(names: Iterable[str]) -> list[str]:
    """Returns the metrics that get a table of their own; variants, such as the accuracy per token, do not."""
    found = list(dict.fromkeys(names))
    last = {name: name.rpartition("/")[2] for name in found}
    shown = [name for name in found if last[name] in QUESTIONS or is_logarithmic(name) or is_row_loss(name)]
    harness = [name for name in found if name.startswith("lm_eval/")]
    return shown + ([name for name in harness if "zero_shot_mean" in name] or harness)


def measured(record: RunRecord, prefix: str = "", *, every_metric: bool = False) -> dict[str, object]:
    """Returns the measurements and the cost of a run as one row.

    Args:
        record: of the run.
        prefix: `BEFORE` gives the row of its untouched model.
        every_metric: show metrics that get no table of their own as well.
    """
    metrics = metrics_of(record, prefix)
    shown: dict[str, object] = dict(metrics)
    if not every_metric:
        kept = {*headline(metrics), "accuracy_per_token", "sparsity", "bits", *SPEEDS}
        shown = {name: value for name, value in metrics.items() if name in kept}
        low, high = (metrics.get(f"accuracy_{end}") for end in ("low", "high"))
        if low is not None and high is not None:
            shown = {"accuracy": shown.pop("accuracy"), "95 % interval": f"{low:.3f} to {high:.3f}"} | shown
    is_trained, seconds = not prefix and has_method(record), record.seconds
    is_smaller = not {"pruned", "dropped", "quantised"}.isdisjoint(record.parameters)
    only_smaller = is_smaller and "trainable" not in record.parameters
    return shown | {
        "questions": len(record.answers.get(f"{prefix}{QUESTIONS['accuracy']}", {})) or None,
        "trainable": record.parameters.get("trainable") if is_trained or only_smaller else 0,
        "evidence s": None if prefix else seconds.get("evidence"),
        "fit s": seconds.get("fit") if is_trained else None,
        **(_cost_of_training(record) if is_trained else {}),
        "prune s": seconds.get("prune") if is_trained else None,
        "all s": None if prefix else sum(value for name, value in seconds.items() if not name.startswith(BEFORE)),
        "memory GB": None if prefix else record.memory_gb or None,
    }


def _cost_of_training(record: RunRecord) -> dict[str, object]:
    """Returns seconds a step and memory of a training; empty for a record that does not know them."""
    names = {"s a step": "seconds_per_step", "training GB": "memory_gb"}
    return {shown: record.training[name] for shown, name in names.items() if name in record.training}


def runs_frame(record: RunRecord) -> pd.DataFrame:
    """Returns the row of a run, below that of its untouched model where this was evaluated, too."""
    rows = []
    if any(name.startswith(BEFORE) for name in record.metrics):
        rows.append(_place(record, UNTOUCHED) | measured(record, BEFORE))
    if has_method(record) or not rows:
        rows.append(_place(record, arm_name(record)) | measured(record))
    return without_empty(pd.DataFrame(rows, dtype=object))  # so that whole numbers stay whole beside missing ones


def without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns the frame without columns of cost that no row has."""
    empty = [name for name in _LEFT_OUT_IF_EMPTY if name in frame and bool(frame[name].isna().to_numpy().all())]
    return frame.drop(columns=empty)


def _place(record: RunRecord, run: str) -> dict[str, object]:
    return {"run": run, "task": record.config["task"]["name"], "seed": record.seed}
