"""Two processes probe together (gloo, CPU): the same Grams, whatever the number of samples, and no silent survivor."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from layerif.evidence import LayerGrams
from layerif.models.blocks import layer_map
from layerif.probe.grams import measure as measurement
from layerif.probe.grams.measure import measure
from layerif.probe.grams.processes import Shards, spread
from layerif.probe.grams.projection import Projection
from tests.probe.grams.test_measure import NUM_TRAIN, assert_equal, batched, samples
from tests.tiny import tiny_model

SIZE = 2


def measured(size: int = 1, num_train: int = NUM_TRAIN, *, spread_out: bool = False, **options) -> LayerGrams:
    # float32: a spread model computes its rotary embeddings in it, and every process the same.
    model = tiny_model("llama")
    layers = layer_map(model, scope="all")
    if spread_out:
        model = spread(model, "cpu")
    rows = samples()
    return measure(model, layers, batched(rows[:num_train], size), batched(rows[NUM_TRAIN:], size), **options)


def in_processes(task: str, folder: Path, **options) -> None:
    """Run `measured(**options)` in every process; each saves its Grams as `folder/<rank>.pt`."""
    mp.spawn(_process, (task, folder, options), nprocs=SIZE)  # type: ignore[attr-defined]


def _process(rank: int, task: str, folder: Path, options: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / task}", rank=rank, world_size=SIZE)
    if task == "die" and rank == 1:
        run = measurement.capture_factors
        calls = []

        def capture_factors(*args, **options):
            calls.append(args)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return run(*args, **options)

        measurement.capture_factors = capture_factors
    if task == "spoil" and rank == 1:
        run_whole = measurement.capture_factors

        def spoilt(*args, **options):  # as a loss that is not finite: found out after the batch has run
            run_whole(*args, **options)
            raise ValueError("its sample is spoilt")

        measurement.capture_factors = spoilt
    try:
        grams = measured(**options)
    except ValueError as error:
        (folder / f"{rank}.error").write_text(str(error))
        raise
    torch.save(grams, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 4, "num_train": 3},  # one batch of each part: shares of one and of one, widths differ
        {"size": 3},  # three batches for two processes
        {"offload": "disk"},
        {"projection": Projection(8, seed=3)},
    ],
    ids=str,
)
def test_two_processes_equal_one(options, tmp_path):
    alone = measured(**options, partial=tmp_path / "alone")
    in_processes("equal", tmp_path, **options, partial=tmp_path / "partial")
    for rank in range(SIZE):
        assert_equal(torch.load(tmp_path / f"{rank}.pt", weights_only=False), alone, 1e-4)


def test_more_processes_than_batches_leave_some_idle(tmp_path):
    in_processes("idle", tmp_path, size=7, num_train=1)
    assert_equal(torch.load(tmp_path / "1.pt", weights_only=False), measured(size=7, num_train=1), 1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_a_spread_model_gives_the_same_grams(size, tmp_path):
    in_processes("spread", tmp_path, size=size, spread_out=True)
    assert_equal(torch.load(tmp_path / "0.pt", weights_only=False), measured(size=size), 1e-4)


def test_a_killed_process_fails_the_run_and_a_rerun_finishes(tmp_path):
    with pytest.raises(Exception, match=r"SIGKILL|terminated"):
        in_processes("die", tmp_path, offload="disk", partial=tmp_path / "partial")
    assert not list(tmp_path.glob("*.pt"))
    left = len(list((tmp_path / "partial").glob("tile-*")))
    assert left >= 1
    in_processes("again", tmp_path, offload="disk", partial=tmp_path / "partial")
    assert_equal(torch.load(tmp_path / "0.pt", weights_only=False), measured(), 1e-4)


@pytest.mark.parametrize("spread_out", [False, True])
def test_the_failure_of_one_process_is_told_by_all(spread_out, tmp_path):
    with pytest.raises(Exception, match="spoilt"):
        in_processes("spoil", tmp_path, spread_out=spread_out)
    assert (tmp_path / "1.error").read_text() == "its sample is spoilt"
    assert "process 1 of 2 could not go on: its sample is spoilt" in (tmp_path / "0.error").read_text()
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("num_lost", [1, 2, 3])
def test_a_spread_model_resumes_whatever_each_process_has_left(num_lost, tmp_path):
    partial = tmp_path / "partial"
    in_processes("first", tmp_path, offload="disk", partial=partial, spread_out=True)
    for file in sorted(partial.glob("tile-*"))[:num_lost]:
        file.unlink()
    in_processes("second", tmp_path, offload="disk", partial=partial, spread_out=True)
    assert_equal(torch.load(tmp_path / "0.pt", weights_only=False), measured(), 1e-4)


def test_shares_part_the_items():
    items = list(range(7))
    shares = [Shards(rank, 3).of(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) == 1
