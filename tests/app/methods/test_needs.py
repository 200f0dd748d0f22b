"""A plan for a configuration alone counts what the model then does, and allocates no weight."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from layerif.app.methods._needs import Amounts, Dimensions, dimensions_of, needs
from layerif.models.configuration import Configuration
from layerif.probe import speed
from tests.command import layerif_here
from tests.families import each_family, model_of
from tests.tiny import tiny_model

LENGTH = 24
LONG = 256  # attention is then half of what these small models do
WORK = Amounts(
    num_train=100,
    num_val=20,
    longest=128,
    sample_tokens=120 * 128,
    batch_size=8,
    fit_tokens=100 * 256,
    fit_length=256,
    fit_batch=4,
    epochs=1,
)
SEVEN = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
EXPERTS = {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48}


def outline(family: str, **sizes: int) -> Dimensions:
    config = AutoConfig.for_model(family, num_key_value_heads=8, vocab_size=32000, **sizes)
    with torch.device("meta"):
        return dimensions_of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), "attention")


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "mixtral"])
def test_operations_are_those_that_torch_counts(family):
    model = tiny_model(family, vocab_size=256, word_embed_proj_dim=32) if family == "opt" else tiny_model(family)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # torch counts no grouped products
    ids = torch.arange(LENGTH)[None] + 5
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids)
    shape = dimensions_of(model, "all")
    # Rotary embeddings are a product, too: positions by frequencies, once for the model.
    assert LENGTH * shape.forward(LENGTH) == pytest.approx(forward.get_total_flops(), rel=2e-2)
    with FlopCounterMode(display=False) as both:
        model(input_ids=ids).logits.sum().backward()
    trained = LENGTH * (shape.forward(LENGTH) + shape.backward(LENGTH) + 2 * (shape.active + shape.head))
    assert trained == pytest.approx(both.get_total_flops(), rel=2e-2)


@pytest.mark.parametrize("family", each_family())
def test_operations_of_every_family_are_those_that_torch_counts(family):
    model = model_of(family)
    ids = torch.arange(LONG)[None] % 50 + 5
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=ids)
    # The products of Qwen3-Next's linear attention with its state are left out: much in narrow heads alone.
    tolerance = 0.13 if family == "qwen3_next" else 1e-2
    found = LONG * dimensions_of(model, "all").forward(LONG)
    assert found == pytest.approx(counted.get_total_flops(), rel=tolerance)


def test_more_memory_takes_fewer_devices_and_what_takes_one_says_that_it_is_too_small():
    large = outline("llama", **SEVENTY)
    by_memory = [{need.method: need for need in needs(large, WORK, memory, 100.0)} for memory in (40, 80, 1e5)]
    assert set(by_memory[0]) == {"scores", "curves", "lora", "lora_moe", "full", "prune", "drop", "quantise"}
    for method in ("scores", "curves", "lora", "lora_moe"):
        devices = [found[method].devices or 0 for found in by_memory]
        assert 0 not in devices
        assert devices == sorted(devices, reverse=True)
        assert devices[0] > 2  # 141 GB of weights
        assert devices[-1] == 1
    for method in ("full", "prune", "drop", "quantise"):
        assert [found[method].devices for found in by_memory] == [None, None, 1]
    for found, memory in zip(by_memory, (40, 80, 1e5), strict=True):
        for need in found.values():
            assert need.devices is None or need.device_gb <= memory
            assert need.seconds == pytest.approx(need.operations / (need.devices or 1) / 1e14)
    # A gradient pass is less than full training, which also multiplies for the weights.
    assert by_memory[-1]["lora"].operations < by_memory[-1]["full"].operations


def test_a_mixture_counts_the_experts_that_a_token_takes():
    mixture = outline("mixtral", **EXPERTS, num_local_experts=8, num_experts_per_tok=2)
    wider = outline("mixtral", **EXPERTS, num_local_experts=16, num_experts_per_tok=2)
    assert mixture.experts == (2, 8)
    assert mixture.numel == pytest.approx(141e9, rel=0.01)
    assert wider.active == pytest.approx(mixture.active, rel=1e-3)  # the router alone is wider
    assert wider.numel > 1.9 * mixture.numel


@pytest.mark.parametrize(("scheme", "bits"), [("nf4", 4.5), ("int8", 8), ("gptq 3 bits", 3), ("of my own", 16)])
def test_quantised_weights_have_their_own_bytes_and_the_methods_that_refuse_them_are_left_out(scheme, bits):
    config = AutoConfig.for_model("llama", num_key_value_heads=8, vocab_size=32000, **SEVENTY)
    with torch.device("meta"):
        shape = dimensions_of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), "attention", scheme)
    dense = shape.numel - sum(shape.layers.numel)
    assert shape.num_bytes == pytest.approx(2 * dense + sum(shape.layers.numel) * bits / 8)
    assert [need.method for need in needs(shape, WORK, 80, 1.0)] == ["scores", "lora", "lora_moe"]
    lora = next(need for need in needs(shape, WORK, 80, 1.0) if need.method == "lora")
    assert lora.devices == (None if bits == 16 else 1)


def test_experts_in_one_tensor_stay_dense_under_bitsandbytes():
    plain = outline("mixtral", **EXPERTS, num_local_experts=8, num_experts_per_tok=2)
    config = AutoConfig.for_model("mixtral", num_key_value_heads=8, vocab_size=32000, num_local_experts=8, **EXPERTS)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert dimensions_of(model, "all", "nf4").num_bytes > 0.95 * plain.num_bytes
    assert dimensions_of(model, "all", "awq 4 bits").num_bytes < 0.3 * plain.num_bytes


def test_checkpointing_is_named_where_only_it_makes_room():
    large = replace(WORK, fit_batch=64, fit_length=2048)
    (lora,) = (need for need in needs(outline("llama", **SEVENTY), large, 140, 1.0) if need.method == "lora")
    assert "method.gradient_checkpointing=true" in lora.about


def test_a_configuration_alone_is_planned_and_nothing_else(tiny_overrides, tmp_path, monkeypatch):
    folder = tmp_path / "seven"
    folder.mkdir()
    content = {"model_type": "mistral", "num_key_value_heads": 8, "vocab_size": 32000, **SEVEN}
    (folder / "config.json").write_text(json.dumps(content))
    given = [*tiny_overrides[2:], "model=configuration", f"model.path={folder}"]
    monkeypatch.setattr(speed, "_random_model", None)  # random weights of this width would be gigabytes
    done = layerif_here([*given, "method=plan", "method.device_gb=80", f"hydra.run.dir={tmp_path / 'plan'}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7,241,732,096 parameters: 14.5 GB of weights; devices of 80 GB" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "plan" / "needs.json").read_text())
    assert [need["devices"] for need in found["needs"]] == [1, 1, 1, 1, None, 1, 1, 1]
    assert found["teraflops"] > 0
    assert (tmp_path / "plan" / "record.json").is_file()
    again = layerif_here([*given, "method=plan", "method.teraflops=1", "dry_run=true"], tmp_path)
    assert "the configuration makes a model" in again.stdout
    refused = layerif_here([*given, "method=none"], tmp_path)
    assert refused.returncode == 1
    assert "model=configuration has no weights and no tokenizer, so only method=plan can use it" in refused.stderr
    pytest.importorskip("bitsandbytes", reason="the extra `quantised` brings bitsandbytes")
    small = layerif_here([*given, "model.quantised=nf4", "method=plan", "method.teraflops=1"], tmp_path)
    said = " ".join(small.stdout.split())
    assert "7,241,732,096 parameters: 4.45 GB of weights (nf4)" in said, small.stderr
    assert "curves, full, prune, drop, quantise are left out" in said


def test_a_configuration_has_one_place():
    with pytest.raises(ValueError, match=r"needs one of model.path=/folder .* and model.name=org/name; got neither"):
        Configuration()
    with pytest.raises(ValueError, match="got both"):
        Configuration(path="/a", name="org/b")
