"""Makes the tables of `experiment=depth_smollm2`, with intervals over test windows and rows.

    python experiments/depth_smollm2/results.py [SWEEP [--into FOLDER]]

It leaves runs.csv and results.md in FOLDER (by default beside this file). Runs of an earlier runs.csv that the sweep
does not hold stay in it, because the pieces take hours and need not run on one machine.

Perplexities are measured here, because a run keeps none of its windows: the model is loaded once, and the blocks that a
run left out are left out of it again. All runs share windows and rows. A bootstrap (95 %) draws windows for
perplexities and their ratios; the intervals of losses and accuracies are those of the runs, over rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from experiments.comparing import RUN, Table, all_runs
from layerif.app.methods.drop import SEARCH
from layerif.app.schema import from_conf
from layerif.compress.drop import without
from layerif.data.text import text
from layerif.data.windows import cut_windows, running_ids
from layerif.files import read_json
from layerif.pruning.trials import mean_token_loss
from layerif.record.record import FILE, RunRecord
from layerif.record.text import markdown
from layerif.stats import INTERVAL_RESAMPLES, Estimate, percentile, spearman

CONTROL, DENSE = "spaced_blocks", "dense"
SPEEDS = {"decoding": "decode_tokens_per_second", "memory": "memory_bytes"}
WINDOW, GONE, PRICE = "window ", "gone ", "price "  # the first words of metrics: a loss, a place in the order, a price
Run = tuple[str, str, int]  # setting, arm, seed
Values = Mapping[str, float]


def draw(sweep: Path, folder: Path) -> None:
    folders = [file.parent for file in sorted(sweep.glob(f"*/{FILE}"))]
    earlier = by_run(pd.read_csv(folder / "runs.csv")) if (folder / "runs.csv").exists() else {}
    model = Dense()
    records = [(RunRecord.read(each), each) for each in folders]
    found = [(*run_of(record), values_of(record, each, earlier, model)) for record, each in records]
    runs = by_run(all_runs(found, folder / "runs.csv"))
    pages = [
        "# Which blocks can a model do without: all tables",
        f"{len(runs)} runs. `results.py` explains the intervals (95 %).",
        markdown(table(runs)),
        "Agreement with the greedy search at the same number of blocks:",
        markdown(agreement(runs)),
        claim(runs),
    ]
    said = "\n\n".join(filter(None, pages)) + "\n"
    (folder / "results.md").write_text(said, encoding="utf-8")
    print(said)


def by_run(runs: Table) -> dict[Run, dict[str, float]]:
    """The values of each run by metric."""
    return {run: dict(zip(of["metric"], of["value"], strict=True)) for run, of in runs.groupby(RUN, sort=False)}


def run_of(record: RunRecord) -> Run:
    """The setting that an arm is compared under, the arm and the seed."""
    task = record.config["task"]["name"]
    if record.choices["method"] == "none":
        return task, DENSE, record.seed
    return f"{task}, {record.config['allocator']['keep']:.0%}".replace("%", " %"), record.choices["arm"], record.seed


def values_of(record: RunRecord, folder: Path, earlier: Mapping[Run, Values], model: Dense) -> dict[str, float | None]:
    """Gives the values of a run: those of its record, the blocks that it left out, and the loss of each test window."""
    is_dense, metrics = record.choices["method"] == "none", record.metrics
    found: dict[str, float | None] = {
        f"{metric}{bound}": metrics.get(f"{'before/' * is_dense}{metric}{bound}")
        for metric in ("loss", "accuracy")
        for bound in ("", "_low", "_high")
    }
    for name, metric in SPEEDS.items():
        if metric in metrics:
            found[name] = metrics[metric] / metrics[f"before/{metric}"]
    gone = [] if is_dense else left_out(record)
    order = read_json(folder / SEARCH, what="state of a search")["dropped"] if (folder / SEARCH).exists() else gone
    found |= {f"{GONE}{block}": order.index(block) for block in gone}
    prices = ((record.decision and record.decision.curves) or {}).get("prices", {})
    found |= {f"{PRICE}{block}": price for block, price in prices.items()}
    known = earlier.get(run_of(record), {})
    if not starting(known, WINDOW) or starting(known, GONE).keys() != {*gone}:
        known = model.losses(gone, record.config["evaluation"])
    return found | {f"{WINDOW}{number}": loss for number, loss in starting(known, WINDOW).items()}


def starting(values: Values, start: str) -> dict[str, float]:
    """The values whose name has this start, without it."""
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def left_out(record: RunRecord) -> list[str]:
    assert record.decision is not None
    given = record.decision.allocation
    return [unit for unit, stays in zip(given.units, given.values, strict=True) if not stays]


class Dense:
    """The dense model and its tokenizer, which are loaded when they are first needed."""

    @cached_property
    def loaded(self) -> tuple[nn.Module, Any]:
        found = from_conf("model=smollm2")
        return found.load(), found.tokenizer()

    def losses(self, units: Sequence[str], settings: Mapping[str, Any]) -> dict[str, float]:
        """The loss of each test window without some blocks, by metric."""
        model, tokenizer = self.loaded
        losses_W = window_losses(model, units, test_windows(tokenizer, settings))
        return {f"{WINDOW}{settings['first_window'] + n + 1}": float(loss) for n, loss in enumerate(losses_W)}


def test_windows(tokenizer: Any, settings: Mapping[str, Any]) -> torch.Tensor:
    """The windows of the documentation's test half that the settings of an evaluation name."""
    ids, bos = running_ids(tokenizer, text("documentation", "test"), settings["bos"])
    first, number = settings["first_window"], settings["num_windows"]
    return torch.tensor(cut_windows(ids, settings["window"], bos)[first : first + number])


def window_losses(model: nn.Module, units: Sequence[str], windows: torch.Tensor) -> np.ndarray:
    """The mean token loss of each window, without some blocks."""
    with without(model, units):
        return np.array([mean_token_loss(model, [window]) for window in windows.split(1)])


def ratio(losses_W: np.ndarray, others_W: np.ndarray | float = 0.0, seed: int = 0) -> Estimate:
    """The perplexity over windows, or its ratio to that of another run, with the interval over windows."""
    difference_W = losses_W - others_W
    chosen_BW = np.random.default_rng(seed).integers(len(losses_W), size=(INTERVAL_RESAMPLES, len(losses_W)))
    return percentile(float(np.exp(difference_W.mean())), np.exp(difference_W[chosen_BW].mean(1)))


def windows_of(values: Values) -> np.ndarray:
    found = starting(values, WINDOW)
    return np.array([found[number] for number in sorted(found, key=int)])


def short(found: Estimate) -> str:
    """A ratio and its interval in three digits, since ratios of unlike arms differ by powers of ten."""
    return f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"


def spelt(values: Values, metric: str) -> str:
    if metric not in values:
        return "–"
    return "{:.3f} ({:.3f} to {:.3f})".format(*(values[f"{metric}{bound}"] for bound in ("", "_low", "_high")))


def table(runs: Mapping[Run, Values]) -> pd.DataFrame:
    """One row for each run: perplexity, its ratio to blocks at equal distances, loss and accuracy, and the speed."""
    rows = []
    for (setting, arm, seed), values in sorted(runs.items()):
        losses_W, control = windows_of(values), runs.get((setting, CONTROL, 0))
        rows.append(
            {
                "setting": setting,
                "arm": arm,
                "seed": seed,
                "perplexity": str(ratio(losses_W)),
                f"ratio to {CONTROL}": "–" if control is None else short(ratio(losses_W, windows_of(control))),
                "loss of rows": spelt(values, "loss"),
                "accuracy": spelt(values, "accuracy"),
                **{f"{name}, times dense": values.get(name) for name in SPEEDS},
            }
        )
    return pd.DataFrame(rows)


def agreement(runs: Mapping[Run, Values]) -> pd.DataFrame:
    """The share of the greedy search's blocks that an arm left out, too, and for prices the rank correlation.

    The correlation is that of the prices with the order in which the greedy search's blocks went, over these blocks.
    """
    rows = []
    for (setting, arm, seed), values in sorted(runs.items()):
        order = starting(runs.get((setting, "greedy", 0), {}), GONE)
        if arm == "greedy" or not order:
            continue
        prices, blocks = starting(values, PRICE), sorted(order, key=lambda block: order[block])
        rows.append(
            {
                "setting": setting,
                "arm": arm,
                "seed": seed,
                "shared": len(order.keys() & starting(values, GONE).keys()) / len(order),
                "rank correlation": float(spearman(range(len(blocks)), [prices[block] for block in blocks]))
                if prices
                else None,
            }
        )
    return pd.DataFrame(rows)


def claim(runs: Mapping[Run, Values]) -> str:
    """Says if AVSS keeps over 90 % of the dense model's accuracy with a quarter of the blocks gone."""
    smaller, dense = runs.get(("city, 75 %", "avss", 0)), runs.get(("city", DENSE, 0))
    if smaller is None or dense is None:
        return ""
    value, low = (smaller[name] / dense["accuracy"] for name in ("accuracy", "accuracy_low"))
    verdict = "holds here" if low > 0.9 else "is not shown here"
    return (
        f"With a quarter of the blocks gone by AVSS, {value:.2f} of the dense model's accuracy is left (lower end "
        f"{low:.2f}): the claim of over 0.9 {verdict}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", type=Path, default=Path("outputs/sweeps/depth_smollm2"))
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    draw(given.sweep, given.into)
