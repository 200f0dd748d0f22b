"""Adapters as plain LoRA of one rank, merging, and what fits the outcome of a run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from layerif.adapt.adapters import plain_lora
from layerif.compress.export import merged, of_one_rank, one_scaling, write_plain_adapter
from layerif.compress.outcome import EXPORTS, Outcome, check_form, outcome_of, refusals
from layerif.moe import LoraMoeConfig
from layerif.record.record import RunRecord
from tests.tiny import tiny_model

RANKS = {"model.layers.0": 1, "model.layers.1": 0, "model.layers.2": 7}
IDS = torch.arange(40)[None]


def adapted(config: Any, **changes: Any) -> Any:
    """A tiny model under an adapter with random weights."""
    model = get_peft_model(tiny_model(**changes), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn_like(weight))
    return model.eval()


def of_ranks(scaling: float = 2.0) -> Any:
    return plain_lora(tiny_model(), RANKS, scaling=scaling, lora_dropout=0.05, target_modules=None)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


# Adapters


@pytest.mark.parametrize("scaling", [2.0, 0.3])
def test_engines_of_every_rule_scale_an_adapter_of_several_ranks_as_peft_does(tmp_path, scaling):
    """vLLM and SGLang multiply by the global α/r, and llama.cpp by α divided by the tensor's own rank."""
    model = adapted(of_ranks(scaling))
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "plain").mkdir()
    write_plain_adapter(tmp_path / "run", tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(scaling)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    weights = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    expected = deltas(model)
    assert len(weights) == 2 * len(expected) == 28
    for name, delta in expected.items():
        down, up = (weights[f"{name}.lora_{part}.weight"] for part in "AB")
        assert down.shape[0] == up.shape[1] == config["r"] == 7
        for scale in (config["lora_alpha"] / config["r"], config["lora_alpha"] / down.shape[0]):
            torch.testing.assert_close(scale * up @ down, delta, rtol=1e-5, atol=1e-6)


def test_the_adapter_of_a_run_has_the_same_global_scaling_where_an_engine_pads_the_ranks(tmp_path):
    model = adapted(of_ranks())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = of_one_rank(load_file(tmp_path / "adapter_model.safetensors"))
    for name, delta in deltas(model).items():
        down, up = (weights[f"{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(config["lora_alpha"] / config["r"] * up @ down, delta, rtol=1e-5, atol=1e-6)


def test_plain_peft_reads_what_was_written(tmp_path):
    model = adapted(of_ranks())
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "plain").mkdir()
    write_plain_adapter(tmp_path / "run", tmp_path / "plain")
    again = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "plain"))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(again), logits(tiny_model()), atol=1e-2)


def test_experts_that_are_alone_are_plain_lora(tmp_path):
    model = adapted(LoraMoeConfig(num_experts=1, r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "plain").mkdir()
    config = write_plain_adapter(tmp_path / "run", tmp_path / "plain")
    assert (config.peft_type, config.r, config.lora_alpha) == ("LORA", 4, 6)
    again = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "plain"))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_several_scalings_is_refused():
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"^the adapter has α/r=4 for 'q_proj' and 2 elsewhere, .* use --to merged$"):
        one_scaling(config)


def test_merging_changes_no_logits():
    model = adapted(of_ranks())
    expected = logits(model)
    torch.testing.assert_close(logits(merged(model)), expected, rtol=1e-5, atol=1e-5)
    bare = tiny_model()
    assert merged(bare) is bare


def test_a_head_that_shares_its_weight_is_not_merged():
    config = LoraConfig(target_modules=["lm_head", "q_proj"])
    model = adapted(config, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head, which shares its weight with the embedding, .* use --to peft$"):
        merged(model)
    untied = adapted(config)
    expected = logits(untied)
    torch.testing.assert_close(logits(merged(untied)), expected, rtol=1e-5, atol=1e-5)


# What fits


def record_of(method: str, **fields: Any) -> RunRecord:
    return RunRecord(name="test", seed=0, config={}, overrides=[], choices={"method": method}, **fields)


@pytest.fixture
def folder(tmp_path):
    """A folder with all that runs can leave."""
    for name in ("model", "recovered"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return tmp_path


@pytest.mark.parametrize(
    ("method", "fields", "left", "fitting"),
    [
        ("lora", {}, "an adapter", ["merged", "peft", "gguf"]),
        ("full", {}, "model/", ["merged", "gguf"]),
        ("drop", {}, "model/", ["merged", "gguf"]),
        ("prune", {"recovery": {"method": "lora"}}, "recovered/", ["merged", "gguf"]),
        ("prune", {"recovery": {"method": "lora_moe"}}, "an adapter on model/", ["merged", "gguf"]),
        (
            "quantise",
            {"formats": {"a": "Q8_0"}},
            "number formats for its matrices",
            ["gguf", "gguf-types", "compressor"],
        ),
    ],
)
def test_forms_fit_what_the_method_left_and_not_what_another_run_left_there(folder, method, fields, left, fitting):
    outcome = outcome_of(record_of(method, **fields), folder)
    assert outcome.left == left
    found = refusals(outcome)
    assert [form for form in EXPORTS if form not in found] == fitting
    for form in EXPORTS:
        if form in fitting:
            check_form(form, outcome, found)
            continue
        with pytest.raises(ValueError, match=rf"^--to {form} does not fit this run of method={method}.* use --to "):
            check_form(form, outcome, found)


def test_a_run_that_left_nothing_says_which_ones_do(tmp_path):
    outcome = outcome_of(record_of("none"), tmp_path)
    with pytest.raises(
        ValueError, match=r"which left nothing to hand over: .*; give a run of method=lora, full, prune"
    ):
        check_form("merged", outcome, refusals(outcome))


@pytest.mark.parametrize("experts", [3, {"model.layers.0": 1, "model.layers.1": 2}])
def test_routers_fit_nothing(experts):
    settings = {"peft_type": "LORA_MOE", "num_experts": experts}
    outcome = Outcome(method="lora_moe", adapter=None, settings=settings)
    assert set(refusals(outcome)) == set(EXPORTS)
    for form in EXPORTS:
        with pytest.raises(ValueError, match=r"none of vLLM, SGLang and llama\.cpp serves that; from Python, import"):
            check_form(form, outcome, refusals(outcome))


def test_an_adapter_that_keeps_zeros_is_not_plain_lora(folder):
    settings = {"peft_type": "LORA_MOE", "num_experts": 1, "keep_zeros": True}
    found = refusals(Outcome(method="lora_moe", adapter=folder / "adapter", settings=settings))
    assert found["peft"].startswith("its adapter leaves the zeros")
    assert "merged" not in found
