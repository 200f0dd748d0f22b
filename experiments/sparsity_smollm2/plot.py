"""Makes the tables and plots of `experiment=sparsity_smollm2`.

    python experiments/sparsity_smollm2/plot.py [SWEEP … [--into FOLDER]]

It leaves runs.csv, results.md, results.png and sparsity.png in FOLDER (by default beside this file). Runs of an earlier
runs.csv that no sweep holds stay in it, because the pieces take hours and need not run on one machine.

A run is compared with the reference at the same calibration choice: the ratio of perplexities, and the difference of
the loss of the right answer. Student's t over the choices gives intervals (95 %) and p, as `layerif-report` does. Holm
corrects p over one table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from layerif.layers import block_of, within_block
from layerif.record.record import FILE, RunRecord
from layerif.record.text import markdown
from layerif.stats import Difference, holm, paired_by_seed, smallest_difference

matplotlib.use("Agg")

HERE = Path(__file__).parent
SWEEPS = [Path(f"outputs/sweeps/sparsity_smollm2{which}") for which in ("", "_tasks", "_others")]
KEYS = ["setting", "arm", "seed", "metric"]
Table = Any  # a DataFrame of pandas, whose stubs do not know what its own selections return
METRICS = {  # of a record, by the name in tables
    "documentation": "perplexity_256",
    "factbook": "factbook/perplexity_256",
    "plays": "plays/perplexity_256",
    "loss": "loss",
    "predicted": "predicted",  # and the next: the rise of the loss that curves predict, and the one that came
    "actual": "actual",
}
TEXTS = ("documentation", "factbook", "plays")
MAIN = "wanda, 60 %, city"
DRAWN = ("first_block_spared", "straight_line", "layerif_all", "curves_diagonal", "curves")


class Comparison(NamedTuple):
    """An arm beside the reference, by one metric of one setting.

    Attributes:
        found: the difference of logarithms of perplexities, or of losses.
        p: corrected over the table.
        smallest: the smallest difference that the table finds with 80 % power.
    """

    setting: str
    metric: str
    arm: str
    found: Difference
    p: float
    smallest: float

    @property
    def is_ratio(self) -> bool:
        return self.metric in TEXTS

    @property
    def cell(self) -> str:
        values = [self.found.value, self.found.low, self.found.high]
        value, low, high = np.exp(values) if self.is_ratio else values
        digits = ".2f" if self.is_ratio else "+.2f"
        around = "" if np.isnan(low) else f" ({low:{digits}} to {high:{digits}})"
        return f"{value:{digits}}{around}{' *' if self.p < 0.05 else ''}"


def draw(sweeps: Sequence[Path], folder: Path) -> None:
    records = [RunRecord.read(file.parent) for sweep in sweeps for file in sorted(sweep.glob(f"*/{FILE}"))]
    runs = with_earlier(table(records), folder / "runs.csv")
    if runs.empty:
        raise SystemExit(f"{', '.join(map(str, sweeps))}: no {FILE}; run experiments/sparsity_smollm2/run.sh first")
    runs.to_csv(folder / "runs.csv", index=False, float_format="%.5g")
    text = [
        "# Where should sparsity go: all tables",
        f"{len(runs[KEYS[:3]].drop_duplicates())} runs. Perplexities are ratios to the reference of the same "
        "calibration choice, the loss on the task is a difference in nats a token; intervals (95 %) are Student's t "
        "over calibration choices. A star says that p, corrected over the table (Holm), is below 0.05. A single choice "
        "has neither.",
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


def table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Makes a table with one row for each metric of each run: setting, arm, seed, metric, value."""
    rows = []
    for record in records:
        curves = (record.decision and record.decision.curves) or {}
        for metric, key in METRICS.items():
            value = record.metrics.get(key, curves.get(key))
            if value is not None:
                rows.append((setting_of(record), record.choices["arm"], record.seed, metric, value))
    runs = pd.DataFrame(rows, columns=[*KEYS, "value"])
    if (twice := runs.duplicated(KEYS)).any():
        raise SystemExit(f"two runs of one setting: {runs.loc[twice, KEYS].iloc[0].to_dict()}; remove one's folder")
    return runs


def with_earlier(runs: Table, file: Path) -> Table:
    """Adds the rows of an earlier table, except those of runs that are there anew."""
    if not file.exists():
        return runs
    earlier = pd.read_csv(file)
    anew = earlier.set_index(KEYS[:3]).index.isin(runs.set_index(KEYS[:3]).index)
    return pd.concat([earlier[~anew], runs], ignore_index=True)


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


def compared(runs: Table, reference: str) -> list[Comparison]:
    """Compares each arm with the reference, paired by seed: logarithms of perplexities, and losses."""
    found: list[tuple[str, str, str, Difference]] = []
    groups: Any = runs.groupby(["setting", "metric"], sort=False)
    for (setting, metric), group in groups:
        if metric not in (*TEXTS, "loss"):
            continue
        values = np.log(group["value"]) if metric in TEXTS else group["value"]
        of_arm = {
            arm: of.set_index("seed")["value"] for arm, of in group.assign(value=values).groupby("arm", sort=False)
        }
        for arm in of_arm if reference in of_arm else ():
            difference_S = (of_arm[arm] - of_arm[reference]).dropna().to_numpy()
            if arm != reference and len(difference_S):
                found.append((str(setting), str(metric), str(arm), paired_by_seed(difference_S)))
    p = holm([difference.p for *_, difference in found]) if found else []
    number = max(1, int(np.isfinite([difference.p for *_, difference in found]).sum()))
    return [
        Comparison(setting, metric, arm, difference, float(corrected), smallest_difference(difference, number))
        for (setting, metric, arm, difference), corrected in zip(found, p, strict=True)
    ]


def cells(found: Sequence[Comparison]) -> pd.DataFrame:
    rows: dict[tuple[str, str], dict[str, object]] = {}
    several = len({each.setting for each in found}) > 1
    for each in found:
        named = {"setting": each.setting} if several else {}
        row = rows.setdefault((each.setting, each.arm), {**named, "arm": each.arm, "choices": each.found.num_seeds})
        row[each.metric] = each.cell
    return pd.DataFrame(list(rows.values())).fillna("")


def power(found: Sequence[Comparison]) -> str:
    """Says the smallest differences that a table finds in 80 % of repetitions, by its median arm."""
    said = []
    for metric in (*TEXTS, "loss"):
        smallest = [each.smallest for each in found if each.metric == metric and np.isfinite(each.smallest)]
        if smallest:
            least = float(np.median(smallest))
            said.append(f"{metric} {least:.2f} nats" if metric == "loss" else f"{metric} {np.expm1(least):.1%}")
    return f"Smallest difference found with 80 % power, median over arms: {', '.join(said)}." if said else ""


def measured(runs: pd.DataFrame) -> pd.DataFrame:
    """Gives the means of the values themselves over the choices: geometric ones of perplexities."""
    is_text = runs["metric"].isin(TEXTS)
    logs = runs.assign(value=runs["value"].where(~is_text, np.log(runs["value"])))
    by_metric: Any = logs.groupby(KEYS[:2] + KEYS[3:], sort=False)["value"].mean()
    means = by_metric.unstack("metric").reset_index()
    for metric in means.columns.intersection(list(METRICS)):
        means[metric] = [
            "" if np.isnan(value) else f"{np.exp(value):.1f}" if metric in TEXTS else f"{value:.2f}"
            for value in means[metric]
        ]
    return means


def plot_results(found: Sequence[Comparison], file: Path) -> None:
    """Draws each arm's ratio or difference to uniform with its interval, one panel for each text."""
    metrics = [metric for metric in METRICS if any(each.metric == metric for each in found)]
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
