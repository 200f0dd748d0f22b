"""Makes the tables and the plot of the experiment, each arm at the learning rate that validation chose for it.

    python experiments/mixture_smollm2/plot.py                  # results.md and results.png beside this file

Losses are paired by row and seed. Intervals (95 %) and p are those of `layerif-report` for losses; Holm corrects p over
one table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.arms import ByArm, arms, by_arm, compared, read, tuned
from layerif.layers import depths
from layerif.record.record import RunRecord
from layerif.record.text import markdown

matplotlib.use("Agg")

HERE = Path(__file__).parent
PLAIN, UNIFORM = "plain_lora", "uniform"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", type=Path, default=Path("outputs/sweeps/mixture_smollm2"))
    parser.add_argument("--into", type=Path, default=HERE)
    given = parser.parse_args()
    records = read(given.sweep)
    if not records:
        raise SystemExit(f"{given.sweep} holds no runs; run experiments/mixture_smollm2/run.sh first")
    draw(records, given.into)


def draw(records: Sequence[RunRecord], folder: Path) -> None:
    groups = by_arm(records)
    runs = tuned(groups)
    pairs = [(arm, PLAIN) for arm in runs if arm != PLAIN]
    pairs += [(arm, UNIFORM) for arm in runs if arm not in (PLAIN, UNIFORM)]
    tables = {
        "Arms": arms(groups),
        "Against plain LoRA, and against the uniform mixture": compared(runs, pairs),
        "Loss by task": by_source(runs),
        "Experts": experts(runs),
    }
    text = ["# Does the mixture earn its router? All tables"]
    for title, table in tables.items():
        text += [f"## {title}", markdown(table.round(4))]
    (folder / "results.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text))
    plot_routing(runs, folder / "results.png")


def by_source(runs: ByArm) -> pd.DataFrame:
    """Gives the mean loss of each task's rows by arm; a row's id begins with its task."""
    rows = []
    for arm, by_seed in runs.items():
        losses: dict[str, list[float]] = defaultdict(list)
        for record in by_seed.values():
            for row, loss in record.losses["loss"].items():
                losses[row.partition(" ")[0]].append(loss)
        rows.append({"arm": arm, **{task: fmean(values) for task, values in losses.items()}})
    return pd.DataFrame(rows)


def experts(runs: ByArm) -> pd.DataFrame:
    """Gives the use of the experts by arm: a mean over blocks and seeds.

    `most used` is the highest load of an expert as a multiple of an even share. `entropy` and that of each task are
    those of the routers as shares of ln E. `between tasks` is in nats, at most ln 4.
    """
    rows = []
    for arm, by_seed in runs.items():
        blocks = [block for record in by_seed.values() for block in record.routing.values() if "tasks" in block]
        if not blocks:
            continue
        tasks = blocks[0]["tasks"]
        row = {
            "arm": arm,
            "most used": fmean(max(block["load"]) * len(block["load"]) for block in blocks),
            "entropy": fmean(_share(block) for block in blocks),
            "between tasks": fmean(block["between_tasks"] for block in blocks),
        }
        rows.append(
            row | {f"entropy {task}": fmean(_share(block["tasks"][task]) for block in blocks) for task in tasks}
        )
    return pd.DataFrame(rows)


def _share(block: Mapping) -> float:
    return block["entropy"] / math.log(len(block["load"]))


def plot_routing(runs: ByArm, file: Path) -> None:
    """Draws by block how far experts split the tasks, and the entropy of the routers, one line an arm."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for arm, by_seed in runs.items():
        for axis, key in zip(axes, ("between_tasks", "entropy"), strict=True):
            found: dict[str, list[float]] = defaultdict(list)
            for record in by_seed.values():
                for block, kept in record.routing.items():
                    if "tasks" in kept:
                        found[block].append(_share(kept) if key == "entropy" else kept[key])
            if found:
                place = depths(list(found))
                axis.plot([place[block] for block in found], [fmean(values) for values in found.values()], label=arm)
    axes[0].set(xlabel="block", ylabel="how far experts split the tasks (nats)", ylim=(0, None))
    axes[1].set(xlabel="block", ylabel="router entropy / ln E", ylim=(None, 1.02))
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
