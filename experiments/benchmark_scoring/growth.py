"""Measures the growth of a probe's cost with samples, tokens and blocks, and its peak memory against its budget.

    OMP_WAIT_POLICY=passive python experiments/benchmark_scoring/growth.py   (minutes; --tiny only tries if it runs)

It probes the attention weights of a Llama of SmolLM2-135M's widths with random weights (hidden size 576, 9 heads of 64,
3 of them for keys and values, MLP 1536, a vocabulary of 4096) in float32. From the same start, one of n, m, tokens and
blocks is doubled at a time. Every point runs in a process of its own, so that its peak memory is its own: the largest
resident size, less that just before the call, when model, samples and libraries are there. The budget is `memory_gb`.
The Grams and one forward and backward of a batch do not count in it, and the memory of the batch is measured alone.
The script writes growth.png and growth.csv beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from experiments.timing import machine, peak_mb, reset_peak, resident_mb, timed
from layerif.models.blocks import layer_map
from layerif.models.contexts import frozen
from layerif.probe.grams.factors import capture_factors
from layerif.probe.grams.gather import IndexedBatch
from layerif.probe.grams.measure import measure

START = {"train": 64, "validation": 16, "tokens": 64, "blocks": 4}
GROWTH = {
    "train": (32, 64, 128, 256),
    "validation": (8, 16, 32, 64),
    "tokens": (32, 64, 128, 256),
    "blocks": (2, 4, 8, 16),
}
BUDGETS_GB = (0.2, 0.3, 0.5, 1.0)
TINY_START = {"train": 8, "validation": 4, "tokens": 16, "blocks": 2}
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="two points a curve: does it run?")
    parser.add_argument("--budgets", action="store_true", help="only these, the other curves as growth.csv has them")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # the settings that a process of its own measures
    given = parser.parse_args()
    if given.point:
        print(json.dumps(point(**json.loads(given.point))))
        return
    start, rounds = (TINY_START, 1) if given.tiny else (START, ROUNDS)
    print(f"{machine()}\nfrom {', '.join(f'{count} {what}' for what, count in start.items())}\n")
    print("what          value   seconds   peak MB   budget MB   one batch MB")
    rows = []
    if given.budgets:
        with (Path(__file__).parent / "growth.csv").open(newline="") as file:
            kept = [each for each in csv.DictReader(file) if each["what"] in GROWTH]
        numbers = ("value", "seconds", "peak_mb", "batch_mb")
        rows = [{"what": each["what"], **{key: float(each.get(key) or "nan") for key in numbers}} for each in kept]
    for what, values in () if given.budgets else GROWTH.items():
        for value in (start[what], 2 * start[what]) if given.tiny else values:
            rows.append(row(what, value, {**start, what: value, "rounds": rounds}))
    for budget in BUDGETS_GB[:2] if given.tiny else BUDGETS_GB:
        largest = start if given.tiny else {**start, "tokens": 256}
        rows.append(row("memory_gb", budget, {**largest, "memory_gb": budget, "rounds": 1}))
    exponents = {what: growth([each for each in rows if each["what"] == what]) for what in GROWTH}
    print("\nseconds grow with the power " + ", ".join(f"{power:.2f} of {what}" for what, power in exponents.items()))
    if not given.tiny:
        folder = Path(__file__).parent
        plot(rows, folder / "growth.png")
        with (folder / "growth.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[-1])
            writer.writeheader()
            writer.writerows(rows)


def row(what: str, value: float, settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--point", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        refused = done.stderr.strip().splitlines()[-1]
        print(f"{what:<12}{value:>7g}   {refused}")  # the probe says so if the budget is too small for a single tile
        return {"what": what, "value": value, **dict.fromkeys(("seconds", "peak_mb", "batch_mb"), float("nan"))}
    found = {"what": what, "value": value, **json.loads(done.stdout.splitlines()[-1])}
    budget = f"{1000 * settings['memory_gb']:12.0f}" if "memory_gb" in settings else f"{'–':>12}"
    print(f"{what:<12}{value:>7g}{found['seconds']:>10.3f}{found['peak_mb']:>10.0f}{budget}{found['batch_mb']:>15.0f}")
    return found


def point(
    *, train: int, validation: int, tokens: int, blocks: int, rounds: int, memory_gb: float | None = None
) -> dict[str, float]:
    """Measures the median seconds of the probe, the peak megabytes of its first run, and those of a batch alone."""
    model = llama(blocks)
    layers = layer_map(model)
    both = samples(train, tokens, seed=0), samples(validation, tokens, seed=1)
    measure(model, layers, samples(1, 8, seed=2), samples(1, 8, seed=3))  # lets libraries allocate what they need once
    before = resident_mb()
    reset_peak()
    with frozen(model):  # every forward and backward needs this, however little is kept of it
        capture_factors(model, [layers.params[0][0]], both[0][0][1], [""] * 8)
    batch = peak_mb() - before
    reset_peak()
    found = [timed(lambda: measure(model, layers, *both, memory_gb=memory_gb))[1]]
    peak = peak_mb() - before
    found += [timed(lambda: measure(model, layers, *both, memory_gb=memory_gb))[1] for _ in range(rounds - 1)]
    return {"seconds": statistics.median(found), "peak_mb": peak, "batch_mb": batch}


def llama(blocks: int) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def samples(count: int, tokens: int, *, seed: int, batch_size: int = 8) -> list[IndexedBatch]:
    ids = torch.randint(4096, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [
        (rows.tolist(), {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": ids[rows]})
        for rows in torch.arange(count).split(batch_size)
    ]


def growth(rows: list[dict[str, Any]]) -> float:
    """Returns the slope of log seconds over log value, which is 1 where the cost doubles with the size."""
    values, times = (torch.tensor([each[key] for each in rows]).log() for key in ("value", "seconds"))
    values, times = values - values.mean(), times - times.mean()
    return float((values * times).sum() / values.square().sum())


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, (cost, memory) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for what, start in START.items():
        of = [each for each in rows if each["what"] == what]
        cost.plot([each["value"] / start for each in of], [each["seconds"] for each in of], marker="o", label=what)
    cost.set(xscale="log", yscale="log", xlabel=f"times {START}", ylabel="seconds", title="cost of a probe")
    cost.xaxis.label.set_size(7)
    for axis in (cost.xaxis, cost.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    cost.set_xticks([0.5, 1, 2, 4])
    cost.set_yticks([1, 2, 5, 10])
    cost.legend(frameon=False)
    of = [each for each in rows if each["what"] == "memory_gb"]
    budgets = [1000 * each["value"] for each in of]
    memory.plot(budgets, [each["peak_mb"] for each in of], marker="o", label="peak")
    memory.plot(budgets, budgets, color="grey", linestyle="--", label="budget")
    both = [budget + each["batch_mb"] for budget, each in zip(budgets, of, strict=True)]
    memory.plot(budgets, both, color="grey", label="budget and one batch")
    memory.set(xscale="log", yscale="log", xlabel="probe.memory_gb, as MB", ylabel="MB", title="peak memory")
    memory.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
