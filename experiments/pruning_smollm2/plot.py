"""Makes the tables and plots of `experiment=pruning_smollm2`.

    python experiments/pruning_smollm2/plot.py [SWEEP [FOLDER]]

It leaves results.md, results.png and sparsity.png in FOLDER (by default beside this file). Statistics and intervals
(95 %) are those of `layerif-report`. For accuracies and their differences, a bootstrap draws calibration seeds and
questions, which are the same for all runs; Student's t over the seeds replaces it where it is wider. For perplexities
and their ratios, Student's t is taken over the logarithms at the calibration seeds, for these windows. A single run has
no interval.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogFormatter

from layerif.record.record import FILE, RunRecord
from layerif.record.text import markdown
from layerif.stats import holm, paired_by_question, paired_by_seed, t_interval

matplotlib.use("Agg")

ALLOCATIONS = {"uniform": "#000000", "datainf": "#0072b2", "reversed": "#d55e00", "random": "#009e73"}
PRUNERS = ("magnitude", "wanda", "sparsegpt")


def draw(sweep: Path, folder: Path) -> None:
    records = [RunRecord.read(file.parent) for file in sorted(sweep.glob(f"*/{FILE}"))]
    if not records:
        raise SystemExit(f"{sweep} holds no {FILE}; run experiments/pruning_smollm2/run.sh first")
    runs = table(records)
    text = [
        f"{len(records)} runs; `plot.py` explains the intervals (95 %).",
        markdown(measured(records, runs)),
        "Each allocation is compared with uniform at the same calibration windows. It is better than uniform if its "
        "perplexity ratio is below 1 or its difference of accuracies is above 0, the interval excludes 1 or 0, and p, "
        "corrected for all rows (Holm), is below 0.05:",
        markdown(against_uniform(runs)),
    ]
    (folder / "results.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))
    plot_results(records, runs, folder / "results.png")
    plot_sparsity(runs, folder / "sparsity.png")


def table(records: list[RunRecord]) -> pd.DataFrame:
    """Makes a table with one row for each run, in the order of the tables; `answers` says which ones are right."""
    runs = pd.DataFrame(
        {
            "pruner": record.choices["pruner"],
            "target": record.config["allocator"]["target"],
            "allocation": record.choices["estimator"],
            "seed": record.config["method"]["calibration"]["seed"],
            "epsilon": record.config["allocator"]["epsilon"],
            "sparsity": record.metrics["sparsity"],
            "sparsities": record.decision.allocation.values,
            "perplexity": record.metrics["perplexity_256"],
            "answers": _answers(record.answers["options"]),
        }
        for record in records
        if record.decision is not None
    )
    runs["pruner"] = pd.Categorical(runs["pruner"], PRUNERS, ordered=True)
    runs["allocation"] = pd.Categorical(runs["allocation"], list(ALLOCATIONS), ordered=True)
    keys = ["pruner", "target", "allocation", "seed"]
    if (twice := runs.duplicated(keys)).any():
        raise SystemExit(f"two runs of one setting: {runs.loc[twice, keys].iloc[0].to_dict()}; remove one's folder")
    return runs.sort_values(keys).reset_index(drop=True)


def measured(records: list[RunRecord], runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for record in [record for record in records if "before/options" in record.answers][:1]:
        dense_SQ = _answers(record.answers["before/options"])[None]
        rows.append(
            {
                "pruner": "none (dense)",
                "sparsity": "0",
                "allocation": "",
                "seeds": "",
                "perplexity": f"{record.metrics['before/perplexity_256']:.1f}",
                "accuracy": _accuracy(dense_SQ, ".2f"),
                "missed by": "",
            }
        )
    for pruner, target, allocation, group in _settings(runs):
        right_SQ = np.stack(group["answers"])
        rows.append(
            {
                "pruner": pruner,
                "sparsity": f"{target:g}",
                "allocation": allocation,
                "seeds": len(group),
                "perplexity": _of_logarithms(np.log(group["perplexity"].to_numpy()), ".1f"),
                "accuracy": _accuracy(right_SQ, ".2f"),
                "missed by": f"{(group['sparsity'] - target).abs().max():.1g}",
            }
        )
    return pd.DataFrame(rows)


def against_uniform(runs: pd.DataFrame) -> pd.DataFrame:
    reference = runs[runs["allocation"] == "uniform"].set_index(["pruner", "target", "seed"])
    rows = []
    for pruner, target, allocation, group in _settings(runs):
        keys = [(pruner, target, seed) for seed in group["seed"]]
        group = group[[key in reference.index for key in keys]]
        if allocation == "uniform" or group.empty:
            continue
        same = reference.loc[[key for key in keys if key in reference.index]]
        logs = np.log(group["perplexity"].to_numpy() / same["perplexity"].to_numpy())
        difference_SQ = np.stack(group["answers"]) - np.stack(same["answers"])
        rows.append(
            {
                "pruner": pruner,
                "sparsity": f"{target:g}",
                "allocation": allocation,
                "seeds": len(group),
                "perplexity ratio": _of_logarithms(logs, ".2f"),
                "p of the ratio": paired_by_seed(logs).p,
                "accuracy difference": _accuracy(difference_SQ, "+.2f"),
                "p of the difference": paired_by_question(difference_SQ).p,
            }
        )
    table = pd.DataFrame(rows)
    for column in [name for name in table if name.startswith("p of ")]:
        table[column] = holm(table[column].to_numpy())
    return table


def plot_results(records: list[RunRecord], runs: pd.DataFrame, file: Path) -> None:
    """Draws a point for each run: perplexity, the logarithm of its ratio to uniform's, and accuracy.

    A ratio is taken at the same calibration windows.
    """
    uniform = runs[runs["allocation"] == "uniform"].set_index(["pruner", "target", "seed"])["perplexity"].to_dict()
    keys = zip(runs["pruner"], runs["target"], runs["seed"], strict=True)
    runs = runs.assign(
        ratio=[np.log(value / uniform.get(key, np.nan)) for value, key in zip(runs["perplexity"], keys, strict=True)],
        accuracy=[answers.mean() for answers in runs["answers"]],
    )
    labels = {"perplexity": "perplexity", "ratio": "ln(perplexity / uniform's)", "accuracy": "four-way accuracy"}
    dense = next((record.metrics for record in records if "before/accuracy" in record.metrics), {})
    marks = {"perplexity": dense.get("before/perplexity_256"), "ratio": 0, "accuracy": dense.get("before/accuracy")}
    targets = sorted(runs["target"].unique())
    figure, axes = plt.subplots(len(labels), len(PRUNERS), figsize=(10, 8), squeeze=False, sharex=True)
    for row, (metric, label) in enumerate(labels.items()):
        for column, pruner in enumerate(PRUNERS):
            axis = axes[row][column]
            for number, (name, colour) in enumerate(ALLOCATIONS.items()):
                chosen = runs[(runs["pruner"] == pruner) & (runs["allocation"] == name)]
                places = [targets.index(target) + 0.15 * (number - 1.5) for target in chosen["target"]]
                axis.plot(places, chosen[metric], "o", color=colour, label=name, alpha=0.6, markersize=5)
            if marks[metric] is not None:
                axis.axhline(marks[metric], color="#999999", linestyle=":", label="" if metric == "ratio" else "dense")
            if metric == "accuracy":
                axis.axhline(0.25, color="#999999", linewidth=0.8, label="guessing")
                axis.set_ylim(0.15, 0.8)
            if metric == "perplexity":
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(LogFormatter())
                axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.8)))
            if column == 0:
                axis.set_ylabel(label)
        axes[0][row].set_title(PRUNERS[row])
    axes[0][0].set_xlim(-0.5, len(targets) - 0.5)
    axes[0][0].set_xticks(range(len(targets)), [f"{target:.0%} sparse" for target in targets])
    figure.legend(*axes[-1][0].get_legend_handles_labels(), loc="upper center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def plot_sparsity(runs: pd.DataFrame, file: Path) -> None:
    """Draws the sparsities at the lowest target, one panel for each epsilon with the pruners that have it."""
    shown = runs[(runs["target"] == runs["target"].min()) & (runs["allocation"] != "uniform")]
    panels: list[Any] = list(shown.groupby("epsilon"))
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.6 * len(panels) + 0.4), squeeze=False, sharex=True)
    for axis, (epsilon, group) in zip(axes[:, 0], panels, strict=True):
        target = group["target"].iloc[0]
        axis.axhline(target, color=ALLOCATIONS["uniform"], label="uniform")
        for name in [name for name in ALLOCATIONS if name in set(group["allocation"])]:
            distinct = dict.fromkeys(map(tuple, group.loc[group["allocation"] == name, "sparsities"]))
            for number, values in enumerate(distinct):  # random has one for each draw, the others have a single one
                style = {"color": ALLOCATIONS[name], "linewidth": 2.0 if len(distinct) == 1 else 0.9}
                axis.step(range(len(values)), values, where="mid", label=None if number else name, **style)
        pruners = ", ".join(name for name in PRUNERS if name in set(group["pruner"]))
        axis.set(title=f"{pruners} (ε = {epsilon:g})", ylabel="sparsity")
    if panels:
        axes[-1][0].set_xlabel("block")
        axes[0][0].legend(frameon=False, ncols=len(ALLOCATIONS), fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _settings(runs: pd.DataFrame) -> Iterator[tuple[str, float, str, Any]]:
    for key, group in runs.groupby(["pruner", "target", "allocation"], observed=True):
        yield *key, group  # type: ignore[misc]


def _answers(questions: dict[str, bool]) -> np.ndarray:
    return np.array([questions[name] for name in sorted(questions)], dtype=float)


def _accuracy(values_SQ: np.ndarray, digits: str) -> str:
    """Spells the mean and interval of answers, or of a difference of answers, given as seeds × questions."""
    found = paired_by_question(values_SQ)
    return _cell(found.value, found.low, found.high, digits)


def _of_logarithms(logs_S: np.ndarray, digits: str) -> str:
    mean, low, high = np.exp([logs_S.mean(), *t_interval(logs_S)])
    return _cell(mean, low, high, digits)


def _cell(value: float, low: float, high: float, digits: str) -> str:
    around = "" if np.isnan(low) else f" ({low:{digits}} to {high:{digits}})"
    return f"{value:{digits}}{around}"


if __name__ == "__main__":
    draw(
        Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/sweeps/pruning_smollm2"),
        Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent,
    )
