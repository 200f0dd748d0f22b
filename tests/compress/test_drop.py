"""A model without some blocks is an ordinary one of its family, and one that is put back is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerif.compress.drop import check_droppable, check_ordinary, drop, without
from layerif.layers import sublayers
from layerif.models.blocks import blocks, layer_map
from layerif.models.loss import per_sample_loss
from tests.tiny import FAMILIES, FURTHER, tiny_model

FEW = ("llama", "gemma2", "gemma3_text", "qwen3", "opt")
IDS = torch.arange(3, 51).reshape(2, 24) * 5 % 251 + 3  # longer than the sliding windows
GENERATION: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}


def model_of(family: str, **settings: Any) -> Any:
    return tiny_model(family, **{"num_hidden_layers": 6, **settings})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def plainly(model: Any, stays: list[str]) -> torch.Tensor:
    """The logits with every other block skipped by a hook, which changes nothing in the model."""

    def skip(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    gone = [block for name, block in blocks(model).items() if name not in stays]
    handles = [block.register_forward_hook(skip, with_kwargs=True) for block in gone]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FEW)
def test_what_stays_is_saved_and_loaded_and_generates_with_a_cache_as_without(family, tied, tmp_path):
    model = model_of(family, tie_word_embeddings=tied)
    names = list(blocks(model))
    gone = [names[0], names[3], names[5]]
    kinds = getattr(model.config, "layer_types", None)
    expected = plainly(model, [name for name in names if name not in gone])
    check_droppable(model, gone)
    drop(model, gone)
    check_ordinary(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == 3
    if kinds is not None:
        assert loaded.config.layer_types == [kinds[index] for index in (1, 2, 4)]
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    for each in (model, loaded):
        with_cache, without_cache = (each.generate(IDS, use_cache=cached, **GENERATION) for cached in (True, False))
        assert torch.equal(with_cache, without_cache)


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])
def test_a_model_is_as_it_was_after_units_were_left_out(family):
    model = model_of(family)
    names, before, config = list(blocks(model)), logits(model), model.config.to_dict()
    with without(model, names[1:4]):
        assert len(blocks(model)) == 3
        torch.testing.assert_close(logits(model), plainly(model, list(blocks(model))), rtol=0, atol=0)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    with pytest.raises(RuntimeError, match="stopped"), without(model, [names[0]]):
        raise RuntimeError("stopped")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3", "gpt_neox"])
def test_a_part_of_a_block_adds_nothing_once_it_is_left_out(family):
    model = model_of(family)
    units = list(sublayers(layer_map(model, scope="all")))
    gone = [units[0], units[3], units[4]]  # an attention, an MLP, and the next block's attention
    with torch.no_grad():
        last = {"self_attn": "o_proj", "mlp": "down_proj", "attention": "dense"}
        if family == "gpt_neox":
            last["mlp"] = "dense_4h_to_h"
        zeroed = model_of(family)
        for unit in gone:
            linear = zeroed.get_submodule(f"{unit}.{last[unit.rpartition('.')[2]]}")
            for parameter in linear.parameters():
                parameter.zero_()
    expected = logits(zeroed)
    with without(model, gone):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        with_cache, without_cache = (model.generate(IDS, use_cache=cached, **GENERATION) for cached in (True, False))
        assert torch.equal(with_cache, without_cache)
    torch.testing.assert_close(logits(model), logits(model_of(family)), rtol=0, atol=0)


def test_a_block_and_parts_of_another_may_go_together():
    model = model_of("llama")
    drop(model, ["model.layers.0", "model.layers.2.mlp"])
    assert len(blocks(model)) == 5
    loss = per_sample_loss(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS.clone()})
    assert bool(loss.isfinite().all())


def test_a_configuration_that_counts_blocks_cannot_be_filtered():
    dense_first: dict[str, Any] = {"intermediate_size": 56, "num_key_value_heads": 2, "num_experts": 4}
    model = tiny_model(
        "qwen2", num_hidden_layers=4, use_sliding_window=True, max_window_layers=2, layer_types=None, sliding_window=8
    )
    check_droppable(model, ["model.layers.1"])  # `layer_types` says it, block by block
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen2_moe",
        **dense_first,
        vocab_size=256,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        decoder_sparse_step=2,
    )
    with torch.device("meta"):
        mixed = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=r"the configuration of a qwen2_moe model cannot be filtered: .*model\.layers\.0"
    ):
        check_droppable(mixed, ["model.layers.0", "model.layers.1"])
    assert len(blocks(mixed)) == config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["model.layers.9"], r"'model\.layers\.9' is not a block or a part of one .*did you mean 'model\.layers\.\d'"),
        (["model.layers.1.mpl"], r"'model\.layers\.1\.mpl' is not a block .*did you mean 'model\.layers\.1\.mlp'"),
        ([f"model.layers.{number}" for number in range(6)], r"a model of 6 blocks cannot lose all of them; keep one"),
    ],
)
def test_units_that_cannot_go_are_named(units, message):
    model = model_of("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        drop(model, units)
    assert torch.equal(logits(model), before)


def test_a_block_without_an_mlp_of_its_own_has_no_parts():
    with pytest.raises(
        ValueError, match=r"block 'model\.decoder\.layers\.0' has self_attn, fc1, fc2 where .* use alloc"
    ):
        sublayers(layer_map(tiny_model("opt"), scope="all"))


def test_a_kept_folder_holds_no_block_that_went(tmp_path: Path):
    model = model_of("llama")
    drop(model, ["model.layers.2"])
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    found = loaded[1]
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
