"""Table and plots of `experiment=pruning_smollm2`: `python experiments/pruning_smollm2/plot.py [FOLDER]`.

Writes results.md, results.png and sparsity.png beside this file. Intervals are 95 %: Wilson's over the questions of one
seed for accuracies, Student's t over calibration seeds for means of three; each stands for itself, uncorrected.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from scipy import stats

from layerif.record import FILE, RunRecord

matplotlib.use("Agg")

HERE = Path(__file__).parent
ALLOCATIONS = {"uniform": "#000000", "datainf": "#0072b2", "reversed": "#d55e00", "random": "#009e73"}
PRUNERS = ("magnitude", "wanda", "sparsegpt")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/sweeps/pruning_smollm2")
    records = [RunRecord.read(file.parent) for file in sorted(folder.rglob(FILE))]
    if not records:
        sys.exit(f"{folder} holds no {FILE}: run experiments/pruning_smollm2/run.sh first")
    table = rows(records)
    text = [f"{len(records)} runs.", _as_text(summarised(table))]
    text += [
        "Against uniform, paired by calibration seed:",
        _as_text(against_uniform(table)),
        _as_text(before(records)),
    ]
    (HERE / "results.md").write_text("\n\n".join(text) + "\n")
    plot_results(table, HERE / "results.png")
    plot_sparsity(records, HERE / "sparsity.png")
    print("\n\n".join(text))


def rows(records: list[RunRecord]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "pruner": record.config["pruner"]["_target_"].rpartition(".")[2].lower(),
            "target": record.config["allocator"]["target"],
            "allocation": _allocation(record),
            "seed": record.config["method"]["calibration"]["seed"],
            "sparsity": record.metrics["sparsity"],
            "perplexity": record.metrics["perplexity_256"],
            "accuracy": record.metrics["accuracy"],
            "low": record.metrics["accuracy_low"],
            "high": record.metrics["accuracy_high"],
        }
        for record in records
    )


def summarised(table: pd.DataFrame) -> pd.DataFrame:
    """One row a setting: means over calibration seeds and their intervals."""
    found = []
    for key, runs in table.groupby(["pruner", "target", "allocation"]):
        pruner, target, allocation = key  # type: ignore[misc]
        single = len(runs) == 1
        accuracy = (runs["low"].iloc[0], runs["high"].iloc[0]) if single else interval(runs["accuracy"])
        found.append(
            {
                "pruner": pruner,
                "sparsity": target,
                "allocation": allocation,
                "seeds": len(runs),
                "perplexity": f"{runs['perplexity'].mean():.2f}{_bounds(interval(runs['perplexity']), 2)}",
                "accuracy": f"{runs['accuracy'].mean():.3f}{_bounds(accuracy, 3)}",
                "largest miss of the target": f"{(runs['sparsity'] - target).abs().max():.1e}",
            }
        )
    order = {name: number for number, name in enumerate([*PRUNERS, *ALLOCATIONS])}
    return pd.DataFrame(found).sort_values(["pruner", "sparsity", "allocation"], key=lambda c: c.map(order).fillna(c))


def against_uniform(table: pd.DataFrame) -> pd.DataFrame:
    """ln perplexity and accuracy minus those of the uniform allocation with the same calibration windows."""
    wide = table.set_index(["pruner", "target", "seed", "allocation"])[["perplexity", "accuracy"]].unstack()
    found = []
    for name in [name for name in ALLOCATIONS if name != "uniform" and ("perplexity", name) in wide]:
        changes = pd.DataFrame(
            {
                "ln perplexity": np.log(wide["perplexity", name]) - np.log(wide["perplexity", "uniform"]),
                "accuracy": wide["accuracy", name] - wide["accuracy", "uniform"],
            }
        )
        for key, change in changes.dropna().groupby(level=["pruner", "target"]):
            pruner, target = key  # type: ignore[misc]
            bounds = {column: _bounds(interval(change[column]), 3) for column in change}
            cells = {column: f"{change[column].mean():+.3f}{bounds[column]}" for column in change}
            found.append({"pruner": pruner, "sparsity": target, "allocation": name, **cells})
    return pd.DataFrame(found)


def before(records: list[RunRecord]) -> pd.DataFrame:
    dense = next((record for record in records if "before/accuracy" in record.metrics), None)
    metrics = {} if dense is None else dense.metrics
    kept = {name: value for name, value in metrics.items() if name.startswith("before/")}
    return pd.DataFrame([kept] if kept else [])


def interval(values: Any) -> tuple[float, float] | None:
    """Student's t over the seeds; none for a single one."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def plot_results(table: pd.DataFrame, file: Path) -> None:
    figure, axes = plt.subplots(2, len(PRUNERS), figsize=(10, 6), squeeze=False, sharex=True)
    for column, pruner in enumerate(PRUNERS):
        for number, (name, colour) in enumerate(ALLOCATIONS.items()):
            runs = table[(table["pruner"] == pruner) & (table["allocation"] == name)]
            shifted = runs["target"] + 0.01 * (number - 1.5)
            for row, metric in enumerate(("perplexity", "accuracy")):
                axes[row][column].plot(shifted, runs[metric], "o", color=colour, label=name, alpha=0.7)
        axes[0][column].set(title=pruner, yscale="log")
        # Plain numbers: some panels span less than a power of ten.
        axes[0][column].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes[0][column].yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes[0][column].yaxis.set_minor_formatter(NullFormatter())
        axes[1][column].set(xlabel="sparsity", xticks=sorted(table["target"].unique()))
    axes[0][0].set_ylabel("perplexity, 256 tokens")
    axes[1][0].set_ylabel("four-way accuracy")
    axes[0][0].legend(frameon=False)
    _write(figure, file)


def plot_sparsity(records: list[RunRecord], file: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 3.5))
    for name, colour in ALLOCATIONS.items():
        chosen = [r for r in records if _allocation(r) == name and r.config["allocator"]["target"] == 0.5]
        if chosen:
            axis.step(
                range(len(chosen[0].layers)), chosen[0].allocation["values"], where="mid", color=colour, label=name
            )
    axis.set(xlabel="block", ylabel="sparsity at 50 %")
    if axis.has_data():
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _write(figure, file)


def _write(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _allocation(record: RunRecord) -> str:
    return record.config["estimator"]["_target_"].rpartition(".")[2].lower()


def _bounds(bounds: tuple[float, float] | None, digits: int) -> str:
    return "" if bounds is None else f" ({bounds[0]:.{digits}f} to {bounds[1]:.{digits}f})"


def _as_text(frame: pd.DataFrame) -> str:
    if frame.empty:
        return "(none yet)"
    header = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [*header, *frame.to_numpy().tolist()])


if __name__ == "__main__":
    main()
