"""Leaving blocks out as a run: decided before it starts, kept for plain transformers, measured beside the dense one."""

from __future__ import annotations

import json

import pytest
import torch
from hydra.errors import InstantiationException
from transformers import AutoModelForCausalLM

from layerif.allocate.curves import Curves
from layerif.app.methods import drop
from layerif.compress import greedy as search
from layerif.data.text import text
from layerif.evaluate.perplexity import perplexity
from layerif.models.blocks import blocks
from layerif.record.record import RunRecord
from tests.app.methods.runs import pruned
from tests.command import layerif_here, run_layerif
from tests.tiny import tiny_model, tiny_tokenizer

DROP = [
    "method=drop",
    "method.calibration.num_windows=5",
    "method.calibration.window=40",
    "method.calibration.batch_size=2",
    "method.search_windows=3",
    "method.speed.prompt_tokens=16",
    "method.speed.new_tokens=3",
    "method.speed.repeats=1",
    "evaluation.window=40",
    "evaluation.num_windows=5",
    "evaluation.metrics=[options,perplexity]",
]
NAMES = [f"model.layers.{number}" for number in range(3)]


@pytest.fixture
def setup(setup_of):
    """Keeps two of three blocks, unless another allocator or number is named."""

    def make(*overrides: str):
        names_another = any(each.startswith(("allocator=", "allocator.keep=")) for each in overrides)
        return setup_of(*DROP, *([] if names_another else ["allocator.keep=2"]), *overrides)

    return make


def kept_of(record: RunRecord) -> dict[str, float]:
    given = record.decision.allocation
    return dict(zip(given.units, given.values, strict=True))


@pytest.mark.parametrize("estimator", ["datainf", "block_influence", "skip_curve", "angular"])
def test_evidence_becomes_a_smaller_model_that_plain_transformers_loads(setup, tmp_path, estimator):
    found = setup(f"estimator={estimator}", "allocator=blocks", "allocator.keep=2")
    record = pruned(found, tmp_path / "run")
    folder = tmp_path / "run"
    assert record.decision.allocation.kind == "blocks"
    assert sum(record.decision.allocation.values) == record.decision.allocation.budget == 2
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert len(blocks(reloaded)) == reloaded.config.num_hidden_layers == 2
    dense = dict(AutoModelForCausalLM.from_pretrained(found.model.path).named_parameters())
    stayed = [name for name, stays in kept_of(record).items() if stays]
    for number, name in enumerate(stayed):
        for part, weight in blocks(reloaded)[f"model.layers.{number}"].named_parameters():
            assert torch.equal(weight, dense[f"{name}.{part}"])
    ids = found.tokenizer(text("documentation", "test"))["input_ids"][: 5 * 40]
    assert perplexity(reloaded, ids, window=40, batch_size=16) == pytest.approx(record.metrics["perplexity_40"])
    assert record.parameters["total"] == sum(weight.numel() for weight in reloaded.parameters())
    assert record.parameters["dropped"] == sum(weight.numel() for weight in dense.values()) - record.parameters["total"]
    assert record.write(folder).exists()
    assert RunRecord.read(folder).decision.allocation == record.decision.allocation


def test_speed_memory_and_size_stand_beside_those_of_the_dense_model(setup, tmp_path):
    found = setup("estimator=uniform")
    record = pruned(found, tmp_path / "run")
    metrics = record.metrics
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert metrics[name] > 0
        assert metrics[f"before/{name}"] > 0
    for name in ("memory_bytes", "weight_bytes", "folder_bytes"):
        assert 0 < metrics[name] < metrics[f"before/{name}"]
    files = (tmp_path / "run" / "model" / name for name in ("config.json", "model.safetensors"))
    assert metrics["folder_bytes"] == sum(file.stat().st_size for file in files)
    dropped = metrics["before/weight_bytes"] - metrics["weight_bytes"]
    assert dropped == 4 * record.parameters["dropped"]
    per_token = 2 * 2 * 12 * 4  # keys and values of two heads of 12 numbers in float32
    assert metrics["before/memory_bytes"] - metrics["memory_bytes"] == dropped + (16 + 3) * per_token
    assert {"before/perplexity_40", "perplexity_40"} <= metrics.keys()
    bare = pruned(
        setup("estimator=uniform", "method.speed=null", "method.save=false", "method.dense=false"), tmp_path / "b"
    )
    assert not any("per_second" in name or "memory" in name for name in bare.metrics)
    assert not (tmp_path / "b" / "model").exists()
    assert "before/perplexity_40" not in bare.metrics


def test_the_prices_predict_the_rise_that_is_measured_on_the_same_windows(setup, tmp_path):
    record = pruned(setup("estimator=skip_curve", "method.save=false"), tmp_path / "run")
    curves = record.decision.curves or {}
    assert curves["kind"] == "blocks"
    gone = next(name for name, stays in kept_of(record).items() if not stays)
    found = setup("estimator=skip_curve")
    priced = found.decider()
    assert priced.reused
    assert isinstance(priced.curves, Curves)
    cost = priced.curves.costs[NAMES.index(gone), 0]
    assert curves["predicted"] == pytest.approx(float(cost))
    assert curves["actual"] != 0
    assert record.decision.reliability is not None


@pytest.mark.parametrize("unit", ["block", "sublayer"])
def test_greedy_takes_the_measured_best_and_a_killed_search_carries_on(setup, tmp_path, monkeypatch, unit):
    keep = {"block": 1, "sublayer": 3}[unit]
    overrides = ["method.search=greedy", f"allocator.keep={keep}", f"allocator.unit={unit}"]
    overrides += ["method.save=false", "method.speed=null", "evaluation.metrics=[perplexity]"]
    overrides += ["estimator=skip_curve"] if unit == "sublayer" else []
    whole = pruned(setup(*overrides), tmp_path / "whole")
    assert sum(whole.decision.allocation.values) == whole.decision.allocation.budget
    assert whole.decision.source.startswith(f"greedy(unit={unit}")
    assert any("after each unit that went" in note for note in whole.notes)
    real, tried = search.mean_token_loss, []

    def die(model, windows):
        if len(tried) == 5:
            raise KeyboardInterrupt
        tried.append(1)
        return real(model, windows)

    monkeypatch.setattr(search, "mean_token_loss", die)
    with pytest.raises(KeyboardInterrupt):
        pruned(setup(*overrides), tmp_path / "killed")
    monkeypatch.setattr(search, "mean_token_loss", lambda *given: (tried.append(1), real(*given))[1])
    resumed = pruned(setup(*overrides), tmp_path / "killed")
    steps = {"block": 1 + 3 + 2, "sublayer": 1 + 6 + 5 + 4}[unit]
    assert len(tried) == steps
    assert resumed.decision.allocation == whole.decision.allocation
    assert resumed.metrics == whole.metrics
    again = [note for note in resumed.notes if "greedy" in note]
    assert again == [note for note in whole.notes if "greedy" in note]


def test_parts_of_blocks_are_evaluated_in_memory(setup, tmp_path):
    overrides = ["estimator=skip_curve", "allocator.unit=sublayer", "allocator.keep=4", "method.save=false"]
    record = pruned(setup(*overrides), tmp_path / "run")
    assert record.decision.allocation.units == [f"{name}.{part}" for name in NAMES for part in ("self_attn", "mlp")]
    assert record.metrics["before/weight_bytes"] > record.metrics["weight_bytes"]
    record.write(tmp_path / "run")
    file = f"allocator.path={tmp_path / 'run' / 'record.json'}"
    again = pruned(setup("allocator=file", file, "allocator.kind=blocks", "method.save=false"), tmp_path / "b")
    assert again.metrics["perplexity_40"] == record.metrics["perplexity_40"]


def test_recovery_by_lora_starts_from_the_smaller_model_and_merges_to_what_was_trained(setup, tmp_path):
    recover = ["method.recover=lora", "method.adapter.learning_rate=0.05", "method.adapter.lora_dropout=0"]
    record = pruned(setup(*recover, "trainer.max_steps=4", "data.template=plain"), tmp_path / "run")
    assert record.recovery["experts"] == dict.fromkeys(NAMES[:2], 1)
    assert {"dropped/perplexity_40", "perplexity_40", "dropped/accuracy", "accuracy"} <= record.metrics.keys()
    assert record.metrics["perplexity_40"] != record.metrics["dropped/perplexity_40"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "recovered")
    assert len(blocks(merged)) == 2
    assert {"dropped", "trainable"} <= record.parameters.keys()


def test_prompts_are_continued_by_both_models(setup, tmp_path):
    pruned(setup("estimator=uniform", "method.prompts=[Which one?]"), tmp_path / "run")
    told = json.loads((tmp_path / "run" / drop.CONTINUED).read_text())
    assert told.keys() == {"dense", "smaller"}
    assert all(isinstance(texts["Which one?"], str) for texts in told.values())


def test_on_the_command_line_with_another_family(tiny_overrides, tmp_path):
    folder = tmp_path / "opt"
    tiny_model("opt").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    overrides = [*tiny_overrides, *DROP, "allocator.keep=2", "estimator=skip_curve", f"model.path={folder}"]
    dry = layerif_here([*overrides, "dry_run=true"], tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "2 of 3 units stay, 5 calibration windows of 40 tokens" in dry.stdout
    record = run_layerif(overrides, tmp_path)
    assert record.config["allocator"]["keep"] == 2
    assert {"evidence", "before/evaluate", "evaluate"} <= record.seconds.keys()
    shown = layerif_here([*overrides, "rerun=false", f"hydra.run.dir={tmp_path / 'run'}"], tmp_path)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["allocator.keep=0"],
            r"allocator\.keep=0 is not allowed; allowed: a finite number above 0; a whole number is",
        ),
        (["allocator.keep=3"], r"allocator\.keep=3 keeps all of 3 blocks; use a whole number from 1 to 2"),
        (["allocator.keep=4"], r"allocator\.keep=4 is more than the 3 blocks that there are"),
        (["allocator.keep=1.0"], r"allocator\.keep=1\.0 keeps all of 3 blocks; use a whole number"),
        (["allocator.keep=0.1"], r"allocator\.keep=0\.1 of 3 blocks keeps none"),
        (["allocator.keep=0.9"], r"allocator\.keep=0\.9 keeps all of 3 blocks"),
        (
            ["allocator.unit=sublayer"],
            r"allocator\.unit=sublayer cannot be spent: estimator=datainf scores blocks; use",
        ),
        (
            ["allocator.unit=sublayer", "estimator=skip_curve"],
            r"method\.save=true cannot write a model without .*; use method\.save=false, or allocator\.unit=block",
        ),
        (["allocator.unit=sublayer", "estimator=angular"], r"spans are made of blocks; use estimator=skip_curve"),
        (
            ["estimator=loss_curve", "allocator=blocks"],
            r"loss_curve prices sparsity, and method=drop spends blocks; use",
        ),
        (
            ["method.search=greedy", "allocator=position", "allocator.kind=blocks"],
            r"method\.search=greedy takes .*; use allocator=blocks",
        ),
        (["method.search=beam"], r"method\.search='beam' is not allowed; allowed: none, greedy"),
        (["method.recover=lora", "method.save=false"], r"use method\.save=true"),
        (["method.prompts=[Which one?,'']"], r"method\.prompts\.1 is empty, which nothing can continue; give a text"),
        (["method.recover=lora", "method.adapter=null"], r"needs method\.adapter"),
        (["method.recover=lora_moe"], r"method\.recover='lora_moe' is not allowed; allowed: none, lora"),
        (["method.speed.prompt_tokens=1000"], r"asks for 1000 \+ 3 tokens, and the model reads at most 512; lower"),
        (["method.speed.new_tokens=0"], r"method\.speed\.new_tokens=0 is not allowed"),
        (["model.adapter=/nowhere"], "the adapter '/nowhere' holds no adapter_config.json"),
        (["estimator=skip_curve", "method.calibration.num_windows=100000"], r"num_windows=100000 asks for more"),
        (["estimator=skip_curve", "estimator.order=third"], r"allowed: second, first, both"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(setup, overrides, message):
    def refused():
        found = setup(*overrides)
        found.method.check(found)

    with pytest.raises((ValueError, InstantiationException), match=message) as raised:
        refused()
    assert isinstance(raised.value, ValueError) or isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("values", "said"), [([1, 1, 1], "keeps all"), ([0, 0, 0], "keeps none"), ([2, 1, 0], "0 or 1")]
)
def test_an_allocation_from_a_file_must_leave_some_out(setup, tmp_path, values, said):
    file = tmp_path / "blocks.json"
    file.write_text(json.dumps(values))

    def refused():
        found = setup("allocator=file", f"allocator.path={file}", "allocator.kind=blocks")
        found.method.check(found)

    with pytest.raises(ValueError, match=said):
        refused()


def test_a_file_of_blocks_is_spent(setup, tmp_path):
    file = tmp_path / "blocks.json"
    file.write_text(json.dumps({NAMES[0]: 1, NAMES[1]: 0, NAMES[2]: 1}))
    found = setup("allocator=file", f"allocator.path={file}", "allocator.kind=blocks")
    record = pruned(found, tmp_path / "run")
    assert record.decision.allocation.values == [1, 0, 1]


def test_a_model_of_one_block_is_refused(setup, tmp_path):
    folder = tmp_path / "one"
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"a model with 1 block has none to spare; leaving some out needs a model of at least"
    ):
        setup(f"model.path={folder}")
