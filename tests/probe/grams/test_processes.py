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
from layerif.probe.curvature.measure import measure_curvature
from layerif.probe.grams import gather as measurement
from layerif.probe.grams.measure import measure
from layerif.probe.grams.processes import Shards, spread
from layerif.probe.grams.projection import Projection
from tests.families import model_of as family_model
from tests.probe.grams.test_measure import NUM_TRAIN, assert_equal, batched, samples
from tests.processes import SIZE, Pair
from tests.tiny import tiny_model


def measured(size: int = 1, num_train: int = NUM_TRAIN, *, spread_out: bool = False, **options) -> LayerGrams:
    # float32: a spread model computes its rotary embeddings in it, and every process the same.
    model = tiny_model("llama")
    layers = layer_map(model, scope="all")
    if spread_out:
        model = spread(model, "cpu")
    rows = samples()
    return measure(model, layers, batched(rows[:num_train], size), batched(rows[NUM_TRAIN:], size), **options)


def save_measured(rank: int, folder: Path, *, spoilt: bool = False, **options) -> None:
    """Saves the Grams of `measured(**options)` as `folder/<rank>.pt`; where spoilt, one fails after a batch has run."""
    capture = measurement.capture_factors

    def capture_and_fail(*args, **given):
        capture(*args, **given)
        raise ValueError("its sample is spoilt")

    if spoilt and rank == 1:
        measurement.capture_factors = capture_and_fail
    try:
        torch.save(measured(**options), folder / f"{rank}.pt")
    finally:
        measurement.capture_factors = capture


def grams_of(folder: Path, rank: int) -> LayerGrams:
    return torch.load(folder / f"{rank}.pt", weights_only=False)


@pytest.fixture(scope="module")
def pair():
    found = Pair()
    yield found
    found.close()


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
def test_two_processes_equal_one(pair, options, tmp_path):
    alone = measured(**options, partial=tmp_path / "alone")
    assert pair.run(save_measured, tmp_path, tmp_path, **options, partial=tmp_path / "partial") == ["", ""]
    for rank in range(SIZE):
        assert_equal(grams_of(tmp_path, rank), alone, 1e-4)


def test_more_processes_than_batches_leave_some_idle(pair, tmp_path):
    assert pair.run(save_measured, tmp_path, tmp_path, size=7, num_train=1) == ["", ""]
    assert_equal(grams_of(tmp_path, 1), measured(size=7, num_train=1), 1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_a_spread_model_gives_the_same_grams(pair, size, tmp_path):
    assert pair.run(save_measured, tmp_path, tmp_path, size=size, spread_out=True) == ["", ""]
    assert_equal(grams_of(tmp_path, 0), measured(size=size), 1e-4)


def save_of_experts(rank: int, folder: Path, *, spread_out: bool) -> None:
    # Short rows leave an expert without a token while the other process runs a longer one.
    model, rows = family_model("mixtral"), [row[:2] if number % 2 else row for number, row in enumerate(samples())]
    layers = layer_map(model, scope="mlp")
    if spread_out:
        model = spread(model, "cpu")
    parts = batched(rows[:NUM_TRAIN], 1), batched(rows[NUM_TRAIN:], 1)
    torch.save(measure(model, layers, *parts), folder / f"{rank}.pt")


@pytest.mark.slow
def test_an_expert_without_tokens_in_one_process_keeps_no_other_waiting(pair, tmp_path):
    save_of_experts(SIZE, tmp_path, spread_out=False)  # alone
    assert pair.run(save_of_experts, tmp_path, tmp_path, spread_out=True) == ["", ""]
    for rank in range(SIZE):
        assert_equal(grams_of(tmp_path, rank), grams_of(tmp_path, SIZE), 1e-4)


def save_curvature(rank: int, folder: Path) -> None:
    model, rows = tiny_model("llama"), samples()
    parts = batched(rows[:NUM_TRAIN], 3), batched(rows[NUM_TRAIN:], 3)
    torch.save(measure_curvature(model, layer_map(model, scope="all"), *parts), folder / f"{rank}.pt")


def test_two_processes_measure_curvature_as_one(pair, tmp_path):
    save_curvature(SIZE, tmp_path)  # alone
    assert pair.run(save_curvature, tmp_path, tmp_path) == ["", ""]
    *each, alone = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(SIZE + 1))
    for found in each:
        for param, matrix in alone.matrices.items():
            for spectrum, influence_KQN in matrix.influences.items():
                torch.testing.assert_close(
                    found.matrices[param].influences[spectrum], influence_KQN, rtol=1e-3, atol=1e-3
                )


@pytest.mark.parametrize("spread_out", [False, True])
def test_the_failure_of_one_process_is_told_by_all(pair, spread_out, tmp_path):
    told = pair.run(save_measured, tmp_path, tmp_path, spoilt=True, spread_out=spread_out)
    assert told[1] == "its sample is spoilt"
    assert "process 1 of 2 could not go on: its sample is spoilt" in told[0]
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("num_lost", [1, 2, 3])
def test_a_spread_model_resumes_whatever_each_process_has_left(pair, num_lost, tmp_path):
    options = {"offload": "disk", "partial": tmp_path / "partial", "spread_out": True}
    assert pair.run(save_measured, tmp_path, tmp_path, **options) == ["", ""]
    for file in sorted((tmp_path / "partial").glob("tile-*"))[:num_lost]:
        file.unlink()
    assert pair.run(save_measured, tmp_path, tmp_path, **options) == ["", ""]
    assert_equal(grams_of(tmp_path, 0), measured(), 1e-4)


def test_a_killed_process_fails_the_run_and_a_rerun_finishes(pair, tmp_path):
    options = {"offload": "disk", "partial": tmp_path / "partial"}
    with pytest.raises(Exception, match=r"SIGKILL|terminated"):
        mp.spawn(_dies, (tmp_path, options), nprocs=SIZE)  # type: ignore[attr-defined]
    assert not list(tmp_path.glob("*.pt"))
    assert list((tmp_path / "partial").glob("tile-*"))
    assert pair.run(save_measured, tmp_path, tmp_path, **options) == ["", ""]
    assert_equal(grams_of(tmp_path, 0), measured(), 1e-4)


def _dies(rank: int, folder: Path, options: dict) -> None:
    """Measures as `save_measured` does, but the second process is killed in its second batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'die'}", rank=rank, world_size=SIZE)
    capture, calls = measurement.capture_factors, []

    def capture_or_die(*args, **given):
        calls.append(args)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return capture(*args, **given)

    measurement.capture_factors = capture_or_die
    save_measured(rank, folder, **options)


def test_shares_part_the_items():
    items = list(range(7))
    shares = [Shards(rank, 3).of(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) == 1
