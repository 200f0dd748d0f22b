"""Times loss curves and gains beside the gradient pass that they need, and measures their memory, in `make bench`.

    OMP_WAIT_POLICY=passive python experiments/benchmark_curves/run.py [cpu|cuda]
        [--windows=16] [--window=256] [--blocks=30] [--rounds=3] [--memory-gb 0.5 1 2] [--rows=300] [--gains-only]

It prices eight levels of Wanda in every matrix of SmolLM2-135M. The measure is a forward and activation-backward pass
over the same windows that captures the same factors and does nothing with them. It takes turns with both forms of the
curves, each at 45 % and at all of the positions. Then a process of its own measures exact curves under each memory
budget. Gains (`estimator=gain_curve`) take turns with the same pass over the rows that a probe takes by default, 300
train and 50 validation rows of `task=city`. `--windows=4 --blocks=4 --rounds=1 --memory-gb 0.1 --rows=30` only tries in
a minute if it runs. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from experiments.timing import check_plausible, machine, peak_mb, reset_peak, resident_mb, timed
from layerif.allocate.curves import Curves
from layerif.app.schema import from_conf
from layerif.data.batches import batches, encode, padding_id
from layerif.estimators.loss_curve import LEVELS
from layerif.models.blocks import layer_map
from layerif.models.contexts import frozen
from layerif.models.embedded import EmbeddedModel
from layerif.probe.curves.measure import CurveForm, measure_loss_curves
from layerif.probe.curves.text import LossText
from layerif.probe.gains import measure_gains
from layerif.probe.grams import gather
from layerif.probe.grams.factors import capture_factors
from layerif.pruning.calibration import Calibration
from layerif.pruning.wanda import Wanda
from layerif.stats import spearman

SHARE = 0.45  # of the positions, the default of estimator=loss_curve
TARGET = 0.6
WAYS: dict[str, tuple[CurveForm, float]] = {
    "diagonal, 45 %": ("diagonal", SHARE),
    "diagonal, all": ("diagonal", 1.0),
    "exact, 45 %": ("exact", SHARE),
    "exact, all": ("exact", 1.0),
}
GOALS = {"diagonal, 45 %": 1.5, "exact, 45 %": 2.5}  # in all, as ratios to the pass
GOAL_OF_GAINS = 1.5


class Bench:
    """The model, the windows, and the works that are timed."""

    def __init__(self, device: str, windows: int, window: int, blocks: int | None) -> None:
        embedded = EmbeddedModel(cache="outputs/store/models")
        self.model: Any = embedded.load()
        if blocks is not None:
            self.model.model.layers = self.model.model.layers[:blocks]
        self.model.to(device)
        self.device, self.params = device, layer_map(self.model, scope="all").matrices
        self.tokenizer = embedded.tokenizer()
        self.text = loss_text(Calibration(num_windows=windows, window=window).batches(self.tokenizer))

    def gradient_pass(self) -> None:
        with frozen(self.model):
            for indices, batch in self.text.batches:
                capture_factors(self.model, self.params, batch, [self.text.names[index] for index in indices])

    def curves(self, form: CurveForm, tokens: float, memory_gb: float | None = None) -> Curves:
        return measure_loss_curves(
            self.model, self.params, Wanda(), self.text, LEVELS, form=form, tokens=tokens, memory_gb=memory_gb
        )


def loss_text(batches: list[torch.Tensor]) -> LossText:
    """Makes the samples whose loss is watched out of windows of token ids (B×T each)."""
    rows = torch.arange(sum(map(len, batches))).split([len(batch) for batch in batches])
    found = [
        (indices.tolist(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
        for indices, ids in zip(rows, batches, strict=True)
    ]
    num = sum(map(len, batches))
    return LossText(found, torch.full((num,), 1 / num, dtype=torch.float64), [f"window {row}" for row in range(num)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device", nargs="?", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--blocks", type=int, help="the first blocks of the model alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, nargs="*", default=[0.5, 1.0, 2.0])
    parser.add_argument("--rows", type=int, default=300, help="train rows of the gains; a sixth as many for validation")
    parser.add_argument("--gains-only", action="store_true")
    parser.add_argument("--point", type=float, help=argparse.SUPPRESS)  # the budget that a process of its own measures
    given = parser.parse_args()
    make = partial(Bench, given.device, given.windows, given.window, given.blocks)
    if given.point is not None:
        print(json.dumps(point(make(), given.point)))
        return
    print(f"{machine()}, device {given.device}")
    bench = make()
    num_blocks = len(bench.model.model.layers)
    if given.gains_only:
        gains(bench, given.rounds, given.rows)
        return
    print(f"{num_blocks} blocks, {given.windows} windows of {given.window} tokens, {len(LEVELS)} levels, Wanda\n")
    times(bench, given.rounds)
    gains(bench, given.rounds, given.rows)
    del bench
    sizes = [f"--windows={given.windows}", f"--window={given.window}"]
    sizes += [] if given.blocks is None else [f"--blocks={given.blocks}"]
    memory(given.device, sizes, given.memory_gb)


def times(bench: Bench, rounds: int) -> None:
    """Prints seconds, their ratios to the pass, and how alike the allocations rank."""
    works: dict[str, Any] = {"pass": bench.gradient_pass}
    works |= {name: partial(bench.curves, *way) for name, way in WAYS.items()}
    bench.gradient_pass()  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in works}
    found: dict[str, Curves] = {}
    for _ in range(rounds):
        for name, work in works.items():
            curves, spent = timed(work, bench.device)
            seconds[name].append(spent)
            if curves is not None:
                found[name] = curves
    reference = found["exact, all"].allocate(TARGET).values
    heads = ("median s", "least s", "median/pass", "least/pass", "goal", f"Spearman at {TARGET:.0%} with exact, all")
    print(" " * 16 + "   ".join(heads))
    for name, spent in seconds.items():
        middle, least = statistics.median(spent), min(spent)
        line = f"{name:<14}{middle:>10.2f}{least:>10.2f}"
        if name in WAYS:
            ratio, of_least = middle / statistics.median(seconds["pass"]), least / min(seconds["pass"])
            check_plausible(f"{name}, beside the pass", min(ratio, of_least), 1.0)  # the pass is a part of it
            goal = f"{GOALS[name]:.1f}" if name in GOALS else ""
            alike = spearman(found[name].allocate(TARGET).values, reference)
            line += f"{ratio:>14.2f}{of_least:>13.2f}{goal:>7}{alike:>13.3f}"
        print(line, flush=True)


def gains(bench: Bench, rounds: int, num_train: int) -> None:
    """Prints the seconds of gains and of the pass over the same rows, which take turns."""
    splits = from_conf("task=city").load()
    parts = [splits.train[:num_train], splits.validation[: max(2, num_train // 6)]]
    encoded = [encode(part, bench.tokenizer, template="plain", max_length=128, eos=False) for part in parts]
    train, validation = (list(batches(part, 8, padding_id(bench.tokenizer))) for part in encoded)
    layers = layer_map(bench.model, scope="all")

    def gradient_pass() -> None:
        with frozen(bench.model):
            for indices, batch in (*train, *validation):
                capture_factors(bench.model, bench.params, batch, [""] * len(indices))

    works: dict[str, Any] = {
        "pass": gradient_pass,
        "gains": partial(measure_gains, bench.model, layers, train, validation),
    }
    gradient_pass()  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(timed(work, bench.device)[1])
    middle, least = ({name: of(spent) for name, spent in seconds.items()} for of in (statistics.median, min))
    tokens = sum(batch["attention_mask"].sum() for _, batch in (*train, *validation))
    print(f"\ngains, {len(parts[0])} + {len(parts[1])} rows of task=city, {int(tokens):,} tokens")
    for name in works:
        print(f"{name:<14}{middle[name]:>10.2f}{least[name]:>10.2f}", end="")
        ratios = middle[name] / middle["pass"], least[name] / least["pass"]
        print(f"{ratios[0]:>14.2f}{ratios[1]:>13.2f}{GOAL_OF_GAINS:>7.1f}" if name == "gains" else "", flush=True)
    check_plausible("gains, beside the pass", min(ratios), 1.0)


def memory(device: str, sizes: list[str], budgets: list[float]) -> None:
    """Prints the peak memory of exact curves under each budget, measured by a process of its own."""
    print("\nexact, 45 %\nbudget MB   passes   seconds   peak MB   budget and one batch MB")
    for budget in budgets:
        command = [sys.executable, __file__, device, *sizes, "--point", str(budget)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{1000 * budget:9.0f}   {done.stderr.strip().splitlines()[-1]}")  # too small a budget says so
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        check_plausible(f"the peak under {budget} GB", found["peak_mb"], found["least_mb"])
        print(
            f"{1000 * budget:9.0f}{found['passes']:>9}{found['seconds']:>10.2f}{found['peak_mb']:>10.0f}"
            f"{1000 * budget + found['batch_mb']:>26.0f}",
            flush=True,
        )


def point(bench: Bench, memory_gb: float) -> dict[str, float]:
    """Measures passes, seconds and peak megabytes of curves, and the peak of one batch alone.

    All peaks are above what is held before. `least_mb` is the size of the largest matrix with its factors.
    """
    passes = _Passes()
    gather.log.addHandler(passes)
    gather.log.setLevel(logging.INFO)
    indices, batch = bench.text.batches[0]
    first = bench.params[:1]
    with frozen(bench.model):
        capture_factors(bench.model, first, {name: ids[:1, :8] for name, ids in batch.items()}, [""])  # warms up
        before = _held_mb(bench.device)
        _reset(bench.device)
        capture_factors(bench.model, first, batch, [""] * len(indices))
    batch_mb = _peak(bench.device) - before
    _reset(bench.device)
    _, seconds = timed(partial(bench.curves, "exact", SHARE, memory_gb), bench.device)
    peak = _peak(bench.device) - before
    num_positions = sum(ids["input_ids"].numel() for _, ids in bench.text.batches)
    weights: list[nn.Parameter] = [bench.model.get_parameter(param) for param in bench.params]
    least = max(sum(weight.shape) * num_positions * 4 for weight in weights) / 1e6
    return {"passes": passes.number, "seconds": seconds, "peak_mb": peak, "batch_mb": batch_mb, "least_mb": least}


class _Passes(logging.Handler):
    """Reads the number of passes out of the message that tells it; a single pass is not told."""

    number = 1

    def emit(self, record: logging.LogRecord) -> None:
        if "passes" in str(record.msg):
            assert isinstance(record.args, tuple)
            self.number = int(str(record.args[1]))


def _held_mb(device: str) -> float:
    return torch.cuda.memory_allocated() / 1e6 if device == "cuda" else resident_mb()


def _reset(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else peak_mb()


if __name__ == "__main__":
    main()
