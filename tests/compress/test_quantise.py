"""A quantised model, its GGUF file as transformers reads it, and the texts by which other quantisers do the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from layerif.compress.gguf import gguf_names, why_no_gguf, write_gguf
from layerif.compress.quantise import (
    bits_of,
    config_groups,
    embeddings_of,
    formats_of_matrices,
    quantise,
    tensor_types,
)
from layerif.evaluate.perplexity import perplexity
from layerif.formats import FORMATS, Format, formats_called
from layerif.models.blocks import layer_map
from tests.tiny import tiny_model, tiny_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
GGUF = formats_called("gguf")


def every_format(model: Any) -> dict[str, Format]:
    """Gives the matrices all formats of GGUF in turn."""
    params = layer_map(model, scope="all").matrices
    return {param: GGUF[index % len(GGUF)] for index, param in enumerate(params)}


def reread(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    settings: Any = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)


# In memory


def test_every_weight_that_was_chosen_is_rounded_and_no_other():
    model, before = tiny_model(**SIZES), tiny_model(**SIZES)
    chosen = dict(list(every_format(model).items())[:9])
    found = quantise(model, chosen)
    for name, weight in before.named_parameters():
        after = model.get_parameter(name)
        if name not in chosen:
            assert torch.equal(after, weight)
            continue
        assert torch.equal(after, chosen[name](weight))
        assert found[name].numel == weight.numel()
        assert found[name].error == pytest.approx(float(((after - weight).norm() / weight.norm()).detach()), rel=1e-4)
    numel = {name: each.numel for name, each in found.items()}
    stored = sum(
        8 * gguf.quantize(before.get_parameter(name).detach().numpy(), quant_type(each)).nbytes
        for name, each in chosen.items()
    )
    assert bits_of(chosen, numel) == pytest.approx(stored / sum(numel.values()))


def quant_type(each: Format) -> Any:
    return gguf.GGMLQuantizationType[each.name]


def test_bits_of_blocks_and_of_matrices_become_formats():
    layers = layer_map(tiny_model(**SIZES), scope="all")
    by_block = formats_of_matrices(layers, {"model.layers.0": 4.5, "model.layers.1": 8.5, "model.layers.2": 6.0}, GGUF)
    assert [each.name for each in by_block.values()] == ["Q4_0"] * 7 + ["Q8_0"] * 7 + ["Q5_1"] * 7
    names = [param.removesuffix(".weight") for param in layers.matrices]
    by_matrix = formats_of_matrices(layers, dict.fromkeys(names, 5.0), GGUF)
    assert {each.name for each in by_matrix.values()} == {"Q4_1"}
    with pytest.raises(
        ValueError, match=r"gives model\.layers\.0 4\.6 bits, and no format takes them; allowed: MXFP4 \(4"
    ):
        formats_of_matrices(layers, {f"model.layers.{index}": 4.6 for index in range(3)}, GGUF)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_is_one_weight(tied):
    found = embeddings_of(tiny_model(tie_word_embeddings=tied, **SIZES))
    assert list(found) == ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]


# GGUF


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", [None, "Q8_0"])
def test_transformers_reads_the_file_as_the_model_in_memory(tmp_path, tied, embeddings):
    model = tiny_model(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e4}, **SIZES)
    chosen = every_format(model)
    if embeddings:
        chosen |= dict.fromkeys(embeddings_of(model), FORMATS[embeddings])
    assert why_no_gguf(model.config, list(chosen.values())) is None
    assert write_gguf(model, tiny_tokenizer(), chosen, tmp_path / "model.gguf", name="tiny") is None
    quantise(model, chosen)
    again = reread(tmp_path)
    mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    ids = torch.arange(200)
    with torch.no_grad():
        logits, others = (each(input_ids=ids[None, :60]).logits for each in (model, again))
    torch.testing.assert_close(logits, others, rtol=1e-5, atol=1e-5)  # the file has the norms' epsilon in float32
    scored = [perplexity(each, ids.tolist(), window=40, batch_size=2) for each in (model, again)]
    assert scored[0] == pytest.approx(scored[1], rel=1e-6)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    names = gguf_names(model.config, list(mine))
    assert all(types[names[param]] == each.name for param, each in chosen.items())
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == (embeddings or "F32")
    assert ("output.weight" in types) != tied


def test_weights_that_are_not_quantised_keep_the_precision_of_the_model(tmp_path):
    model = tiny_model(**SIZES).bfloat16()
    chosen = every_format(model)
    write_gguf(model, tiny_tokenizer(), chosen, tmp_path / "model.gguf", name="tiny")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["token_embd.weight"] == "BF16"
    quantise(model, chosen)
    again = dict(reread(tmp_path, torch.bfloat16).named_parameters())
    assert all(torch.equal(again[name], weight) for name, weight in model.named_parameters())


@pytest.mark.parametrize("bos", [True, False])
def test_the_file_carries_its_tokenizer(tmp_path, bos):
    model, tokenizer = tiny_model(vocab_size=260, **SIZES), tiny_tokenizer(bos=bos)
    write_gguf(model, tokenizer, every_format(model), tmp_path / "model.gguf", name="tiny")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for said in ("Hello the cat 123 sat\n on", "Answer: B.</s>", ""):
        assert (
            again(said, add_special_tokens=False)["input_ids"] == tokenizer(said, add_special_tokens=False)["input_ids"]
        )
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (0, 1, 1)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is bos
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 260
    assert tokens[-1] == "[PAD259]"


def test_another_tokenizer_is_left_out_with_a_reason_and_the_weights_are_read_all_the_same(tmp_path):
    model, tokenizer = tiny_model(**SIZES), tiny_tokenizer()
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    why = write_gguf(model, tokenizer, every_format(model), tmp_path / "model.gguf", name="tiny")
    assert why is not None
    assert why.startswith("only tokenizers of byte-level pairs")
    quantise(model, every_format(model))
    assert torch.equal(reread(tmp_path).lm_head.weight, model.get_parameter("lm_head.weight"))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen3", {}, "models of the kind qwen3 are not written as GGUF, only those of the kind llama"),
        ("llama", {"attention_bias": True}, "a model with attention_bias is not written as GGUF"),
        ("llama", {"hidden_act": "gelu"}, "a model with the activation gelu is not written"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embeddings of the type linear are not written",
        ),
    ],
)
def test_models_that_cannot_be_written_have_a_reason(family, changes, said):
    assert str(why_no_gguf(tiny_model(family, **SIZES, **changes).config, GGUF)).startswith(said)


def test_formats_that_the_package_does_not_write_have_a_reason():
    config = tiny_model(**SIZES).config
    assert why_no_gguf(config, formats_called(["INT3", "Q8_0", "INT2"])) == "the package gguf does not write INT2, INT3"


def test_a_weight_that_a_llama_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match=r"has no place for the weight model\.layers\.0\.extra\.weight; use method\.save"
    ):
        gguf_names(tiny_model(**SIZES).config, ["model.layers.0.extra.weight"])


# Texts


def test_tensor_types_mean_one_tensor_each():
    model = tiny_model(num_hidden_layers=12, **SIZES)
    chosen, names = every_format(model), gguf_names(model.config, [name for name, _ in model.named_parameters()])
    lines = tensor_types(chosen, names).splitlines()
    assert len(lines) == len(chosen)
    for line, (param, each) in zip(lines, chosen.items(), strict=True):
        pattern, _, kind = line.partition("=")
        assert [name for name in names.values() if re.search(pattern, name)] == [names[param]]
        assert kind == each.name.lower()


KEYS = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "scale_dtype", "zp_dtype"}


def test_config_groups_have_the_fields_of_compressed_tensors_and_name_every_layer_once():
    """The names and values are those of QuantizationConfig, QuantizationScheme and QuantizationArgs there (0.20)."""
    model = tiny_model(**SIZES)
    params = layer_map(model, scope="all").matrices
    formats = formats_called("all")
    chosen = {param: formats[index % len(formats)] for index, param in enumerate(params)}
    found = json.loads(json.dumps(config_groups(chosen)))
    assert found.keys() == {"quant_method", "format", "quantization_status", "config_groups", "ignore"}
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "mixed-precision")
    targets = []
    for number, (name, group) in enumerate(found["config_groups"].items()):
        assert name == f"group_{number}"
        assert group.keys() == {"targets", "weights", "input_activations", "output_activations", "format"}
        assert group["format"] in ("pack-quantized", "mxfp4-pack-quantized")
        weights = group["weights"]
        assert weights.keys() <= KEYS
        (each,) = {chosen[f"{target}.weight"] for target in group["targets"]}
        assert (weights["strategy"], weights["group_size"], weights["dynamic"]) == ("group", each.block, False)
        assert (weights["num_bits"], weights["symmetric"]) == (each.whole, each.is_symmetric)
        assert weights["type"] == ("float" if each.name == "MXFP4" else "int")
        targets += group["targets"]
    assert sorted(f"{target}.weight" for target in targets) == sorted(params)
    assert config_groups({params[0]: FORMATS["Q8_0"]})["format"] == "pack-quantized"
