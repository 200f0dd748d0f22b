"""Training some layers from the command line: what a run leaves and records, and what it refuses before any work."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerif.adapt.module import AdapterModule
from layerif.app.methods.full import Full
from layerif.record.record import RunRecord
from tests.command import layerif_here, run_layerif

UNMEASURED = ["allocator=position", "allocator.keep=1"]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_full_fine_tuning_leaves_a_model_for_plain_transformers(tiny_overrides, tmp_path, model_folder):
    record = run_layerif([*tiny_overrides, "method=full", "allocator.keep=2", "estimator=grad_norm"], tmp_path)
    assert record.decision.allocation.kind == "layers"
    trained = [block for block, value in record.decision.allocation.by_block().items() if value]
    assert len(trained) == record.decision.allocation.budget == 2
    folder, inside = tmp_path / "run" / "model", tuple(f"{block}." for block in trained)
    before, after = load_file(model_folder / "model.safetensors"), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) != name.startswith(inside), name
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("Which?").input_ids
    numel = sum(weight.numel() for name, weight in after.items() if name.startswith(inside))
    assert record.parameters == {"total": model.num_parameters(), "trainable": numel}
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_model_is_not_written_where_it_is_not_asked_for(tiny_overrides, tmp_path):
    record = run_layerif([*tiny_overrides, "method=full", *UNMEASURED, "method.save=false"], tmp_path)
    assert record.decision.source == "position(last)"
    assert record.metrics["loss"] > 0
    assert not (tmp_path / "run" / "model").exists()


def test_seconds_a_step_and_memory_are_recorded_and_shown(tiny_overrides, tmp_path):
    shown = [*tiny_overrides, "method=full", *UNMEASURED, "method.save=false", f"hydra.run.dir={tmp_path / 'run'}"]
    done = layerif_here(shown, tmp_path)
    cost = RunRecord.read(tmp_path / "run").training
    assert cost["seconds_per_step"] > 0
    assert cost["memory_of"] == "process"
    assert 0.05 < cost["memory_gb"] < 100
    assert "s a step" in done.stdout
    assert "training GB" in done.stdout


def test_a_killed_run_carries_on_and_ends_with_the_same_bits(setup_of, tmp_path, monkeypatch):
    settings = ["method=full", *UNMEASURED, "trainer.max_steps=4", "fit.checkpoint_steps=1", "data.seed=1"]

    def run(folder) -> RunRecord:
        setup = setup_of(*settings, "method.learning_rate=0.01")
        record = RunRecord(name="test", seed=0, config={}, overrides=[])
        setup.method.check(setup)
        setup.method.run(setup, record, folder)
        return record

    run(tmp_path / "whole")
    step = AdapterModule.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 2:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AdapterModule, "training_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "again")
    monkeypatch.setattr(AdapterModule, "training_step", step)
    assert any("did not finish" in note for note in run(tmp_path / "again").notes)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "again")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_lora_on_some_layers_has_the_parameters_of_all(tiny_overrides, tmp_path):
    equal = ["method=lora", *UNMEASURED, "method.r=2", "method.equal_parameters=true"]
    record = run_layerif([*tiny_overrides, *equal], tmp_path)
    assert record.parameters["trainable"] == record.parameters["all_layers"]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(".layers.2." in name for name in saved)
    assert {min(value.shape) for value in saved.values()} == {6}


def test_lora_moe_spends_layers_from_a_file(tiny_overrides, tmp_path):
    (tmp_path / "layers.json").write_text("[0, 1, 1]")
    given = ["allocator=file", "allocator.kind=layers", f"allocator.path={tmp_path / 'layers.json'}"]
    record = run_layerif([*tiny_overrides, "method=lora_moe", *given, "method.num_experts=3"], tmp_path)
    assert set(record.routing) == {"model.layers.1", "model.layers.2"}
    assert {len(block["load"]) for block in record.routing.values()} == {3}


def test_layers_of_a_file_that_trains_none_are_refused(setup_of, tmp_path):
    (tmp_path / "layers.json").write_text("[0, 0, 0]")
    for method in ("lora", "lora_moe", "full"):
        given = ["allocator=file", "allocator.kind=layers", f"allocator.path={tmp_path / 'layers.json'}"]
        setup = setup_of(f"method={method}", *given)
        with pytest.raises(ValueError, match=r"^the allocation trains none of 3 layers; give at least one of them the"):
            setup.method.check(setup)


def test_full_fine_tuning_has_a_learning_rate_of_its_own(setup_of):
    full, lora = (setup_of(f"method={name}").method.learning_rate for name in ("full", "lora"))
    assert Full().learning_rate == full == 2e-5 < lora
