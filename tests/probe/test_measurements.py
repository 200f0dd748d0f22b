"""Measurements: keyed by what determines them and nothing else; what the first process takes, all processes have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from layerif.models.pretrained import LocalModel
from layerif.probe import activations, store
from layerif.probe.activations import Activations, wrong_answers
from layerif.probe.grams.processes import Shards
from layerif.probe.grams.request import Grams
from layerif.probe.measurements import Measurements
from layerif.probe.settings import Probe
from layerif.probe.spectra import Spectra
from layerif.probe.store import Store
from tests.processes import SIZE, Pair
from tests.tiny import shipped_task


def measurements(model_folder: Path, task_folder: Path, store: Path) -> Measurements:
    model = LocalModel(path=str(model_folder))
    return Measurements(
        model=model,
        tokenizer=model.tokenizer(),
        splits=shipped_task("jsonl", f"task.path={task_folder}").load(),
        probe=Probe(num_train=8, num_validation=4),
        store=Store(store),
    )


@pytest.fixture
def measured(model_folder, task_folder, tmp_path) -> Measurements:
    return measurements(model_folder, task_folder, tmp_path / "store")


def test_what_changes_cost_alone_finds_the_same_grams(measured):
    grams, reused = Grams().take(measured, measured.model.load)
    assert not reused
    cheaper = replace(measured.probe, form="pairwise", memory_gb=1.0, offload="disk", batch_size=3)
    again, reused = Grams().take(replace(measured, probe=cheaper), measured.model.load)
    assert reused
    assert again.fingerprint == grams.fingerprint
    _, reused = Grams().take(replace(measured, probe=replace(measured.probe, projection=8)), measured.model.load)
    assert not reused
    assert not list(Path(measured.store.root).rglob("*.partial"))


def test_a_wrong_answer_stands_in_for_the_right_one(measured):
    examples = measured.chosen("train")
    for right, wrong, example in zip(measured.samples()[0], wrong_answers(measured), examples, strict=True):
        assert wrong is not None
        assert wrong.input_ids != right.input_ids
        assert wrong.input_ids[: wrong.prompt_length] == right.input_ids[: wrong.prompt_length]
        assert len(example.options) == 4
    assert wrong_answers(measured) == wrong_answers(measured)


def test_spectra_are_of_the_model_and_activations_of_the_samples_too(measured):
    other = replace(measured, probe=replace(measured.probe, num_train=4))
    load = measured.model.load
    assert not Spectra().take(measured, load)[1]
    assert Spectra().take(other, load)[1]
    assert not Activations(0.01).take(measured, load)[1]
    assert not Activations(0.01).take(other, load)[1]
    assert not Activations(0.1).take(measured, load)[1]
    assert Activations(0.01).take(measured, load)[1]


def test_the_description_of_gradients_follows_the_matrices_that_a_scope_takes(measured, monkeypatch):
    before = measured.description()
    assert measured.description() == before
    monkeypatch.setattr("layerif.models.blocks.is_attention", lambda name: "q_proj" in name)
    changed = measured.description()
    assert {name for name in before if changed[name] != before[name]} == {"matrices"}


def looks(measured: Measurements) -> Iterator[torch.Tensor]:
    spectra, _ = Spectra().take(measured, measured.model.load)
    yield from spectra.eigenvalues.values()
    seen, _ = Activations(0.01).take(measured, measured.model.load)
    yield from (seen.cosines, seen.prompts, seen.wrong)
    yield from seen.input_square_norms.values()


@pytest.fixture(scope="module")
def pair():
    found = Pair()
    yield found
    found.close()


def save_looks(rank: int, model_folder: Path, task_folder: Path, folder: Path, *, spoilt: bool) -> None:
    """Saves what each process sees as `folder/<rank>.pt`; where spoilt, the first process cannot look."""
    observe = activations.observe
    if spoilt and rank == 0:
        activations.observe = lambda *_, **__: (_ for _ in ()).throw(ValueError("its weights are spoilt"))
    try:
        torch.save(
            list(looks(measurements(model_folder, task_folder, folder / f"store-{rank}"))), folder / f"{rank}.pt"
        )
    finally:
        activations.observe = observe


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_first_process_takes_what_needs_no_gradients_and_all_have_it_or_fail(
    pair, measured, model_folder, task_folder, tmp_path, spoilt
):
    told = pair.run(save_looks, tmp_path, model_folder, task_folder, tmp_path, spoilt=spoilt)
    kept = {path.name: len(list(path.rglob("*.safetensors"))) for path in tmp_path.glob("store-*")}
    if spoilt:
        assert kept == {"store-0": 1}
        assert all("its weights are spoilt" in error for error in told)
        return
    assert kept == {"store-0": 2}
    alone = list(looks(measured))
    for rank in range(SIZE):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone, equal_nan=True)


def save_after_waiting(rank: int, model_folder: Path, task_folder: Path, folder: Path, key: str) -> None:
    """Lets the first process ask for Grams whose lock is held until all have shared something three times."""
    measured = measurements(model_folder, task_folder, folder / "both")
    lock, shared, share = FileLock(folder / "both" / "grams" / f"{key}.lock"), [], Shards.share

    def heard(self: Shards, mine: object) -> list[object]:
        shared.append(mine)
        if len(shared) == 3 and lock.is_locked:
            lock.release()
        return share(self, mine)

    minute, store._MINUTE, Shards.share = store._MINUTE, 0.01, heard
    try:
        if rank == 0:
            lock.acquire()
        grams, reused = Grams().take(measured, measured.model.load)
    finally:
        store._MINUTE, Shards.share = minute, share
    assert not reused
    assert len(shared) > 3
    torch.save([gram.train_train for gram in grams.grams.values()], folder / f"{rank}.pt")


def test_processes_are_told_that_the_first_waits_for_another_job(pair, measured, model_folder, task_folder, tmp_path):
    alone, _ = Grams().take(measured, measured.model.load)
    (tmp_path / "both" / "grams").mkdir(parents=True)
    told = pair.run(save_after_waiting, tmp_path, model_folder, task_folder, tmp_path, alone.fingerprint)
    assert told == ["", ""]
    expected = [gram.train_train for gram in alone.grams.values()]
    for rank in range(SIZE):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
