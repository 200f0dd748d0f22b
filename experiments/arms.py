"""Arms that are fine-tuned, each at the learning rate that validation chooses, and their losses beside a reference's.

    python -m experiments.arms outputs/sweeps/NAME arm=eva task.name=city

prints the learning rate with the least validation loss of that arm with seed 0. Each condition is an arm, or a setting
of the configuration. Test rows play no part in the choice.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from layerif.record.record import FILE, RunRecord
from layerif.stats import all_paired_by_question, holm, smallest_difference

JUDGE = "validation/loss"
ByArm = Mapping[str, Mapping[int, RunRecord]]


def read(sweep: Path) -> list[RunRecord]:
    """Reads the finished runs of a sweep that were fine-tuned."""
    records = [RunRecord.read(file.parent) for file in sorted(sweep.glob(f"*/{FILE}"))]
    return [record for record in records if "trainable" in record.parameters]


def rate_of(record: RunRecord) -> float:
    return record.config["method"]["learning_rate"]


def chosen_rate(records: Sequence[RunRecord]) -> float:
    """Gives the learning rate with the least validation loss among the runs of one arm with seed 0."""
    losses = {rate_of(record): record.metrics[JUDGE] for record in records if record.seed == 0}
    if not losses:
        raise SystemExit("no run with seed 0 has these settings; run the sweep over learning rates first")
    return min(losses, key=lambda rate: losses[rate])


def is_at_the_edge(records: Sequence[RunRecord]) -> bool:
    """Tells if the chosen rate is the lowest or the highest of those tried, so that a better one may lie beyond."""
    rates = {rate_of(record) for record in records if record.seed == 0}
    return len(rates) > 1 and chosen_rate(records) in (min(rates), max(rates))


def tuned(groups: Mapping[str, Sequence[RunRecord]]) -> dict[str, dict[int, RunRecord]]:
    """Gives, by arm, the runs at the rate of the arm, by seed."""
    found = {}
    for arm, records in groups.items():
        rate = chosen_rate(records)
        found[arm] = {record.seed: record for record in records if rate_of(record) == rate}
    return found


def by_arm(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    found: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        found[record.choices["arm"]].append(record)
    return found


def arms(groups: Mapping[str, Sequence[RunRecord]]) -> pd.DataFrame:
    """Makes a table with one row for each arm, at its own rate: loss, accuracy, size and cost."""
    rows = []
    for arm, by_seed in tuned(groups).items():
        records = list(by_seed.values())
        rate = f"{rate_of(records[0]):g}{' (edge)' if is_at_the_edge(groups[arm]) else ''}"
        accuracy = [record.metrics["accuracy"] for record in records if "accuracy" in record.metrics]
        rows.append(
            {
                "arm": arm,
                "rate": rate,
                "seeds": len(records),
                "loss": fmean(record.metrics["loss"] for record in records),
                JUDGE: fmean(record.metrics[JUDGE] for record in records),
                "accuracy": fmean(accuracy) if accuracy else np.nan,
                "trainable": records[0].parameters["trainable"],
                "seconds": fmean(sum(record.seconds.values()) for record in records),
            }
        )
    return pd.DataFrame(rows).sort_values("loss", kind="stable").dropna(axis=1, how="all")


def compared(runs: ByArm, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Compares losses paired by row and seed, the first arm's minus the second's, and corrects p over all pairs (Holm).

    Args:
        runs: by arm and seed, at the arm's own rate.
        pairs: the arms, the reference second; those that are not there yet are left out.
    """
    wanted = [pair for pair in pairs if set(pair) <= runs.keys() and runs[pair[0]].keys() & runs[pair[1]].keys()]
    seeds = [sorted(runs[arm].keys() & runs[other].keys()) for arm, other in wanted]
    values = [
        (_losses(runs[other], of), _losses(runs[arm], of)) for (arm, other), of in zip(wanted, seeds, strict=True)
    ]
    rows: list[dict[str, Any]] = []
    for (arm, other), found in zip(wanted, all_paired_by_question(values, are_answers=False), strict=True):
        sizes = [next(iter(runs[one].values())).parameters["trainable"] for one in (arm, other)]
        row = {"arm": arm, "against": other, "seeds": found.num_seeds, "difference": found.value}
        row |= {"low": found.low, "high": found.high, "p": found.p, "size": sizes[0] / sizes[1] - 1}
        rows.append(row | {"smallest found": smallest_difference(found, len(wanted))})
    table = pd.DataFrame(rows)
    if rows:
        table.insert(7, "p Holm", holm(table["p"].to_numpy()))
        table["differs"] = (table["p Holm"] < 0.05) & ((table["low"] > 0) | (table["high"] < 0))
    return table


def _losses(by_seed: Mapping[int, RunRecord], seeds: Sequence[int]) -> np.ndarray:
    rows = sorted(by_seed[seeds[0]].losses["loss"])
    return np.array([[by_seed[seed].losses["loss"][row] for row in rows] for seed in seeds])


def _meets(record: RunRecord, conditions: Sequence[str]) -> bool:
    config = OmegaConf.create(dict(record.config))
    for condition in conditions:
        key, _, value = condition.partition("=")
        found = record.choices.get(key) if key == "arm" else OmegaConf.select(config, key)
        if str(found) != value:
            return False
    return True


if __name__ == "__main__":
    folder, *given = sys.argv[1:]
    there = [record for record in read(Path(folder)) if _meets(record, given)]
    if there and is_at_the_edge(there):
        print(f"{' '.join(given)}: the best rate is the lowest or highest of those tried", file=sys.stderr)
    print(f"{chosen_rate(there):g}")
