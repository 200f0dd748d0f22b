"""Compares the losses of the arms with those of all blocks, paired by row and seed, and judges them by the rule.

    python experiments/layers_to_train_smollm2/results.py [SWEEP [--into FOLDER]]

It leaves runs.csv, losses.csv (of each test row), arms.csv and comparisons.csv in FOLDER (by default beside this file).
Runs of an earlier runs.csv and losses.csv that the sweep does not hold stay in them, so that seeds may come from
several machines. The statistics are those of `layerif-report`, for the comparisons that the README states.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.comparing import Table, all_runs
from layerif.record.record import FILE, RunRecord
from layerif.stats import all_paired_by_question, holm

SETTING, UNTOUCHED = "city", "untouched"
KEPT = 0.9  # of the fall of the loss that training all blocks brings
# Each arm with the one that it is compared to, beside all blocks of its method.
AMONG = [
    ("lora half ila", "lora half last"),
    ("lora half ila", "lora half random"),
    ("lora half layerif", "lora half last"),
    ("lora half layerif", "lora half random"),
    ("lora quarter ila", "lora quarter last"),
    ("lora quarter layerif", "lora quarter last"),
    ("full half layerif", "full half last"),
]


Losses = Mapping[str, pd.DataFrame]  # of each arm: test rows × seeds


def draw(sweep: Path, folder: Path) -> None:
    records = dict(sorted(read(sweep).items()))
    runs = all_runs([(SETTING, *run, values_of(record)) for run, record in records.items()], folder / "runs.csv")
    losses = all_losses(records, folder / "losses.csv")
    arms, pairs = costs(runs), compared(runs, losses)
    for name, table in (("arms", arms), ("comparisons", pairs)):
        table.round(4).to_csv(folder / f"{name}.csv", index=False)
        print(table.round(4).to_string(index=False), end="\n\n")


def read(sweep: Path) -> dict[tuple[str, int], RunRecord]:
    """The records by arm and seed; their folders are called so."""
    found = {}
    for file in sweep.glob(f"*-*/{FILE}"):
        arm, _, seed = file.parent.name.rpartition("-")
        found[arm.replace("_", " "), int(seed)] = RunRecord.read(file.parent)
    if (sweep / UNTOUCHED / FILE).exists():
        found[UNTOUCHED, 0] = RunRecord.read(sweep / UNTOUCHED)
    return found


def values_of(record: RunRecord) -> dict[str, float | None]:
    before = "before/" if "before/loss" in record.metrics else ""
    return {
        "loss": record.metrics[f"{before}loss"],
        "accuracy": record.metrics.get(f"{before}accuracy"),
        "trainable": record.parameters.get("trainable"),
        "s a step": record.training.get("seconds_per_step"),
        "training GB": record.training.get("memory_gb"),
    }


def all_losses(records: Mapping[tuple[str, int], RunRecord], file: Path) -> Losses:
    """Adds the loss of each test row to an earlier table, writes it, and gives it by arm."""
    of_runs = {f"{arm}-{seed}": record.losses["loss"] for (arm, seed), record in records.items() if arm != UNTOUCHED}
    table = pd.DataFrame(of_runs).rename_axis("row").sort_index()
    if file.exists():
        earlier = pd.read_csv(file, index_col="row")
        table = earlier.drop(columns=table.columns, errors="ignore").join(table, how="outer")
    table.to_csv(file, float_format="%.5g")
    by_arm: dict[str, list[str]] = {}
    for run in table.columns:
        by_arm.setdefault(run.rpartition("-")[0], []).append(run)
    found: dict[str, Table] = {arm: table[of] for arm, of in by_arm.items()}
    return {arm: of.rename(columns=lambda run: int(run.rpartition("-")[2])) for arm, of in found.items()}


def costs(runs: Table) -> pd.DataFrame:
    """One row for each arm: means over seeds of loss and accuracy, medians of seconds a step and memory."""
    wide = runs.pivot(index=["arm", "seed"], columns="metric", values="value").groupby(level="arm", sort=False)
    of = {"loss": "mean", "accuracy": "mean", "trainable": "first", "s a step": "median", "training GB": "median"}
    found = wide.agg({metric: how for metric, how in of.items() if metric in {*runs["metric"]}})
    return found.assign(seeds=wide.size()).reset_index()


def compared(runs: Table, losses: Losses) -> pd.DataFrame:
    """One row for each comparison: the arm's loss minus the other's, and what the rule says of it."""
    against_all = [(arm, f"{arm.split()[0]} all") for arm in losses if not arm.endswith(" all")]
    wanted = [pair for pair in (*against_all, *AMONG) if {*pair} <= losses.keys()]
    seeds = {pair: sorted({*losses[pair[0]]} & {*losses[pair[1]]}) for pair in wanted}
    wanted = [pair for pair in wanted if seeds[pair]]
    if not wanted:
        return pd.DataFrame()
    pairs = [
        (losses[other][seeds[arm, other]].to_numpy().T, losses[arm][seeds[arm, other]].to_numpy().T)
        for arm, other in wanted
    ]
    mean = runs[runs["metric"] == "loss"].groupby("arm")["value"].mean()
    rows = []
    for (arm, other), found in zip(wanted, all_paired_by_question(pairs, are_answers=False), strict=True):
        row: dict[str, Any] = {"arm": arm, "against": other, "seeds": found.num_seeds}
        row |= {"difference": found.value, "low": found.low, "high": found.high, "p": found.p}
        if other.endswith(" all") and UNTOUCHED in mean:
            most = (1 - KEPT) * (mean[UNTOUCHED] - mean[other])
            row |= {"allowed": most, "as good": bool(found.high <= most)}
        rows.append(row)
    table = pd.DataFrame(rows)
    table["p Holm"] = holm(table["p"].to_numpy())
    table["differs"] = (table["p Holm"] < 0.05) & ((table["low"] > 0) | (table["high"] < 0))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", type=Path, default=Path("outputs/sweeps/layers_to_train_smollm2"))
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    draw(given.sweep, given.into)
