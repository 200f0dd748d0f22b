"""Runs of an experiment as rows of a table that sessions on several machines add to, and arms beside a reference.

A run is compared with the reference of the same calibration choice (the seed): by the ratio of perplexities, and by the
difference of the loss of the right answer. Student's t over the choices gives intervals (95 %) and p, as in
`layerif-report`. Holm corrects p over one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from layerif.record.record import FILE, RunRecord
from layerif.stats import Difference, holm, paired_by_seed, smallest_difference

KEYS = ["setting", "arm", "seed", "metric"]
RUN = KEYS[:3]
Table = Any  # a DataFrame of pandas, whose stubs do not know what its own selections return
TEXTS = {  # the perplexities of a record, by the name of the text in tables
    "documentation": "perplexity_256",
    "factbook": "factbook/perplexity_256",
    "plays": "plays/perplexity_256",
}
METRICS = (*TEXTS, "loss")  # those that are compared
EXPLAINED = (
    "Perplexities are ratios to the reference of the same calibration choice, the loss on the task is a difference in "
    "nats a token; intervals (95 %) are Student's t over calibration choices. A star says that p, corrected over the "
    "table (Holm), is below 0.05. A single choice has neither."
)


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


def records_of(sweeps: Sequence[Path]) -> list[RunRecord]:
    """Reads the finished runs of some sweeps."""
    return [RunRecord.read(file.parent) for sweep in sweeps for file in sorted(sweep.glob(f"*/{FILE}"))]


def all_runs(runs: Iterable[tuple[str, str, int, Mapping[str, float | None]]], file: Path) -> Table:
    """Adds runs to those that a table already holds, and writes it: one row for each metric of each run.

    A run that is there anew replaces the earlier one, so that the pieces of an experiment need not run on one machine.

    Args:
        runs: the setting that a run's arm is compared under, the arm, the seed, and the values by metric; a value that
            is None is left out.
        file: of the table.
    """
    rows = [(*run, metric, value) for *run, values in runs for metric, value in values.items() if value is not None]
    found: Table = pd.DataFrame(rows, columns=[*KEYS, "value"]).astype({"seed": int, "value": float})
    if (twice := found.duplicated(KEYS)).any():
        raise SystemExit(f"two runs of one setting: {found.loc[twice, KEYS].iloc[0].to_dict()}; remove one's folder")
    if file.exists():
        earlier = pd.read_csv(file)
        is_anew = earlier.set_index(RUN).index.isin(found.set_index(RUN).index)
        found = pd.concat([earlier[~is_anew], found], ignore_index=True)
    if found.empty:
        raise SystemExit(f"there is neither a finished run nor an earlier {file}; give the experiment's command first")
    found.to_csv(file, index=False, float_format="%.5g")
    return found


def compared(runs: Table, reference: str) -> list[Comparison]:
    """Compares each arm with the reference, paired by seed: logarithms of perplexities, and losses."""
    found: list[tuple[str, str, str, Difference]] = []
    groups: Any = runs.groupby(["setting", "metric"], sort=False)
    for (setting, metric), group in groups:
        if metric not in METRICS:
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
    for metric in METRICS:
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
    for metric in means.columns[2:]:
        means[metric] = [
            "" if np.isnan(value) else f"{np.exp(value):.1f}" if metric in TEXTS else f"{value:.2f}"
            for value in means[metric]
        ]
    return means
