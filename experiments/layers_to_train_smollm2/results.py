"""Compares the losses of the arms with those of all blocks, paired by row and seed, and judges them by the rule.

    python experiments/layers_to_train_smollm2/results.py outputs/sweeps/layers_to_train_smollm2 FOLDER

The statistics are those of `layerif-report`, for the comparisons that the README states.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from layerif.record.record import FILE, RunRecord
from layerif.stats import all_paired_by_question, holm

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


def main() -> None:
    runs, folder = map(Path, sys.argv[1:])
    by_arm, untouched = read(runs)
    arms, pairs = costs(by_arm), compared(by_arm, untouched)
    for name, table in (("arms", arms), ("comparisons", pairs)):
        table.round(4).to_csv(folder / f"{name}.csv", index=False)
        print(table.round(4).to_string(index=False), end="\n\n")


def read(runs: Path) -> tuple[dict[str, dict[int, RunRecord]], float]:
    """Returns the records by arm and seed, and the loss of the untouched model."""
    by_arm: dict[str, dict[int, RunRecord]] = defaultdict(dict)
    for file in sorted(runs.glob(f"*-*/{FILE}")):
        arm, _, seed = file.parent.name.rpartition("-")
        by_arm[arm.replace("_", " ")][int(seed)] = RunRecord.read(file.parent)
    if not by_arm:
        raise SystemExit(f"{runs} holds no runs; run experiments/layers_to_train_smollm2/run.py first")
    return by_arm, RunRecord.read(runs / "untouched").metrics["before/loss"]


def costs(by_arm: dict[str, dict[int, RunRecord]]) -> pd.DataFrame:
    """Returns one row for each arm: loss and accuracy, parameters, seconds a step and memory."""
    rows = []
    for arm, by_seed in by_arm.items():
        records = list(by_seed.values())
        rows.append(
            {
                "arm": arm,
                "seeds": len(records),
                "loss": fmean(record.metrics["loss"] for record in records),
                "accuracy": fmean(record.metrics["accuracy"] for record in records),
                "trainable": records[0].parameters["trainable"],
                "s a step": np.nanmedian([record.training.get("seconds_per_step", np.nan) for record in records]),
                "training GB": np.nanmedian([record.training.get("memory_gb", np.nan) for record in records]),
            }
        )
    return pd.DataFrame(rows)


def compared(by_arm: dict[str, dict[int, RunRecord]], untouched: float) -> pd.DataFrame:
    """Returns one row for each comparison: the arm's loss minus the other's, and what the rule says of it."""
    against_all = [(arm, f"{arm.split()[0]} all") for arm in by_arm if not arm.endswith(" all")]
    wanted = [pair for pair in (*against_all, *AMONG) if set(pair) <= by_arm.keys()]
    pairs = [
        (losses(by_arm[second], seeds), losses(by_arm[first], seeds)) for first, second, seeds in shared(wanted, by_arm)
    ]
    rows = []
    for (arm, other), found in zip(wanted, all_paired_by_question(pairs, are_answers=False), strict=True):
        row: dict[str, Any] = {"arm": arm, "against": other, "seeds": found.num_seeds}
        row |= {"difference": found.value, "low": found.low, "high": found.high, "p": found.p}
        if other.endswith(" all"):
            most = (1 - KEPT) * (untouched - fmean(each.metrics["loss"] for each in by_arm[other].values()))
            row |= {"allowed": most, "as good": bool(found.high <= most)}
        rows.append(row)
    table = pd.DataFrame(rows)
    table["p Holm"] = holm(table["p"].to_numpy())
    table["differs"] = (table["p Holm"] < 0.05) & ((table["low"] > 0) | (table["high"] < 0))
    return table


def shared(
    wanted: Sequence[tuple[str, str]], by_arm: dict[str, dict[int, RunRecord]]
) -> list[tuple[str, str, list[int]]]:
    return [(first, second, sorted(by_arm[first].keys() & by_arm[second].keys())) for first, second in wanted]


def losses(by_seed: dict[int, RunRecord], seeds: list[int]) -> np.ndarray:
    """Returns the losses as seeds × rows."""
    rows = sorted(next(iter(by_seed.values())).losses["loss"])
    return np.array([[by_seed[seed].losses["loss"][row] for row in rows] for seed in seeds])


if __name__ == "__main__":
    main()
