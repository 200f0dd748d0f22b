"""Makes the tables and the plot of `experiment=bits_smollm2`.

    python experiments/bits_smollm2/results.py [SWEEP [--into FOLDER]]

It leaves runs.csv, results.md and results.png in FOLDER (by default beside this file). Runs of an earlier runs.csv that
the sweep does not hold stay in it. `experiments/comparing.py` explains the comparisons; a seed is a calibration choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.comparing import (
    EXPLAINED,
    METRICS,
    RUN,
    TEXTS,
    Comparison,
    Table,
    all_runs,
    cells,
    compared,
    measured,
    power,
    records_of,
)
from layerif.record.record import RunRecord
from layerif.record.text import markdown

matplotlib.use("Agg")

ONCE = ("uniform", "ends_high")  # arms that do not depend on the seed
CONTROL, UNTOUCHED = "ends_high", "as it was"


def draw(sweep: Path, folder: Path) -> None:
    found = [(*place(record), values_of(record)) for record in records_of([sweep])]
    runs = all_runs(found, folder / "runs.csv")
    text = [
        "# Where should bits go: all tables",
        f"{len(runs[RUN].drop_duplicates())} runs. {EXPLAINED}",
    ]
    for reference in ("uniform", CONTROL):
        if differences := against(runs, reference):
            text += [f"## Against {reference}", markdown(cells(differences)), power(differences)]
    text += ["## Means of the measured values", markdown(measured(runs))]
    (folder / "results.md").write_text("\n\n".join(filter(None, text)) + "\n", encoding="utf-8")
    print("\n\n".join(filter(None, text)))
    plot(against(runs, "uniform"), folder / "results.png")


def place(record: RunRecord) -> tuple[str, str, int]:
    """The setting that an arm is compared under, the arm and the seed."""
    if record.choices["method"] == "none":
        return UNTOUCHED, "dense", record.seed
    return f"{record.config['allocator']['target']:g} bits", record.choices["arm"], record.seed


def values_of(record: RunRecord) -> dict[str, float | None]:
    """The metrics that are compared, the true bits, and the predicted rise of the loss beside the real one."""
    before = "before/" * (record.choices["method"] == "none")
    curves = (record.decision and record.decision.curves) or {}
    found = {metric: record.metrics.get(f"{before}{key}") for metric, key in (TEXTS | {"loss": "loss"}).items()}
    return found | {"bits": record.metrics.get("bits")} | {key: curves.get(key) for key in ("predicted", "actual")}


def against(runs: Table, reference: str) -> list[Comparison]:
    """Compares arms with a reference; one that ran once stands beside every seed."""
    if reference in ONCE:
        once, others = runs[runs["arm"] == reference], runs[runs["arm"] != reference]
        seeds = sorted({*runs["seed"]})
        runs = pd.concat([others, *(once.assign(seed=seed) for seed in seeds)], ignore_index=True)
    return compared(runs, reference)


def plot(found: Sequence[Comparison], file: Path) -> None:
    """Draws each arm's ratio or difference to uniform over the bits, with its interval, one panel for each metric."""
    metrics = [metric for metric in METRICS if any(each.metric == metric for each in found)]
    if not metrics:
        return
    arms = list(dict.fromkeys(each.arm for each in found))
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.6 * len(metrics), 3.4), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for number, arm in enumerate(arms):
            chosen = [each for each in found if (each.metric, each.arm) == (metric, arm)]
            bits = np.array([float(each.setting.split()[0]) for each in chosen]) + 0.04 * (number - len(arms) / 2)
            values = np.array([[each.found.value, each.found.low, each.found.high] for each in chosen]).T
            value, low, high = np.exp(values) if metric in TEXTS else values
            axis.errorbar(bits, value, np.nan_to_num([value - low, high - value]), fmt="o", capsize=2, label=arm)
        axis.axhline(1 if metric in TEXTS else 0, color="#999999", linewidth=0.8)
        axis.set(
            title=metric, xlabel="bits", ylabel="perplexity / uniform's" if metric in TEXTS else "difference, nats"
        )
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", type=Path, default=Path("outputs/sweeps/bits_smollm2"))
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    draw(given.sweep, given.into)
