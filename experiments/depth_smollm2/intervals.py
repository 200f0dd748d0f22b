"""Makes the tables of `experiment=depth_smollm2`, with intervals over test windows and rows.

    python experiments/depth_smollm2/intervals.py [SWEEP [FOLDER]]

It leaves results.md in FOLDER (by default beside this file). A run keeps no loss of single windows, so the model is
loaded here once, and the blocks that each run left out are left out of it again. All runs share windows and rows. A
bootstrap (95 %) draws windows for perplexities and their ratios, and rows for losses.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

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

CONTROL = "spaced_blocks"
SPEED = "decode_tokens_per_second"


def draw(sweep: Path, folder: Path) -> None:
    folders = [file.parent for file in sorted(sweep.glob(f"*/{FILE}"))]
    records = [RunRecord.read(folder) for folder in folders]
    orders = {
        place(record): read_json(folder / SEARCH, what="state of a search")["dropped"]
        for folder, record in zip(folders, records, strict=True)
        if record.choices["arm"] == "greedy"
    }
    if not records:
        raise SystemExit(f"{sweep} holds no {FILE}; give the commands of experiments/depth_smollm2/README.md first")
    of_model = from_conf("model=smollm2")
    windows = test_windows(of_model.tokenizer(), records[0].config["evaluation"])
    model = of_model.load()
    losses = {id(record): window_losses(model, left_out(record), windows) for record in records}
    dense = window_losses(model, [], windows)
    found = [
        f"{len(records)} runs, {len(windows)} windows; the dense model's perplexity is {np.exp(dense.mean()):.2f}. "
        "`intervals.py` explains the intervals (95 %).",
        markdown(table(records, losses)),
        "Agreement with the greedy search at the same number of blocks:",
        markdown(agreement(records, orders)),
    ]
    (folder / "results.md").write_text("\n\n".join(found) + "\n")
    print("\n\n".join(found))


def test_windows(tokenizer: Any, settings: Mapping[str, Any]) -> torch.Tensor:
    """The windows of the documentation that the runs were tested on."""
    ids, bos = running_ids(tokenizer, text("documentation", "test"), settings["bos"])
    first, number = settings["first_window"], settings["num_windows"]
    return torch.tensor(cut_windows(ids, settings["window"], bos)[first : first + number])


def left_out(record: RunRecord) -> list[str]:
    assert record.decision is not None
    given = record.decision.allocation
    return [unit for unit, stays in zip(given.units, given.values, strict=True) if not stays]


def window_losses(model: nn.Module, units: Sequence[str], windows: torch.Tensor) -> np.ndarray:
    """The mean token loss of each window, without some blocks."""
    with without(model, units):
        return np.array([mean_token_loss(model, [window]) for window in windows.split(1)])


def ratio(losses_W: np.ndarray, others_W: np.ndarray | float = 0.0, seed: int = 0) -> Estimate:
    """The perplexity over windows, or its ratio to that of another run, with the interval over windows."""
    difference_W = losses_W - others_W
    chosen_BW = np.random.default_rng(seed).integers(len(losses_W), size=(INTERVAL_RESAMPLES, len(losses_W)))
    return percentile(float(np.exp(difference_W.mean())), np.exp(difference_W[chosen_BW].mean(1)))


def rows_loss(record: RunRecord, seed: int = 0) -> Estimate:
    """The mean loss of the task's rows, with the interval over rows."""
    losses_Q = np.array(list(record.losses["loss"].values()))
    chosen_BQ = np.random.default_rng(seed).integers(len(losses_Q), size=(INTERVAL_RESAMPLES, len(losses_Q)))
    return percentile(float(losses_Q.mean()), losses_Q[chosen_BQ].mean(1))


def table(records: Sequence[RunRecord], losses: Mapping[int, np.ndarray]) -> pd.DataFrame:
    """One row for each run: perplexity, its ratio to blocks at equal distances, the loss of rows, and the speed."""
    control = {place(record): losses[id(record)] for record in records if record.choices["arm"] == CONTROL}
    rows = []
    for record in sorted(records, key=lambda each: (place(each), each.choices["arm"])):
        other_W = control.get(place(record))
        rows.append(
            {
                "task": record.config["task"]["name"],
                "keep": record.config["allocator"]["keep"],
                "arm": record.choices["arm"],
                "perplexity": str(ratio(losses[id(record)])),
                f"ratio to {CONTROL}": "–" if other_W is None else str(ratio(losses[id(record)], other_W)),
                "loss of rows": str(rows_loss(record)) if "loss" in record.losses else "–",
                "accuracy": record.metrics.get("accuracy"),
                "decoding, times dense": record.metrics[SPEED] / record.metrics[f"before/{SPEED}"]
                if SPEED in record.metrics
                else None,
            }
        )
    return pd.DataFrame(rows)


def place(record: RunRecord) -> tuple[str, float]:
    return record.config["task"]["name"], record.config["allocator"]["keep"]


def agreement(records: Sequence[RunRecord], orders: Mapping[tuple[str, float], Sequence[str]]) -> pd.DataFrame:
    """The share of the greedy search's blocks that an arm left out, too, and for prices the rank correlation.

    The correlation is that of the prices with the order in which the greedy search's blocks went, over these blocks.
    """
    rows = []
    for record in records:
        order = orders.get(place(record))
        if order is None or record.choices["arm"] == "greedy":
            continue
        assert record.decision is not None
        prices = (record.decision.curves or {}).get("prices", {})
        rows.append(
            {
                "task": record.config["task"]["name"],
                "keep": record.config["allocator"]["keep"],
                "arm": record.choices["arm"],
                "shared": len({*order} & {*left_out(record)}) / len(order),
                "rank correlation": float(spearman(range(len(order)), [prices[unit] for unit in order]))
                if prices
                else None,
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    here = Path(__file__).parent
    given = [Path(argument) for argument in sys.argv[1:]]
    draw(given[0] if given else Path("outputs/sweeps/depth_smollm2"), given[1] if len(given) > 1 else here)
