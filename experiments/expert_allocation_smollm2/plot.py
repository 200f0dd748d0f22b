"""Draws the accuracy of each allocation over seeds, and its difference to uniform paired by question.

    python experiments/expert_allocation_smollm2/plot.py outputs/sweeps/expert_allocation_smollm2 FOLDER

The statistics are those of `layerif-report`, for the comparisons of this experiment: all arms with uniform.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from layerif.record.names import estimator_choice, has_method
from layerif.record.record import FILE, RunRecord
from layerif.report.comparisons import verdict
from layerif.stats import holm, paired_by_question, smallest_difference

REFERENCE, BEFORE = "uniform", "before"
COLOURS = {REFERENCE: "#d55e00", BEFORE: "#999999"}
OTHER = "#0072b2"


def draw(sweep: Path, folder: Path) -> None:
    """Leaves results.csv, accuracy.png and allocations.png in `folder`, and prints the table."""
    records = [RunRecord.read(file.parent) for file in sorted(sweep.glob(f"*/{FILE}"))]
    if not records:
        raise SystemExit(f"{sweep} holds no runs; run experiments/expert_allocation_smollm2/run.py first")
    table = results(records)
    table.round(4).to_csv(folder / "results.csv", index=False)
    print(table.round(4).to_string(index=False))
    plot_accuracy(table, folder / "accuracy.png")
    plot_allocations(records, folder / "allocations.png")


def arm(record: RunRecord) -> str:
    """Returns the name of the run's allocation, or of the baseline that the run is."""
    if not has_method(record) or record.decision is None:
        return BEFORE
    if record.choices["method"] == "lora_equal":
        return "plain LoRA, equal size"
    if record.decision.scores is None:
        return record.decision.source
    aggregation = record.config["estimator"].get("aggregation")
    return f"{estimator_choice(record)} {aggregation}" if aggregation else estimator_choice(record)


def results(records: list[RunRecord]) -> pd.DataFrame:
    """Makes a table with one row for each arm and task, best first.

    A difference is the arm's accuracy minus uniform's, at the seeds that both have. `p Holm` is corrected for all arms
    of the task. `smallest found` is the difference that 80 of 100 such experiments would have found after that
    correction.
    """
    answers: dict[tuple[str, str], dict[int, dict[str, bool]]] = defaultdict(dict)
    sizes: dict[tuple[str, str], int] = {}
    for record in records:
        key = record.config["task"]["name"], arm(record)
        if record.seed in answers[key]:
            raise SystemExit(f"{arm(record)} was run twice with seed {record.seed}, with other settings; remove one")
        answers[key][record.seed] = record.answers["options" if has_method(record) else "before/options"]
        sizes[key] = record.parameters.get("trainable", 0)
    tables = []
    for task in dict.fromkeys(task for task, _ in answers):
        by_arm = {name: by_seed for (of, name), by_seed in answers.items() if of == task}
        rows = [
            {"task": task, "arm": name, "seeds": len(by_seed), "trainable": sizes[task, name], **of_arm(by_seed)}
            | (against(by_seed, by_arm.get(REFERENCE, {})) if name not in COLOURS else {})
            for name, by_seed in by_arm.items()
        ]
        tables.append(corrected(pd.DataFrame(rows).sort_values("accuracy", ascending=False, kind="stable")))
    return pd.concat(tables, ignore_index=True)


def of_arm(by_seed: dict[int, dict[str, bool]]) -> dict[str, float]:
    questions = sorted(next(iter(by_seed.values())))
    found = paired_by_question(matrix(by_seed, sorted(by_seed), questions))  # minus an arm that is always wrong
    return {"questions": len(questions), "accuracy": found.value, "low": found.low, "high": found.high}


def against(by_seed: dict[int, dict[str, bool]], reference: dict[int, dict[str, bool]]) -> dict[str, Any]:
    shared = sorted(by_seed.keys() & reference.keys())
    if not shared:
        return {}
    questions = sorted(reference[shared[0]])
    found = paired_by_question(matrix(by_seed, shared, questions) - matrix(reference, shared, questions))
    row = {"difference": found.value, "difference low": found.low, "difference high": found.high, "p": found.p}
    return row | {"found": found}


def matrix(by_seed: dict[int, dict[str, bool]], seeds: list[int], questions: list[str]) -> np.ndarray:
    """Returns which answers are right, as seeds × questions."""
    if any(by_seed[seed].keys() != set(questions) for seed in seeds):
        raise SystemExit("the runs did not answer the same questions, so there is nothing to pair; rerun the odd ones")
    return np.array([[float(by_seed[seed][question]) for question in questions] for seed in seeds])


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Corrects p for the number of comparisons, and adds each difference in words."""
    if "p" not in table:
        return table
    table["p Holm"] = holm(table["p"].to_numpy())
    compared = table["p"].notna()
    num_compared = int(np.count_nonzero(compared))
    founds = zip(table.pop("found"), compared, strict=True)
    table["smallest found"] = [smallest_difference(one, num_compared) if tested else None for one, tested in founds]
    bounds = table[["difference low", "difference high", "p Holm"]].itertuples(index=False, name=None)
    said = [verdict(*bound) for bound in bounds]
    table["against uniform"] = np.where(
        compared, [text.removesuffix(" than").removesuffix(" from") for text in said], ""
    )
    return table


def plot_accuracy(table: pd.DataFrame, file: Path) -> None:
    """Draws one row a task: the accuracies, and the differences to uniform, paired by question."""
    tasks = list(table["task"].unique())
    heights = [len(table[table["task"] == task]) for task in tasks]
    size = (11, 0.32 * sum(heights) + 1.1 * len(tasks) + 0.3)
    ratios = {"height_ratios": heights, "width_ratios": (1, 1)}
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=size, squeeze=False, sharey="row", gridspec_kw=ratios, layout="constrained"
    )
    for (left, right), task in zip(axes, tasks, strict=True):
        rows = table[table["task"] == task].iloc[::-1].reset_index(drop=True)
        questions, seeds = int(rows["questions"].max()), int(rows["seeds"].max())
        num = f"{questions} questions, {seeds} seed{'s' * (seeds > 1)}"
        intervals(left, rows, "accuracy", "low", "high")
        left.set_yticks(rows.index, rows["arm"])
        left.set_xlabel(f"accuracy on {num}, 95 % interval")
        left.set_title(task, loc="left")
        if "difference" in rows:
            intervals(right, rows.dropna(subset="difference"), "difference", "difference low", "difference high")
        right.axvline(0, color=COLOURS[REFERENCE], linewidth=0.8, linestyle=":")
        right.set_xlabel("difference to uniform, paired by question and seed, 95 % interval")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def intervals(axes: Axes, rows: pd.DataFrame, value: str, low: str, high: str) -> None:
    colours = [COLOURS.get(name, OTHER) for name in rows["arm"]]
    axes.hlines(rows.index, rows[low], rows[high], colors=colours, linewidth=2)
    axes.scatter(rows[value], rows.index, color=colours, zorder=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def plot_allocations(records: list[RunRecord], file: Path) -> None:
    """Draws the experts per block of every arm, for the first task and seed."""
    task = records[0].config["task"]["name"]
    chosen: dict[str, list[Any]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        if has_method(record) and record.config["task"]["name"] == task and "LoRA," not in arm(record):
            assert record.decision is not None
            chosen.setdefault(arm(record), list(record.decision.allocation.values))
    figure, axis = plt.subplots(figsize=(9, 0.4 * len(chosen) + 1.2))
    image = axis.imshow(list(chosen.values()), aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set_yticks(range(len(chosen)), list(chosen))
    axis.set_xlabel("block")
    axis.set_title(f"{task}: experts per block, first seed (random ones are others at each)")
    figure.colorbar(image, ax=axis, label="experts", pad=0.01)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
