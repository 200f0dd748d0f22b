"""Pruning as a run: decided before it starts, kept for plain transformers, resumable, recovered with zeros kept."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
from hydra.errors import InstantiationException
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from layerif.data.text import text
from layerif.evaluate.harness import zero_shot_means
from layerif.evaluate.perplexity import perplexity
from layerif.models.pretrained import LocalModel
from layerif.pruning import walk
from layerif.pruning.calibration import Calibration
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.module import PruneModule
from layerif.pruning.semi_structured import is_two_four, speed_of_two_four
from layerif.pruning.targets import matrices
from layerif.record.record import RunRecord
from tests.app.methods.runs import pruned
from tests.command import layerif_here, run_layerif
from tests.tiny import tiny_model, tiny_tokenizer

PRUNE = [
    "method=prune",
    "allocator=sparsity",
    "allocator.smoothing=false",
    "method.calibration.num_windows=3",
    "method.calibration.window=40",
    "method.calibration.batch_size=2",
    "evaluation.window=40",
    "evaluation.num_windows=5",
    "evaluation.metrics=[options,perplexity]",
]


@pytest.fixture
def setup(setup_of):
    return lambda *overrides: setup_of(*PRUNE, *overrides)


def zeros(record: RunRecord, folder: Path) -> float:
    table = pd.read_csv(folder / "sparsity.csv")
    assert dict(zip(table["matrix"], table["sparsity"], strict=True)) == pytest.approx(record.sparsity)
    return int(sum(table["zeros"])) / int(sum(table["parameters"]))


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "magnitude pruner.swaps=true"])
def test_scores_become_sparsities_become_zeros(setup, tmp_path, pruner):
    found = setup(*f"pruner={pruner}".split(), "allocator.target=0.47", "allocator.epsilon=0.3")
    record = pruned(found, tmp_path / "run")
    folder = tmp_path / "run"
    assert record.decision.allocation.kind == "sparsity"
    assert len(set(record.decision.allocation.values)) == 3
    assert record.metrics["sparsity"] == zeros(record, folder)
    assert abs(record.metrics["sparsity"] - 0.47) <= 0.5 / record.parameters["pruned"] + 1e-12
    assert abs(record.parameters["zero"] - 0.47 * record.parameters["pruned"]) <= 0.5 + 1e-6
    for block, wanted in zip(record.decision.allocation.units, record.decision.allocation.values, strict=True):
        inside = [value for name, value in record.sparsity.items() if name.startswith(f"{block}.")]
        assert len(inside) == 7
        assert inside == pytest.approx([wanted] * 7, abs=0.003)
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = found.tokenizer(text("documentation", "test"))["input_ids"][: 5 * 40]
    assert perplexity(reloaded, ids, window=40, batch_size=16) == pytest.approx(record.metrics["perplexity_40"])
    assert 0 <= record.metrics["accuracy"] <= 1


def test_mixed_groups_spend_the_scores_and_say_what_they_miss(setup, tmp_path):
    record = pruned(setup("pruner.m=8", "allocator.target=0.55", "allocator.epsilon=0.4"), tmp_path / "run")
    eighths = {value * 8 for value in record.sparsity.values()}
    assert all(value == round(value) for value in eighths)
    assert len(eighths) > 1
    assert abs(record.metrics["sparsity"] - 0.55) <= 0.5 / 8 / 3 + 1e-9
    assert any("n of 8 comes no nearer" in note for note in record.notes)


def test_a_killed_run_carries_on_to_the_same_bits(setup, tmp_path, monkeypatch):
    overrides = ["pruner=sparsegpt", "method.offload=disk"]
    whole = pruned(setup(*overrides), tmp_path / "whole")
    real = walk.Walk._prune

    def die(self, name, block):
        if name == "model.layers.2":
            raise KeyboardInterrupt
        real(self, name, block)

    monkeypatch.setattr(walk.Walk, "_prune", die)
    with pytest.raises(KeyboardInterrupt):
        pruned(setup(*overrides), tmp_path / "killed")
    assert len(list((tmp_path / "killed" / "blocks").glob("block-*"))) == 2
    monkeypatch.setattr(walk.Walk, "_prune", real)
    monkeypatch.setattr(walk, "_header", lambda file: {"seconds": "1000"})
    resumed = pruned(setup(*overrides), tmp_path / "killed")
    assert 2000 < resumed.seconds["prune"] < 2900  # the seconds of the two blocks before and of this process
    assert "2 blocks were pruned by a run that did not finish" in resumed.notes
    assert resumed.metrics == whole.metrics
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = pruned(
        setup(*overrides, "allocator.target=0.3"), tmp_path / "killed"
    )  # blocks of another job are not taken over
    assert other.metrics["sparsity"] == pytest.approx(0.3, abs=1e-4)


def test_a_disk_that_is_full_at_the_end_says_what_to_do_and_costs_no_block(setup, tmp_path, monkeypatch):
    def full(model, folder):
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(OSError, match=r"cannot write the pruned model .* No space left .* method\.save=false"):
            pruned(setup("estimator=uniform"), tmp_path / "run")
    again = pruned(setup("estimator=uniform"), tmp_path / "run")
    assert "3 blocks were pruned by a run that did not finish" in again.notes


def test_a_sparsity_for_every_matrix_comes_from_a_file(setup, tmp_path):
    file = tmp_path / "matrices.json"
    blocks = {f"model.layers.{index}": 0.5 for index in range(3)}
    file.write_text(json.dumps(blocks | {"model.layers.1.mlp.up_proj": 0.25, "model.layers.2.self_attn": 0.75}))
    found = setup(f"method.allocation={file}", "evaluation.metrics=[options]")
    record = pruned(found, tmp_path / "run")
    assert record.decision.scores is None
    assert record.sparsity["model.layers.1.mlp.up_proj"] == 0.25
    assert record.sparsity["model.layers.1.mlp.gate_proj"] == 0.5
    assert record.sparsity["model.layers.2.self_attn.k_proj"] == 0.75
    assert record.metrics["sparsity"] == pytest.approx(record.decision.allocation.budget, abs=1e-12)
    assert "method.allocation" in found.inputs()


def test_recovery_by_lora_keeps_every_zero_and_merges_to_what_was_trained(setup, tmp_path):
    recover = ["method.recover=lora", "method.adapter.learning_rate=0.05", "method.adapter.lora_dropout=0"]
    record = pruned(setup(*recover, "trainer.max_steps=4", "data.template=plain"), tmp_path / "run")
    assert record.recovery["experts"] == dict.fromkeys(record.decision.allocation.units, 1)
    assert record.metrics["perplexity_40"] != record.metrics["pruned/perplexity_40"]
    before, after = (
        matrices(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)) for name in ("model", "recovered")
    )
    for name in before:
        assert bool((after[name].weight[before[name].weight == 0] == 0).all())
        assert not torch.equal(after[name].weight, before[name].weight)

    from peft import PeftModel

    import layerif.moe  # noqa: F401 - registers the adapter's type

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "recovered")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_recovery_by_lora_moe_allocates_by_scores_of_the_pruned_model(setup, tmp_path):
    found = setup("method.recover=lora_moe", "method.experts.budget=9")
    record = pruned(found, tmp_path / "run")
    assert record.recovery["method"] == "lora_moe"
    assert sum(record.recovery["experts"].values()) == 9
    of_pruned = replace(found.decider, model=LocalModel(path=str(tmp_path / "run" / "model")))()
    assert of_pruned.reused
    decision = record.recovery["decision"]
    assert decision["scores"] == asdict(of_pruned.record())["scores"]
    assert decision["reliability"] == of_pruned.reliability
    assert decision["scores"]["values"] != record.decision.scores.values
    assert set(record.recovery["notes"]) == set(of_pruned.notes)
    assert record.recovery["seconds"].keys() == {"evidence", "score", "allocate"}
    assert record.write(tmp_path / "run").exists()
    assert {"pruned/accuracy", "accuracy"} <= record.metrics.keys()
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "run" / "recovered").exists()


def test_the_recovery_of_sparsities_from_a_file_goes_by_blocks(setup, tmp_path):
    file = tmp_path / "sparsity.json"
    file.write_text(json.dumps({f"model.layers.{index}": 0.5 for index in range(3)}))
    given, names = f"method.allocation={file}", [f"model.layers.{index}" for index in range(3)]
    experts = pruned(setup(given, "method.recover=lora_moe", "method.experts.budget=9"), tmp_path / "experts")
    assert experts.decision.allocation.units == names
    assert experts.routing.keys() == {name for name, number in experts.recovery["experts"].items() if number > 1}
    assert experts.routing
    plain = pruned(setup(given, "method.recover=lora"), tmp_path / "plain")
    assert plain.recovery == {"method": "lora", "experts": dict.fromkeys(names, 1), "decision": None}


def test_on_the_command_line_with_another_family(tiny_overrides, tmp_path):
    folder = tmp_path / "opt"
    tiny_model("opt").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    overrides = [*tiny_overrides, *PRUNE, "pruner=wanda", "allocator.target=0.5", f"model.path={folder}"]
    dry = layerif_here([*overrides, "dry_run=true"], tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "Wanda, 18 matrices" in dry.stdout
    record = run_layerif(overrides, tmp_path)
    assert record.metrics["sparsity"] == 0.5
    assert len(record.sparsity) == 18
    assert record.decision.scores
    assert not (tmp_path / "run" / "blocks").exists()
    assert any("neither time nor memory" in note for note in record.notes)
    assert {"evidence", "prune", "evaluate"} <= record.seconds.keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["allocator.target=1.0"],
            r"allocator\.target=1\.0 is not allowed; allowed: a finite number of at least 0 and",
        ),
        (["allocator.target=-0.1"], r"allocator\.target=-0\.1 is not allowed"),
        (["allocator.target=0.9", "allocator.epsilon=1", "allocator.max_sparsity=0.8"], "outside the feasible range"),
        (["pruner.n=2", "pruner.m=4"], "use estimator=uniform, or pruner.n=null"),
        (["pruner.n=2", "pruner.m=4", "estimator=uniform", "allocator.target=0.6"], r"allocator\.target=0\.5"),
        (["pruner.m=7", "estimator=uniform"], r"q_proj with 32 inputs cannot be cut into groups of m=7"),
        (["method.calibration.num_windows=100000"], r"num_windows=100000 asks for more"),
        (["method.calibration.text=/nowhere"], r"'/nowhere' cannot be read"),
        (["method.recover=lora", "method.adapter=null"], r"needs method\.adapter"),
        (["method.allocation=/nowhere.json"], r"method\.allocation file '/nowhere\.json' cannot be read"),
        (["method.recover=lora", "method.save=false"], r"use method\.save=true"),
        (["method.recover=lora_moe", "method.experts.budget=2"], "budget=2 cannot give 3 layers 1 expert each"),
        (["method.recover=lora", "method.adapter.keep_zeros=false"], r"keep_zeros=false would fill the zeros"),
        (["model.adapter=/nowhere"], "the adapter '/nowhere' holds no adapter_config.json"),
        (["allocator.smoothing=true"], "smoothing with window=7 needs at least 7 layers, got 3"),
        (["method.offload=gpu"], r"allowed: device, cpu, disk"),
        (["evaluation.num_windows=0"], r"evaluation\.num_windows=0"),
        (
            ["evaluation.num_windows=100000"],
            r"num_windows=100000 asks for more than the text .* holds, which is \d+ windows of 40",
        ),
        (["allocator.max_sparsity=1"], r"max_sparsity=1 is not allowed"),
        (["method.recover=lora", "method.adapter.warmup_ratio=2"], r"warmup_ratio=2"),
        (
            ["method.recover=lora", "method.adapter.target_modules=[q_porj]"],
            r"'q_porj', which is not a layer of this model",
        ),
        (["method.recover=lora", "fit.patience=-1"], r"fit\.patience=-1 is not allowed"),
        (["method.recover=lora_moe", "data.batch_size=0"], r"data\.batch_size=0 is not allowed"),
        (
            ["method.recover=lora_moe", "data.max_length=1"],
            r"data\.max_length=1 is not allowed",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(setup, overrides, message):
    def refused():
        found = setup(*overrides)
        found.method.check(found)

    with pytest.raises((ValueError, InstantiationException), match=message) as raised:
        refused()
    assert isinstance(raised.value, ValueError) or isinstance(raised.value.__cause__, ValueError)


def test_without_an_allocation_the_module_says_so(model_folder, tmp_path):
    module = PruneModule(LocalModel(path=str(model_folder)), Magnitude(), Calibration())
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(ValueError, match="no allocation yet"):
        trainer.fit(module)


def test_two_four_is_recognised_and_its_format_asks_for_a_gpu():
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3], [1, 1, 0, 0, 0, 1, 1, 0]])
    assert is_two_four(weight)
    assert not is_two_four(weight + 1)
    assert not is_two_four(weight[:, :6])
    with pytest.raises(ValueError, match=r"needs a CUDA device .* neither time nor memory"):
        speed_of_two_four({"q_proj": torch.nn.Linear(8, 8)}, 4)


@pytest.mark.gpu
def test_two_four_products_are_timed_on_a_gpu():
    linear = torch.nn.Linear(256, 256, bias=False, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        linear.weight.copy_(Magnitude(n=2, m=4)(linear.weight, None, None, 2))
    assert speed_of_two_four({"x": linear}, 64) > 0


def test_the_mean_of_the_seven_tasks_names_what_it_is_of():
    tasks = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
    metrics = {f"lm_eval/{task}/acc": number / 10 for number, task in enumerate(tasks)}
    metrics |= {f"lm_eval/{task}/acc_norm": 0.9 for task in ("hellaswag", "arc_easy", "arc_challenge", "openbookqa")}
    assert zero_shot_means(metrics) == pytest.approx(
        {
            "lm_eval/zero_shot_mean/acc": 0.3,
            "lm_eval/zero_shot_mean/acc_norm_or_acc": (0.0 + 0.1 + 0.3 + 4 * 0.9) / 7,
        }
    )


@pytest.mark.parametrize("early", ["max_time='00:00:00:00'", "fast_dev_run=true", "overfit_batches=1"])
def test_a_trainer_that_stops_early_does_not_pass_for_done(setup, tmp_path, early):
    with pytest.raises(ValueError, match=r"stopped after [01] of 3 blocks, and pruning needs all of them"):
        pruned(setup("estimator=uniform", f"+trainer.{early}"), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_an_allocation_file_that_is_no_mapping_is_refused(setup, tmp_path):
    (tmp_path / "list.json").write_text("[0.5, 0.5, 0.5]")
    found = setup(f"method.allocation={tmp_path / 'list.json'}")
    with pytest.raises(ValueError, match=r"must hold \{block or matrix: sparsity\}, got a list"):
        found.method.check(found)
