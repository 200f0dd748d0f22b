"""Makes the tables and plots of `experiment=sparsity_smollm2`.

    python experiments/sparsity_smollm2/plot.py [SWEEP … [--into FOLDER]]

It leaves runs.csv, results.md, results.png and sparsity.png in FOLDER (by default beside this file). Runs of an earlier
runs.csv that no sweep holds stay in it, because the pieces take hours and need not run on one machine.

`experiments/comparing.py` explains the comparisons; a seed is a calibration choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from experiments.comparing import (
    EXPLAINED,
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
from layerif.layers import block_of, within_block
from layerif.record.record import RunRecord
from layerif.record.text import markdown

matplotlib.use("Agg")

HERE = Path(__file__).parent
SWEEPS = [Path(f"outputs/sweeps/sparsity_smollm2{which}") for which in ("", "_tasks", "_others")]
MAIN = "wanda, 60 %, city"
DRAWN = ("first_block_spared", "straight_line", "layerif_all", "curves_diagonal", "curves")


def draw(sweeps: Sequence[Path], folder: Path) -> None:
    records = records_of(sweeps)
    runs = all_runs(
        [(setting_of(record), record.choices["arm"], record.seed, values_of(record)) for record in records],
        folder / "runs.csv",
    )
    text = [
        "# Where should sparsity go: all tables",
        f"{len(runs[RUN].drop_duplicates())} runs. {EXPLAINED}",
    ]
    for reference in ("uniform", "first_block_spared", "curves"):
        for title, chosen in families(runs):
            if found := compared(chosen, reference):
                text += [f"## {title}, against {reference}", markdown(cells(found)), power(found)]
    text += ["## Means of the measured values", markdown(measured(runs))]
    (folder / "results.md").write_text("\n\n".join(filter(None, text)) + "\n", encoding="utf-8")
    print("\n\n".join(filter(None, text)))
    plot_results(compared(runs[runs["setting"] == MAIN], "uniform"), folder / "results.png")
    plot_sparsity(records, folder / "sparsity.png")


def values_of(record: RunRecord) -> dict[str, float | None]:
    """The metrics that are compared, and the rise of the loss that curves predict beside the one that came."""
    curves = (record.decision and record.decision.curves) or {}
    found = {metric: record.metrics.get(key) for metric, key in (TEXTS | {"loss": "loss"}).items()}
    return found | {key: curves.get(key) for key in ("predicted", "actual")}


def setting_of(record: RunRecord) -> str:
    """Names what an arm is compared under: pruner, sparsity, task, and what differs from the main grid."""
    config, target = record.config, record.config["allocator"].get("target")
    pattern = config["pruner"].get("m")
    windows = config["method"]["calibration"]["num_windows"]
    parts = [
        record.choices["pruner"],
        f"n of {pattern}" if pattern else "",
        f"{target:.0%}".replace("%", " %"),
        f"{windows} windows" if windows != 16 else "",
        config["task"]["name"] if "loss" in record.metrics else "",
    ]
    return ", ".join(part for part in parts if part)


def families(runs: Table) -> list[tuple[str, Table]]:
    """Splits the runs into the tables that p is corrected over: one for each task, and one for all other settings."""
    is_main = runs["setting"].isin(runs.loc[runs["metric"] == "loss", "setting"])
    found = [(str(setting), chosen) for setting, chosen in runs[is_main].groupby("setting", sort=False)]
    return [*found, ("other pruners, sparsities and windows", runs[~is_main])]


def plot_results(found: Sequence[Comparison], file: Path) -> None:
    """Draws each arm's ratio or difference to uniform with its interval, one panel for each text."""
    metrics = [metric for metric in (*TEXTS, "loss") if any(each.metric == metric for each in found)]
    first = {each.arm: each.found.value for each in found if each.metric == metrics[0]}
    arms = sorted(first, key=lambda arm: first[arm], reverse=True)
    figure, axes = plt.subplots(1, len(metrics), figsize=(11, 0.9 + 0.28 * len(arms)), squeeze=False, sharey=True)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for each in [each for each in found if each.metric == metric and each.arm in first]:
            values = [each.found.value, each.found.low, each.found.high]
            value, low, high = np.exp(values) if each.is_ratio else values
            place, colour = arms.index(each.arm), "#d55e00" if each.arm.startswith("curves") else "#0072b2"
            if np.isfinite(low) and each.found.num_seeds > 2:
                axis.plot([low, high], [place, place], color=colour, linewidth=1.2, alpha=0.6)
            axis.plot(value, place, "o", color=colour, markersize=5, fillstyle="full" if each.p < 0.05 else "none")
        axis.axvline(1 if metric != "loss" else 0, color="#999999", linewidth=0.8)
        axis.set_title("loss on city" if metric == "loss" else metric, fontsize=10)
        axis.set_xlabel("difference in nats" if metric == "loss" else "perplexity / uniform's", fontsize=9)
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(range(len(arms)), arms, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def plot_sparsity(records: Sequence[RunRecord], file: Path) -> None:
    """Draws the main grid's sparsities of the first choice: by block for some arms, by matrix for curves."""
    chosen = {
        record.choices["arm"]: record.decision.allocation
        for record in records
        if setting_of(record) == MAIN and record.seed == 0 and record.decision is not None
    }
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), height_ratios=(1.2, 1))
    for arm in [arm for arm in DRAWN if arm in chosen]:
        values = list(chosen[arm].by_block().values())
        axes[0].step(range(len(values)), values, where="mid", label=arm, linewidth=2 if arm == "curves" else 1.2)
    axes[0].axhline(0.6, color="#000000", linewidth=0.8, label="uniform")
    axes[0].set(ylabel="sparsity", xlabel="block", xlim=(-0.5, 29.5))
    axes[0].legend(frameon=False, fontsize=8, ncols=3)
    if "curves" in chosen and all(map(within_block, chosen["curves"].units)):
        of = dict(zip(chosen["curves"].units, chosen["curves"].values, strict=True))
        blocks, matrices = list(dict.fromkeys(map(block_of, of))), list(dict.fromkeys(map(within_block, of)))
        values = [[of[f"{block}.{matrix}"] for block in blocks] for matrix in matrices]
        image = axes[1].imshow(values, aspect="auto", cmap="viridis", vmin=0.2, vmax=0.9)
        axes[1].set_yticks(range(len(matrices)), matrices, fontsize=8)
        axes[1].set_xlabel("block")
        figure.colorbar(image, ax=axes[1], label="sparsity by curves", pad=0.01)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", type=Path, default=SWEEPS)
    parser.add_argument("--into", type=Path, default=HERE)
    given = parser.parse_args()
    draw(given.sweeps, given.into)
