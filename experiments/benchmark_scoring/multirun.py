"""Measures the cost of another job of a multirun, and of two hundred settings against the pass that they share.

    OMP_WAIT_POLICY=passive python experiments/benchmark_scoring/multirun.py --train=300 --validation=50

The first part runs `layerif -m estimator=datainf,exact,lissa estimator.damping=0.01,0.1,1 method=none` on SmolLM2-135M,
in a process of its own and with an empty store. The first job measures the Grams, and the others find them. Hydra's own
part is the time between the end of one job and the start of the next. The rows are technical prose of 128 tokens, as
many as asked for.

The second part loads those Grams and runs estimator × damping × aggregation × smoothing × budget, each setting from the
Grams to the allocation. The Grams remember what settings share. "One" is the gradient pass and one setting. Both start
from Grams that remember nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experiments.timing import check_plausible, fresh, machine, reading, timed
from layerif.allocate.allocation import Allocation
from layerif.allocate.experts import Experts
from layerif.data.text import documentation_text
from layerif.estimators._base import GramEstimator
from layerif.estimators.datainf import DataInf
from layerif.estimators.exact import Exact
from layerif.estimators.grad_dot import GradDot
from layerif.estimators.lissa import Lissa
from layerif.evidence import LayerGrams
from layerif.record.record import RunRecord

SWEEP = ("estimator=datainf,exact,lissa", "estimator.damping=0.01,0.1,1", "method=none")
WORDS = 110  # a little over 128 tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--validation", type=int, default=32)
    given = parser.parse_args()
    print(f"{machine()}; SmolLM2-135M, attention weights, {given.train} + {given.validation} samples of 128 tokens\n")
    with tempfile.TemporaryDirectory() as folder:
        one_pass, grams = multirun(Path(folder), given.train, given.validation)
    settings(one_pass, grams)


def multirun(folder: Path, num_train: int, num_validation: int) -> tuple[float, LayerGrams]:
    """Prints the seconds of the jobs, and returns those of the gradient pass with its Grams."""
    write_rows(folder / "task", {"train": num_train, "validation": num_validation, "test": 4})
    overrides = [
        *SWEEP,
        "task=jsonl",
        f"task.path={folder / 'task'}",
        f"probe.num_train={num_train}",
        f"probe.num_validation={num_validation}",
        f"outputs={folder}",
        f"model.cache={Path('outputs/store/models').absolute()}",
    ]
    environment = {**os.environ, "LAYERIF_TIMES": str(folder / "times.json")}
    command = [sys.executable, __file__, "--jobs", "-m", *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    times = json.loads((folder / "times.json").read_text())
    jobs = [end - start for start, end in times]
    between = [start - end for (_, end), (start, _) in itertools.pairwise(times)]
    further = jobs[1:]
    print(f"{len(jobs)} jobs, {len(re.findall('gradient pass: [0-9]', done.stdout))} gradient pass in their logs")
    print("first job s   further jobs s: median    most   Hydra's own s: median")
    print(f"{jobs[0]:11.2f}{statistics.median(further):25.3f}{max(further):8.3f}{statistics.median(between):24.3f}\n")
    records = [RunRecord.read(file.parent) for file in folder.rglob("record.json")]
    return max(record.seconds["evidence"] for record in records), stored(folder)


def settings(one_pass: float, grams: LayerGrams) -> None:
    estimators = list(_estimators())
    allocators = [
        Experts(budget=budget, smoothing=smoothing)
        for smoothing, budget in itertools.product((False, True), (90, 120, 150, 180, 210))
    ]
    both = list(itertools.product(estimators, allocators))

    def run(some: list[tuple[GramEstimator, Experts]], given: LayerGrams) -> list[Allocation]:
        return [allocator(estimator.score(given), given.layers) for estimator, allocator in some]

    (_, one), (_, every) = (timed(partial(run, some, fresh(grams))) for some in (both[:1], both))
    least = reading(tensor for gram in grams.grams.values() for tensor in (gram.train_train, gram.val_train))
    check_plausible("one setting", one, least)
    check_plausible("all settings", every, one)
    print("one pass s   one setting s   all settings s   settings   (pass + all) / (pass + one)")
    ratio = (one_pass + every) / (one_pass + one)
    print(f"{one_pass:10.2f}{one:16.3f}{every:17.2f}{len(both):11d}{ratio:20.3f}")


def stored(folder: Path) -> LayerGrams:
    """Reads the Grams that the sweep left, as another job would."""
    from layerif.probe import store
    from layerif.probe.grams.request import GRAMS

    (file,) = (folder / "store" / "grams").glob("*.safetensors")
    grams, _ = store._read(file, GRAMS.unpack)
    return grams


def write_rows(folder: Path, counts: dict[str, int]) -> None:
    """Writes different questions whose texts fill the probe's 128 tokens."""
    words = itertools.cycle(documentation_text("calibration").split())
    folder.mkdir()
    for split, count in counts.items():
        texts = [" ".join([f"{split} {index}", *itertools.islice(words, WORDS)]) for index in range(count)]
        rows = [{"question": text, "options": ["yes", "no"], "answer": 0} for text in texts]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def jobs() -> None:
    """Runs the command line with a clock around every job."""
    from layerif.app import run
    from layerif.app.main import main as layerif

    work, times = run.run, []

    def clocked(config) -> None:
        start = time.perf_counter()
        work(config)
        times.append((start, time.perf_counter()))

    run.run = clocked
    try:
        layerif()
    finally:
        Path(os.environ["LAYERIF_TIMES"]).write_text(json.dumps(times))


def _estimators() -> Iterator[GramEstimator]:
    for aggregation in ("all", "positive"):
        yield GradDot(aggregation=aggregation)
        for damping in (0.01, 0.1, 1.0):
            for cls in (DataInf, Exact, Lissa):
                yield cls(aggregation=aggregation, damping=damping)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--jobs"]:
        del sys.argv[1]
        jobs()
    else:
        main()
