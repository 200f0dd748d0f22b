"""Selections, token filters and SPIDER in runs: what is recorded, what a killed run takes up, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from layerif.adapt.module import AdapterModule
from layerif.app.methods._rows import TABLE, check_selection
from layerif.app.run import _check_method
from layerif.record.record import RunRecord
from tests.command import run_layerif

SPIDER = ["method=full", "allocator=position", "allocator.keep=1", "method.protect=spider", "method.learning_rate=0.01"]


def ran(setup, folder: Path) -> RunRecord:
    record = RunRecord(name="test", seed=0, config={}, overrides=[])
    _check_method(setup)
    setup.method.run(setup, record, folder)
    return record


SLOW = pytest.mark.slow


@pytest.mark.parametrize("method", ["lora", "none", *(pytest.param(name, marks=SLOW) for name in ("lora_moe", "full"))])
def test_the_rows_are_in_the_record_and_scores_see_no_others(method, setup_of, tmp_path):
    setup = setup_of(f"method={method}", "selection=loss", "selection.budget=6", "estimator=grad_norm")
    record = ran(setup, tmp_path / "run")
    found = record.selection
    assert (found["budget"], found["unit"], found["of"]["rows"], found["taken"]["rows"]) == (6, "rows", 20, 6)
    assert found["values"] == sorted(found["values"], reverse=True)
    assert record.decision is not None
    assert sorted(record.decision.rows["train"]) == sorted(found["rows"])
    table: Any = pd.read_csv(tmp_path / "run" / TABLE)
    taken = table[table["place"].notna()].sort_values(by=["place"])
    assert list(taken["row"]) == found["rows"]
    assert taken["tokens"].sum() == found["taken"]["tokens"]
    assert table["value"].nlargest(6).tolist() == pytest.approx(found["values"])
    assert {*table["row"]} == {row.id for row in setup.splits.train}
    test_rows = {row.question for row in setup.splits.test}
    assert not test_rows & {row.question for row in setup.pool.rows}
    assert setup.pool.measurements.splits.test == ()


def test_the_identity_of_a_job_and_its_record_hold_selection_and_filter(tiny_overrides, tmp_path):
    chosen = ["selection=influence", "estimator@selection.estimator=grad_dot", "selection.budget=7", "method=lora"]
    filtered = ["data.token_filter=random", "data.tau=150.0"]
    record = run_layerif([*tiny_overrides, *chosen, *filtered], tmp_path)
    settings = record.identity["settings"]
    assert settings["selection"]["budget"] == 7
    assert (settings["data"]["token_filter"], settings["data"]["tau"]) == ("random", 150.0)
    choices = record.identity["choices"]
    assert (choices["selection"], choices["estimator@selection.estimator"]) == ("influence", "grad_dot")
    assert 0 < record.tokens["kept"] < record.tokens["counted"]
    assert RunRecord.read(tmp_path / "run").selection == record.selection
    assert {"select", "filter", "fit"} <= record.seconds.keys()


def test_a_killed_run_takes_the_same_rows_and_ends_with_the_same_bits(setup_of, tmp_path, monkeypatch):
    settings = [*SPIDER, "trainer.max_steps=4", "fit.checkpoint_steps=1", "selection=influence", "selection.budget=9"]
    settings += ["data.token_filter=low_perplexity", "data.tau=150.0"]
    whole = ran(setup_of(*settings), tmp_path / "whole")
    step = AdapterModule.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 2:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AdapterModule, "training_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        ran(setup_of(*settings), tmp_path / "again")
    monkeypatch.setattr(AdapterModule, "training_step", step)
    shutil.rmtree(tmp_path / "store" / "grams")  # the rows are those of the killed run, whatever the store has
    monkeypatch.setattr("layerif.attribution.selection.influence.helpfulness", None)
    again = ran(setup_of(*settings), tmp_path / "again")
    assert any("did not finish" in note for note in again.notes)
    assert again.selection == whole.selection
    assert again.tokens == whole.tokens
    expected, found = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again"))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_spider_moves_weights_less_and_no_other_layer(setup_of, tmp_path, model_folder):
    plain, mixed = [*SPIDER, "method.protect=none"], SPIDER
    for name, settings in (("plain", plain), ("mixed", mixed)):
        ran(setup_of(*settings, "trainer.max_steps=2"), tmp_path / name)
    before = load_file(model_folder / "model.safetensors")
    moved = {}
    for name in ("plain", "mixed"):
        after = load_file(tmp_path / name / "model" / "model.safetensors")
        moved[name] = sum(float((after[param] - before[param]).abs().sum()) for param in before)
        changed = {param for param in before if not torch.equal(after[param], before[param])}
        assert all(param.startswith("model.layers.2.") for param in changed)
    assert 0 < moved["mixed"] < moved["plain"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=drop", "selection=random"], r"^selection chooses the rows of fine-tuning, and method=drop does not"),
        (
            ["method=diagnose", "selection=loss"],
            r"^selection chooses the rows of fine-tuning, and method=diagnose does",
        ),
        (
            ["method=none", "data.token_filter=random"],
            r"^data\.token_filter=random is for fine-tuning, and method=none ",
        ),
        (
            ["selection=random", "selection.budget=21"],
            r"^selection\.budget=21 is more than the 20 train rows; use at most 20",
        ),
        (
            ["selection=mastery", "selection.budget=2"],
            r"^row \S+ asks for no fact that selection=mastery has sentences",
        ),
        (
            ["selection=random", "selection.budget=3", "data.drop_partial=true"],
            r"^data\.drop_partial=true leaves none of 3 samples at data\.batch_size=4",
        ),
    ],
)
def test_what_cannot_be_selected_is_refused_before_any_work(overrides, message, setup_of):
    setup = setup_of(*overrides)
    with pytest.raises(ValueError, match=message):
        _check_method(setup)


def test_a_filter_that_leaves_nothing_is_refused_before_training(setup_of, tmp_path):
    setup = setup_of("method=lora", "data.token_filter=low_perplexity", "data.tau=1.001")
    with pytest.raises(ValueError, match=r"^data\.token_filter=low_perplexity leaves no token of 20 rows to learn"):
        ran(setup, tmp_path)


def test_a_model_that_is_spread_over_devices_is_not_asked_about_rows(setup_of):
    for overrides, named in ((["selection=loss"], "this selection"), (["data.token_filter=lowest"], r"data\.token_fi")):
        setup = setup_of("method=lora", *overrides)
        object.__setattr__(setup.decider, "spread", True)
        with pytest.raises(ValueError, match=rf"^{named}.* asks the whole model about rows"):
            check_selection(setup)


def test_more_memory_is_asked_for_where_weights_are_protected(setup_of):
    setup = setup_of(*SPIDER)
    skeleton, allocation = setup.model.skeleton(), setup.decider.preview()
    numel = sum(weight.numel() for weight in skeleton.model.layers[2].parameters())
    setup.method.check_fits(skeleton, allocation, free=24 * numel)
    with pytest.raises(
        ValueError, match=r"^1 layers to train with method\.protect=spider .*, and 2 numbers more for each"
    ):
        setup.method.check_fits(skeleton, allocation, free=24 * numel - 1)
