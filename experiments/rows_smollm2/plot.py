"""Compares the arms of `experiment=rows_smollm2` by the rule of the README, and draws them.

    python experiments/rows_smollm2/plot.py [OUTPUTS [--into FOLDER]]

It leaves results.md, results.csv and results.png in FOLDER (by default beside this file). The statistics are those of
`layerif-report`, for the comparisons that the README states.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from layerif.record.record import FILE, RunRecord
from layerif.record.text import markdown
from layerif.stats import Difference, all_paired_by_question, holm, paired_by_seed

matplotlib.use("Agg")

HERE = Path(__file__).parent
SWEEPS = {"questions": "rows_smollm2", "texts": "rows_smollm2_text"}
PERPLEXITY = "perplexity_256"
UNTOUCHED = "untouched"
Runs = Mapping[str, Mapping[int, RunRecord]]


def main(outputs: Path, folder: Path) -> None:
    tables = []
    for part, name in SWEEPS.items():
        by_arm = runs_in(outputs / "sweeps" / name)
        if not by_arm:
            raise SystemExit(f"{outputs / 'sweeps' / name} holds no runs; run experiments/rows_smollm2/run.sh first")
        tables.append((part, means(by_arm), compared(by_arm)))
    text = ["# Rows, tokens and weights: all tables"]
    for part, of_arms, pairs in tables:
        text += [f"## {part.capitalize()}", markdown(of_arms), markdown(pairs)]
    (folder / "results.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    pd.concat([pairs.assign(part=part) for part, _, pairs in tables]).to_csv(folder / "results.csv", index=False)
    print("\n\n".join(text))
    draw([(part, pairs) for part, _, pairs in tables], folder / "results.png")


def runs_in(sweep: Path) -> dict[str, dict[int, RunRecord]]:
    """Returns the records by arm and seed."""
    found: dict[str, dict[int, RunRecord]] = defaultdict(dict)
    for file in sorted(sweep.glob(f"*/{FILE}")):
        record = RunRecord.read(file.parent)
        found[arm_of(record)][record.seed] = record
    return found


def arm_of(record: RunRecord) -> str:
    """Names the arm of a run: `influence 60`, `mastery 2`, `low_perplexity`, `spider` and so on."""
    method, choice, chosen = record.choices["method"], record.choices["selection"], record.config["selection"]
    if method == "none":
        return UNTOUCHED
    if record.config["task"]["name"] == "text":
        return (
            f"full {record.config['method']['protect']}" if method == "full" else record.config["data"]["token_filter"]
        )
    if choice == "all":
        return "all"
    if choice == "mastery":
        return f"mastery {chosen['level']}"
    return f"{'reversed' if chosen.get('reversed') else choice} {chosen['budget']}"


def references(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs each arm with those that the README compares it with."""
    found = []
    for arm in arms:
        name, _, number = arm.partition(" ")
        if name in ("influence", "reversed", "ifd"):
            found.append((arm, f"random {number}"))
        elif name == "mastery":
            found.append((arm, "random 60"))
        elif arm.startswith("random "):
            found.append((arm, "all"))
        elif arm == "low_perplexity":
            found += [(arm, "none"), (arm, "random"), (arm, "lowest")]
        elif arm in ("random", "lowest"):
            found.append((arm, "none"))
        elif arm == "full spider":
            found.append((arm, "full none"))
    return found


def means(by_arm: Runs) -> pd.DataFrame:
    """Returns one row for each arm: seeds, loss, perplexity (a geometric mean) and what was learned from."""
    rows = []
    for arm, by_seed in by_arm.items():
        records = list(by_seed.values())
        before = "before/" if arm == UNTOUCHED else ""
        logs = [np.log(record.metrics[f"{before}{PERPLEXITY}"]) for record in records]
        rows.append(
            {
                "arm": arm,
                "seeds": len(records),
                "loss": fmean(record.metrics[f"{before}loss"] for record in records),
                "perplexity": float(np.exp(fmean(logs))),
                "rows": fmean(len(record.selection.get("rows", ())) for record in records) or np.nan,
                "kept tokens": fmean(kept(record) for record in records),
                "s a step": float(np.median([record.training.get("seconds_per_step", np.nan) for record in records])),
            }
        )
    return pd.DataFrame(rows)


def kept(record: RunRecord) -> float:
    """Returns the share of the counted tokens that a filter kept."""
    return record.tokens["kept"] / record.tokens["counted"] if record.tokens else 1.0


def compared(by_arm: Runs) -> pd.DataFrame:
    """Returns one row for each comparison and metric, with p corrected over the table."""
    pairs = [(arm, other) for arm, other in references(by_arm) if by_arm.get(arm) and by_arm.get(other)]
    shared = [(arm, other, sorted(by_arm[arm].keys() & by_arm[other].keys())) for arm, other in pairs]
    shared = [each for each in shared if each[2]]
    losses = [(loss_of(by_arm[other], seeds), loss_of(by_arm[arm], seeds)) for arm, other, seeds in shared]
    found: list[tuple[str, str, str, Difference]] = []
    for (arm, other, _), difference in zip(shared, all_paired_by_question(losses, are_answers=False), strict=True):
        found.append((arm, other, "loss", difference))
    for arm, other, seeds in shared:
        logs = [
            np.log(by_arm[arm][seed].metrics[PERPLEXITY] / by_arm[other][seed].metrics[PERPLEXITY]) for seed in seeds
        ]
        found.append((arm, other, "perplexity", paired_by_seed(logs)))
    rows: list[dict[str, Any]] = []
    for arm, other, metric, difference in found:
        row: dict[str, Any] = {"arm": arm, "against": other, "metric": metric, "seeds": difference.num_seeds}
        row |= {"difference": difference.value, "low": difference.low, "high": difference.high, "p": difference.p}
        rows.append(row)
    table = pd.DataFrame(rows)
    if not table.empty:
        table["p Holm"] = holm(table["p"].to_numpy())
        table["differs"] = (table["p Holm"] < 0.05) & ((table["low"] > 0) | (table["high"] < 0))
    return table


def loss_of(by_seed: Mapping[int, RunRecord], seeds: Sequence[int]) -> np.ndarray:
    """Returns the losses as seeds × rows."""
    rows = sorted(by_seed[seeds[0]].losses["loss"])
    return np.array([[by_seed[seed].losses["loss"][row] for row in rows] for seed in seeds])


def draw(tables: Sequence[tuple[str, pd.DataFrame]], file: Path) -> None:
    """Draws each comparison with its interval: the loss in domain beside the logarithm of the perplexity."""
    tables = [(part, pairs) for part, pairs in tables if not pairs.empty]
    heights = [1 + pairs["metric"].eq("loss").sum() for _, pairs in tables]
    shape = {"figsize": (10, 1 + 0.35 * sum(heights)), "height_ratios": heights}
    figure, axes = plt.subplots(len(tables), 2, squeeze=False, **shape)  # type: ignore[arg-type]
    for line, (part, pairs) in zip(axes, tables, strict=True):
        for axis, metric in zip(line, ("loss", "perplexity"), strict=True):
            chosen: Any = pairs[pairs["metric"] == metric].reset_index(drop=True)
            for place, row in enumerate(chosen.to_dict("records")):
                axis.plot([row["low"], row["high"]], [place, place], color="#0072b2", linewidth=1.2, alpha=0.6)
                style = "full" if row["differs"] else "none"
                axis.plot(row["difference"], place, "o", color="#0072b2", markersize=5, fillstyle=style)
            names = [f"{arm} − {other}" for arm, other in zip(chosen["arm"], chosen["against"], strict=True)]
            axis.set_yticks(range(len(names)), names if metric == "loss" else [""] * len(names), fontsize=8)
            axis.axvline(0, color="#999999", linewidth=0.8)
            what = "loss in domain, nats" if metric == "loss" else "ln perplexity of the documentation"
            axis.set_xlabel(f"{what} ({part})", fontsize=9)
            axis.invert_yaxis()
            axis.grid(axis="y", color="#eeeeee")
            axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=re.sub(r"\n.*", "", __doc__ or ""))
    parser.add_argument("outputs", nargs="?", type=Path, default=Path("outputs"))
    parser.add_argument("--into", type=Path, default=HERE)
    given = parser.parse_args()
    main(given.outputs, given.into)
