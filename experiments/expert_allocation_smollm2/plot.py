"""Accuracy of each allocation over seeds, and its difference to uniform paired by question.

    python experiments/expert_allocation_smollm2/plot.py outputs/sweeps/expert_allocation_smollm2 FOLDER

The statistics are those of `layerif-report`, on the comparisons this experiment is made for: all arms with uniform.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from layerif.record.record import FILE, RunRecord
from layerif.report.comparisons import verdict
from layerif.stats import holm, paired_by_question, smallest_difference

REFERENCE, BEFORE = "uniform", "before"
COLOURS = {REFERENCE: "#d55e00", BEFORE: "#999999"}
OTHER = "#0072b2"


def draw(sweep: Path, folder: Path) -> None:
    """Leave results.csv, accuracy.png and allocations.png in `folder`, and print the table."""
    records = [RunRecord.read(file.parent) for file in sorted(sweep.glob(f"*/{FILE}"))]
    if not records:
        raise SystemExit(f"{sweep} holds no runs; run experiments/expert_allocation_smollm2/run.py first")
    table = results(records)
    table.round(4).to_csv(folder / "results.csv", index=False)
    print(table.round(4).to_string(index=False))
    plot_accuracy(table, folder / "accuracy.png")
    plot_allocations(records, folder / "allocations.png")


def arm(record: RunRecord) -> str:
    """What the run is called."""
    if not record.config["method"]:
        return BEFORE
    if record.config["method"]["_target_"].endswith("EqualLoRAModule"):
        return "plain LoRA, equal size"
    if not record.scores:
        return record.source
    settings = record.config["estimator"]
    name = settings["_target_"].split(".")[-2]
    if "of" in settings:
        return f"{name} {settings['of']['_target_'].split('.')[-2]}"
    return f"{name} {settings['aggregation']}" if "aggregation" in settings else name


def results(records: list[RunRecord]) -> pd.DataFrame:
    """One row per arm and task, best first; a row's difference is its accuracy minus uniform's, at the seeds of both.

    p Holm is corrected for all arms of the task; smallest found is the difference that 80 of 100 such experiments would
    have told from none, after that correction.
    """
    answers: dict[tuple[str, str], dict[int, dict[str, bool]]] = defaultdict(dict)
    sizes: dict[tuple[str, str], int] = {}
    for record in records:
        key = record.config["task"]["name"], arm(record)
        if record.seed in answers[key]:
            raise SystemExit(f"{arm(record)} was run twice with seed {record.seed}, with other settings; remove one")
        answers[key][record.seed] = record.questions["options" if record.config["method"] else "before/options"]
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
    found = paired_by_question(matrix(by_seed, sorted(by_seed), questions))  # less an arm that is always wrong
    return {"questions": len(questions), "accuracy": found.mean, "low": found.low, "high": found.high}


def against(by_seed: dict[int, dict[str, bool]], reference: dict[int, dict[str, bool]]) -> dict[str, object]:
    shared = sorted(by_seed.keys() & reference.keys())
    if not shared:
        return {}
    questions = sorted(reference[shared[0]])
    found = paired_by_question(matrix(by_seed, shared, questions) - matrix(reference, shared, questions))
    row = {"difference": found.mean, "difference low": found.low, "difference high": found.high, "p": found.p}
    return row | {"found": found}


def matrix(by_seed: dict[int, dict[str, bool]], seeds: list[int], questions: list[str]) -> np.ndarray:
    """Right or not, seeds × questions."""
    if any(by_seed[seed].keys() != set(questions) for seed in seeds):
        raise SystemExit("the runs did not answer the same questions, so there is nothing to pair; rerun the odd ones")
    return np.array([[float(by_seed[seed][question]) for question in questions] for seed in seeds])


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """With what may be said of each difference, given that there are so many."""
    if "p" not in table:
        return table
    table["p Holm"] = holm(table["p"].to_numpy())
    compared = table["p"].notna()
    num_compared = int(compared.sum())
    founds = zip(table.pop("found"), compared, strict=True)
    table["smallest found"] = [smallest_difference(one, num_compared) if tested else None for one, tested in founds]
    bounds = table[["difference low", "difference high", "p Holm"]].itertuples(index=False, name=None)
    said = [verdict(*bound) for bound in bounds]
    table["against uniform"] = np.where(
        compared, [text.removesuffix(" than").removesuffix(" from") for text in said], ""
    )
    return table


def plot_accuracy(table: pd.DataFrame, file: Path) -> None:
    """A row a task: the accuracies, and the differences to uniform paired by question."""
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
    """Experts per block of every arm, of the first task and seed."""
    task = records[0].config["task"]["name"]
    chosen: dict[str, list[int]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        if record.config["method"] and record.config["task"]["name"] == task and "LoRA," not in arm(record):
            chosen.setdefault(arm(record), record.allocation["values"])
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
