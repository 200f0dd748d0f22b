"""Accuracy of each allocation over seeds, and its difference to uniform paired by question.

    python experiments/expert_allocation_smollm2/plot.py outputs/sweeps/expert_allocation_smollm2 FOLDER

Intervals: percentile bootstrap that draws seeds and, within them, questions, 95 %. Test: the questions' mean
differences over seeds under random signs, two-sided, with Holm's correction over all arms of a task.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from layerif.record import FILE, RunRecord

RESAMPLES = 10_000
REFERENCE = "uniform"


def draw(sweep: Path, folder: Path) -> None:
    """Leave results.csv, accuracy.png and allocations.png in `folder`, and print the table."""
    records = [RunRecord.read(file.parent) for file in sorted(sweep.glob(f"*/{FILE}"))]
    if not records:
        raise SystemExit(f"{sweep} holds no runs; run experiments/expert_allocation_smollm2/run.py first")
    table = results(records)
    table.to_csv(folder / "results.csv", index=False)
    print(table.to_string(index=False))
    plot_accuracy(table, folder / "accuracy.png")
    plot_allocations(records, folder / "allocations.png")


def arm(record: RunRecord) -> str:
    """What the run is called."""
    if not record.config["method"]:
        return "before"
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
    answers: dict[tuple[str, str], dict[int, dict[str, bool]]] = defaultdict(dict)
    sizes: dict[tuple[str, str], int] = {}
    for record in records:
        key = record.config["task"]["name"], arm(record)
        if record.seed in answers[key]:
            raise SystemExit(f"{arm(record)} was run twice with seed {record.seed}, with other settings; remove one")
        answers[key][record.seed] = record.questions["options" if record.config["method"] else "before/options"]
        sizes[key] = record.parameters.get("trainable", 0)
    rows = []
    for (task, name), by_seed in answers.items():
        seeds = sorted(by_seed)
        right_SQ = np.array([[float(by_seed[seed][question]) for question in sorted(by_seed[seed])] for seed in seeds])
        low, high = interval(right_SQ)
        row = {"task": task, "arm": name, "seeds": len(seeds), "questions": right_SQ.shape[1]}
        row |= {"trainable": sizes[task, name], "accuracy": right_SQ.mean(), "low": low, "high": high}
        reference = answers.get((task, REFERENCE), {})
        shared = [seed for seed in seeds if seed in reference]
        if name not in (REFERENCE, "before") and shared:
            difference_SQ = np.array(
                [
                    [float(by_seed[seed][q]) - float(reference[seed][q]) for q in sorted(by_seed[seed])]
                    for seed in shared
                ]
            )
            low, high = interval(difference_SQ)
            row |= {"difference": difference_SQ.mean(), "difference low": low, "difference high": high}
            row["p"] = sign_test(difference_SQ.mean(axis=0))
        rows.append(row)
    table = pd.DataFrame(rows).sort_values(["task", "accuracy"], ascending=[True, False])
    if "p" in table:
        table["p Holm"] = table.groupby("task")["p"].transform(holm)
    return table.round(4)


def interval(values_SQ: np.ndarray) -> tuple[float, float]:
    """Of the mean: seeds drawn with replacement, and questions within the draw."""
    rng = np.random.default_rng(0)
    num_seeds, num_questions = values_SQ.shape
    means = []
    for _ in range(RESAMPLES):
        drawn = values_SQ[rng.integers(num_seeds, size=num_seeds)]
        means.append(drawn[:, rng.integers(num_questions, size=num_questions)].mean())
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def sign_test(difference_Q: np.ndarray) -> float:
    """Share of random signs of the questions' differences with a mean at least as far from zero."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(RESAMPLES, len(difference_Q)))
    found = np.abs(signs @ difference_Q) >= abs(difference_Q.sum()) - 1e-9
    return float((1 + found.sum()) / (1 + RESAMPLES))


def holm(p: pd.Series) -> pd.Series:
    ordered = p.dropna().sort_values()
    corrected = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    return corrected.reindex(p.index)


def plot_accuracy(table: pd.DataFrame, file: Path) -> None:
    tasks = list(table["task"].unique())
    heights = table.groupby("task").size().max()
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.6 * len(tasks) + 1, 0.38 * heights + 1.3), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        rows = table[table["task"] == task].iloc[::-1].reset_index(drop=True)
        colours = [
            "#d55e00" if name == REFERENCE else "#999999" if name == "before" else "#0072b2" for name in rows["arm"]
        ]
        for place, row in rows.iterrows():
            axis.plot([row["low"], row["high"]], [place, place], color=colours[int(str(place))], linewidth=2)
        axis.scatter(rows["accuracy"], rows.index, color=colours, zorder=3)
        for value in rows.loc[rows["arm"] == REFERENCE, "accuracy"]:
            axis.axvline(value, color="#d55e00", linewidth=0.8, linestyle=":")
        axis.set_yticks(rows.index, rows["arm"])
        questions, seeds = int(rows["questions"].max()), int(rows["seeds"].max())
        axis.set_xlabel(f"accuracy on {questions} questions, {seeds} seed{'s' * (seeds > 1)}, 95 % interval")
        axis.set_title(task)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


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
    axis.set_title(f"{task}: experts per block")
    figure.colorbar(image, ax=axis, label="experts", pad=0.01)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
