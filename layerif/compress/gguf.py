"""A GGUF file of a model, with a type of its own for every matrix. Models of the Llama kind can be written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerif.checks import require
from layerif.files import whole
from layerif.formats import Format, gguf_bytes
from layerif.models.blocks import bare

ARCHITECTURE = "llama"
_KEPT = {torch.float16: "F16", torch.bfloat16: "BF16"}  # all other weights are written in float32
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # types of tokens in llama.cpp


def why_no_gguf(config: Any, formats: Sequence[Format]) -> str | None:
    """Says why a model cannot be written as GGUF; None where it can.

    Args:
        config: of transformers.
        formats: of its matrices.
    """
    if config.model_type != ARCHITECTURE:
        return f"models of the kind {config.model_type} are not written as GGUF, only those of the kind {ARCHITECTURE}"
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling != "default":
        return f"rotary embeddings of the type {scaling} are not written as GGUF"
    for setting in ("attention_bias", "mlp_bias"):
        if getattr(config, setting, False):
            return f"a model with {setting} is not written as GGUF"
    if config.hidden_act != "silu":
        return f"a model with the activation {config.hidden_act} is not written as GGUF, only with silu"
    if others := sorted({each.name for each in formats if not each.is_gguf}):
        return f"the package gguf does not write {', '.join(others)}"
    return None


def gguf_names(config: Any, params: Sequence[str]) -> dict[str, str]:
    """Gives the name of each weight of a Llama in a GGUF file, by parameter name."""
    gguf = require("gguf", "embedded")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    found = {param: names.get_name(param, try_suffixes=(".weight",)) for param in params}
    unknown = [param for param, name in found.items() if name is None]
    if unknown:
        raise ValueError(f"a GGUF file of a Llama has no place for the weight {unknown[0]}; use method.save=false")
    return found


def write_gguf(model: nn.Module, tokenizer: Any, chosen: Mapping[str, Format], file: Path, *, name: str) -> str | None:
    """Writes a model of the Llama kind with each chosen weight in its format, and all others in the model's precision.

    Args:
        model: with its weights as they were before any quantising.
        tokenizer: its tokenizer.
        chosen: the format of each weight to quantise, by parameter name.
        file: is there whole, or not at all.
        name: of the model, for the file.

    Returns:
        The reason why the file has no tokenizer; None where it has one.
    """
    gguf = require("gguf", "embedded")
    config: Any = bare(model).config
    weights = {param: weight.detach() for param, weight in bare(model).named_parameters()}  # a tied one is there once
    names = gguf_names(config, list(weights))
    with whole(file) as unfinished:
        writer = gguf.GGUFWriter(unfinished, ARCHITECTURE)
        _add_sizes(writer, config, name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        why_not = _add_tokenizer(writer, tokenizer, config.vocab_size)
        for param, weight in weights.items():
            values = _as_in_gguf(names[param], weight, config)
            type_name = chosen[param].name if param in chosen else _kept_as(weight)
            stored = gguf_bytes(values, type_name)
            writer.add_tensor(names[param], stored, raw_dtype=gguf.GGMLQuantizationType[type_name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return why_not


def _kept_as(weight: Tensor) -> str:
    return _KEPT.get(weight.dtype, "F32") if weight.ndim > 1 else "F32"  # llama.cpp wants norms in float32


def _add_sizes(writer: Any, config: Any, name: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _as_in_gguf(name: str, weight: Tensor, config: Any) -> Tensor:
    """Puts the rows of queries and keys in the order of llama.cpp, which rotates neighbouring dimensions.

    transformers rotates the first half of a head against the second. A row of a head moves as a whole, so that its
    blocks stay as they are.
    """
    if ".attn_q." not in name and ".attn_k." not in name:
        return weight
    num_heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> str | None:
    """Adds a tokenizer of byte-level pairs; says why not where it is another one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    kind = _pre_tokenizer(content)
    if kind is None:
        return "only tokenizers of byte-level pairs, with ByteLevel alone or after single digits, are written as GGUF"
    ids = [*content["model"]["vocab"].values(), *(added["id"] for added in content["added_tokens"])]
    if max(ids) >= vocab_size:
        return "the tokenizer has more tokens than the model"
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, index in content["model"]["vocab"].items():
        tokens[index], types[index] = token, _NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)
    return None


def _pre_tokenizer(content: Mapping[str, Any]) -> str | None:
    """Gives llama.cpp's name of the way in which a tokenizer cuts text; None for all but two ways."""
    if (content.get("model") or {}).get("type") != "BPE" or content.get("normalizer"):
        return None
    first = content.get("pre_tokenizer") or {}
    parts = first.get("pretokenizers", [first])
    kinds = [part.get("type") for part in parts]
    if parts[-1].get("add_prefix_space") or kinds not in (["ByteLevel"], ["Digits", "ByteLevel"]):
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    return "smollm" if parts[0].get("individual_digits") else None
