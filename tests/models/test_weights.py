"""A folder is loaded as it is or refused: no random weights, no lost blocks, no file that the hash does not see."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from layerif.app.messages import of_the_user
from layerif.models.pretrained import LocalModel
from layerif.models.weights import hash_folder, refuse_incomplete
from tests.tiny import tiny_model, tiny_tokenizer

NOTHING: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


@pytest.fixture
def folder(tmp_path, model_folder) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def configure(folder: Path, **settings: Any) -> LocalModel:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return LocalModel(path=str(folder))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def refused(model: LocalModel, message: str, *, by: str = "load") -> None:
    with pytest.raises(ValueError, match=message) as raised:
        getattr(model, by)()
    assert of_the_user(raised.value) is raised.value
    assert "\n" not in str(raised.value)


def shard(folder: Path, inside: str) -> Path:
    """Moves the weights into two files of a sub-folder, which an index names."""
    found = tensors(folder)
    (folder / "model.safetensors").unlink()
    (folder / inside).mkdir(parents=True, exist_ok=True)
    names = {name: f"{inside}/{number % 2}.safetensors" for number, name in enumerate(sorted(found))}
    for file in set(names.values()):
        part = {name: tensor for name, tensor in found.items() if names[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def test_a_weight_that_is_not_there_is_no_random_one(folder):
    found = tensors(folder)
    del found["model.layers.1.mlp.up_proj.weight"]
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    refused(LocalModel(path=str(folder)), r"model\.layers\.1\.mlp\.up_proj\.weight is not among .* \(1 of 30 are miss")


def test_the_blocks_of_a_model_are_those_of_its_weights(folder):
    refused(configure(folder, num_hidden_layers=5), r"model\.layers\.3\.self_attn\.q_proj\.weight is not among")
    refused(configure(folder, num_hidden_layers=2), r"have the block model\.layers\.2, and config\.json says 2 blocks")


def test_a_weight_of_another_shape_is_named(folder):
    refused(
        configure(folder, intermediate_size=48),
        r"model\.layers\.0\.mlp\.down_proj\.weight is \(32, 56\) in the weights and \(32, 48\) by config",
    )


def test_a_classifier_has_no_head_for_the_next_token(folder):
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    classifier.save_pretrained(folder)
    refused(LocalModel(path=str(folder)), "it is a LlamaForSequenceClassification, which has no head", by="check")
    refused(configure(folder, architectures=None), r"lm_head\.weight is not among its weights")


def test_a_tied_head_and_a_computed_buffer_are_not_missed(tmp_path):
    tied = tmp_path / "tied"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tied)
    assert "lm_head.weight" not in tensors(tied)
    assert LocalModel(path=str(tied)).load().get_output_embeddings() is not None
    model = tiny_model("llama")
    model.register_buffer("computed", torch.zeros(2, 2))
    refuse_incomplete("it", model, {**NOTHING, "missing_keys": {"computed"}})


def test_weights_beside_the_blocks_are_left_alone_and_blocks_are_found_without_the_heads_prefix():
    model = tiny_model("llama")
    further = {"vision.layers.7.weight", "score.weight", "model.layers.2.self_attn.rotary"}
    refuse_incomplete("it", model, {**NOTHING, "unexpected_keys": further})
    with pytest.raises(ValueError, match=r"the block model\.layers\.3, and config\.json says 3"):
        refuse_incomplete("it", model, {**NOTHING, "unexpected_keys": {"layers.4.weight", "layers.3.weight"}})
    model.config.num_nextn_predict_layers = 1  # as in DeepSeek: one more, that no loss runs
    refuse_incomplete("it", model, {**NOTHING, "unexpected_keys": {"model.layers.3.weight"}})


def test_the_hash_sees_every_file_that_an_index_names(folder):
    whole = LocalModel(path=str(folder)).load().state_dict()
    index = shard(folder, "deep/parts")
    again = LocalModel(path=str(folder)).load().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    before = hash_folder(folder)
    part = folder / "deep" / "parts" / "1.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(part).items()}
    save_file(changed, part, {"format": "pt"})
    after = hash_folder(folder)
    assert after != before
    index.write_text(index.read_text() + "\n")
    assert hash_folder(folder) != after


def test_the_hash_of_a_folder_without_an_index_is_that_of_earlier_versions(folder):
    files = [folder / name for name in ("config.json", "model.safetensors")]
    known = "".join(f"{file.name}:{hashlib.sha256(file.read_bytes()).hexdigest()};" for file in files)
    assert hash_folder(folder) == hashlib.sha256(known.encode()).hexdigest()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "left_out.bin"}}')
    LocalModel(path=str(folder)).load()  # an index that nobody reads may name files that were not copied


@pytest.mark.parametrize("outside", ["../model.safetensors", "/tmp/model.safetensors", "a/../../model.safetensors"])
def test_a_file_outside_the_folder_is_not_followed(folder, outside):
    index = shard(folder, "parts")
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = outside
    index.write_text(json.dumps(content))
    for by in ("load", "weights_hash"):
        refused(LocalModel(path=str(folder)), "names .*, which lies outside the folder", by=by)
    index.unlink()
    refused(configure(folder, transformers_weights=outside), "which lies outside the folder", by="weights_hash")


def test_an_index_without_names_is_refused(folder):
    shard(folder, "parts").write_text("[]")
    refused(LocalModel(path=str(folder)), "must hold the name of a file for each tensor", by="weights_hash")


def test_an_adapter_beside_the_model_is_not_put_on_it_in_silence(folder):
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)  # type: ignore[arg-type]
    refused(LocalModel(path=str(folder)), "there is an adapter beside the model .*; move the adapter")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 4}, r"layers\.3\..* is \(8, 32\) there and missing here"),
        ({"num_hidden_layers": 2}, r"layers\.2\..* is missing there and \(8, 32\) here"),
        ({"hidden_size": 64}, r"is \(8, 64\) there and \(8, 32\) here"),
    ],
)
def test_the_adapter_of_another_model_is_refused_by_check_and_load(tmp_path, model_folder, settings, message):
    other = get_peft_model(tiny_model("llama", **settings), LoraConfig(target_modules=["q_proj"]))  # type: ignore[arg-type]
    other.save_pretrained(tmp_path)
    model = LocalModel(path=str(model_folder), adapter=str(tmp_path))
    for by in ("check", "load"):
        refused(model, f"the adapter '{tmp_path}' is of another model: .*{message}", by=by)


def test_an_adapter_that_is_not_there_or_damaged_is_refused_in_a_sentence(tmp_path, model_folder):
    model = LocalModel(path=str(model_folder), adapter=str(tmp_path))
    refused(model, "holds no adapter_config.json", by="check")
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)  # type: ignore[arg-type]
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    refused(model, r"cannot be read \(SafetensorError: .*is it complete", by="check")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq 4 bits"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_a_quantised_model_that_no_library_here_loads_is_refused_by_name(folder, settings, name):
    model = configure(folder, quantization_config=settings)
    for by in ("check", "load", "skeleton"):
        refused(model, rf"it is quantised \({name}\)", by=by)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 0}, r"num_attention_heads=0 is not allowed; allowed: at least 1"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads=0 is not allowed"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 is not allowed"),
        ({"num_attention_heads": 5}, r"hidden size \(32\) is not a multiple of the number of attention heads \(5\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": "wide"}, r"'hidden_size' expected int, got str"),
        ({"hidden_act": "nosuch"}, r"config\.json and files make no model \(KeyError: 'nosuch'\)"),
        ({"quantization_config": "int8"}, r"make no model \(AttributeError: "),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_in_a_sentence(folder, settings, message):
    for by in ("check", "load"):
        refused(configure(folder, **settings), message, by=by)


def test_a_configuration_that_is_a_list_is_refused_in_a_sentence(folder):
    (folder / "config.json").write_text("[1, 2]")
    for by in ("check", "load"):
        refused(LocalModel(path=str(folder)), "must hold an object, got a list", by=by)
    with pytest.raises(ValueError, match="cannot load"):
        LocalModel(path=str(folder)).tokenizer()


def test_an_unknown_attention_is_refused_without_weights(model_folder):
    refused(
        LocalModel(path=str(model_folder), attention="spda"),
        r"model\.attention='spda' is not allowed; allowed: eager, .* \(did you mean 'sdpa'",
        by="check",
    )


def test_an_attention_of_the_hub_is_refused_without_the_package_that_loads_it(model_folder, monkeypatch):
    monkeypatch.setattr("layerif.models.pretrained.find_spec", lambda name: None)
    model = LocalModel(path=str(model_folder), attention="kernels-community/flash-attn")
    refused(model, r"model\.attention='kernels-community/flash-attn' is not allowed; allowed: eager, ", by="check")
    monkeypatch.setattr("layerif.models.pretrained.find_spec", lambda name: name == "kernels")
    model.check()


def test_the_vocabulary_holds_the_ids_of_the_tokenizer(tmp_path):
    tiny_model("llama", vocab_size=200).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = LocalModel(path=str(tmp_path))
    refused(model, r"its ids reach 255, and the model has embeddings for the ids below 200", by="check")
    tiny_model("llama").save_pretrained(tmp_path)
    model.check()
    tokenizer.add_tokens(["<image>"], special_tokens=True)  # nobody says it, as in Gemma 3
    tokenizer.save_pretrained(tmp_path)
    model.check()
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(tmp_path)
    refused(model, "the pad token is 256, and the model has embeddings for the ids below 256", by="check")
