"""Makes the tables and the plot of the experiment, each arm at the learning rate that validation chose for it.

    python experiments/capacity_smollm2/plot.py                 # results.md and results.png beside this file
    python experiments/capacity_smollm2/plot.py --settings      # the tasks and ranks to compare arms at, by the rule

Losses are paired by row and seed. Intervals (95 %) and p are those of `layerif-report` for losses; Holm corrects p over
one table.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.arms import arms, by_arm, compared, read, tuned
from layerif.record.record import RunRecord
from layerif.record.text import markdown

matplotlib.use("Agg")

HERE = Path(__file__).parent
SWEEPS = Path("outputs/sweeps")
BLOCKS = 30
STEPS = ((8, 64), (1, 8))  # pairs of ranks: where more of the second pays, arms are compared at the first
# Beside each arm with uniform: do gain curves beat scores, does their start help, and must they be the task's own?
GAINS = [
    ("gain_curves", "layerif_all"),
    ("gain_curves_init", "gain_curves"),
    ("gain_curves", "gain_curves_of_capital"),
]
AT = {8: 8, 1: 2}  # the mean rank of the comparison; a mean of 1 leaves nothing to move
SEEDS = ("1,2,3,4", "1,2")  # beside seed 0: on the task where capacity binds most, and on the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", action="store_true")
    parser.add_argument("--all", action="store_true", help="every task, ten seeds")
    parser.add_argument("--sweeps", type=Path, default=SWEEPS)
    parser.add_argument("--into", type=Path, default=HERE)
    given = parser.parse_args()
    ranks = by_task(read(given.sweeps / "capacity_smollm2_ranks"))
    if not ranks:
        raise SystemExit("no runs yet; run experiments/capacity_smollm2/run.sh first")
    if given.settings:
        for task, rank, seeds in settings(ranks, every=given.all):
            print(task, rank, seeds)
        return
    draw(ranks, by_task(read(given.sweeps / "capacity_smollm2")), given.into)


def by_task(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    found: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        found[record.config["task"]["name"]].append(record)
    return found


def by_rank(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    found: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        found[f"rank {record.config['allocator']['budget'] // BLOCKS}"].append(record)
    return found


def binding(ranks: Mapping[str, Sequence[RunRecord]]) -> pd.DataFrame:
    """Compares each rank with the next lower one on each task, with one correction over all."""
    pairs = {
        f"{task} {name}": runs for task, records in ranks.items() for name, runs in tuned(by_rank(records)).items()
    }
    wanted = [(f"{task} rank {high}", f"{task} rank {low}") for task in ranks for low, high in STEPS]
    return compared(pairs, wanted)


def settings(ranks: Mapping[str, Sequence[RunRecord]], *, every: bool = False) -> list[tuple[str, int, str]]:
    """Gives task, mean rank and further seeds of the comparison, by the README's rule; empty where nothing binds."""
    table = binding(ranks)
    found: dict[str, tuple[float, int]] = {}
    for row in table.to_dict("records") if len(table) else ():
        task, low = row["against"].rpartition(" rank ")[::2]
        if row["differs"] and row["difference"] < 0 and task not in found:
            found[task] = row["difference"], AT[int(low)]
    order = sorted(found, key=lambda task: (-found[task][1], found[task][0]))
    if every:
        return [(task, found[task][1], "1,2,3,4,5,6,7,8,9") for task in order]
    return [(task, found[task][1], seeds) for task, seeds in zip(order, SEEDS, strict=False)]


def draw(ranks: Mapping[str, Sequence[RunRecord]], runs: Mapping[str, Sequence[RunRecord]], folder: Path) -> None:
    text = ["# Where does capacity bind, and which allocation of rank pays? All tables"]
    for task, records in ranks.items():
        text += [f"## Uniform ranks on {task}", markdown(spelt(arms(by_rank(records))))]
    text += ["## More rank against less", markdown(spelt(binding(ranks)))]
    for task, records in runs.items():
        groups = by_arm(records)
        pairs = [(arm, "uniform") for arm in groups if arm != "uniform"] + GAINS
        text += [f"## Arms on {task}", markdown(spelt(arms(groups)))]
        text += [f"## Against uniform on {task}", markdown(spelt(compared(tuned(groups), pairs)))]
    (folder / "results.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text))
    plot_sizes(ranks, runs, folder / "results.png")


def spelt(table: pd.DataFrame) -> pd.DataFrame:
    """Rounds the numbers of a table as a reader wants them."""
    digits = {"p": 3, "p Holm": 3, "seconds": 0, "size": 4}
    return table.round({name: digits.get(name, 4) for name in table.columns})


def plot_sizes(ranks: Mapping[str, Sequence[RunRecord]], runs: Mapping[str, Sequence[RunRecord]], file: Path) -> None:
    """Draws the loss against trainable parameters, one panel a task: uniform ranks as a line, arms as points."""
    figure, axes = plt.subplots(1, len(ranks), figsize=(3.4 * len(ranks), 3.6), squeeze=False)
    for axis, (task, records) in zip(axes[0], ranks.items(), strict=True):
        line = arms(by_rank(records)).sort_values("trainable")
        axis.plot(line["trainable"], line["loss"], "o-", color="#0072b2", label="uniform ranks")
        for (_, row), marker in zip(_rows(runs.get(task, ())), "sv^<>DPX*ph8d", strict=False):
            axis.plot(row["trainable"], row["loss"], marker, label=row["arm"], markersize=5)
        axis.set(xscale="log", title=task, xlabel="trainable parameters")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("loss on test rows (nats)")
    axes[0][-1].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _rows(records: Sequence[RunRecord]) -> list[tuple[Any, Any]]:
    return list(arms(by_arm(records)).iterrows()) if records else []


if __name__ == "__main__":
    main()
