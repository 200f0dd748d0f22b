"""Random tiny models of every covered family, a tiny tokenizer, the shipped tasks: no download, milliseconds.

Sizes are unequal wherever a family allows it, so that q, k and o have different shapes and a mixed-up axis fails.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from layerif.app.schema import from_conf

VOCAB_SIZE = 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "attn_implementation": "eager",
}
_GROUPED: dict[str, Any] = {"intermediate_size": 56, "num_key_value_heads": 2, "head_dim": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 16},
    "gemma": _GROUPED,
    "gemma2": {**_GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 12},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "phi3": _GROUPED,
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 24, "dropout": 0.0},
    "gpt_neox": {"intermediate_size": 56},
}
# Not in every test: for pruning, whose blocks are called one by one.
FURTHER: dict[str, dict[str, Any]] = {
    "gemma3_text": {**_GROUPED, "num_hidden_layers": 6, "sliding_window": 16, "query_pre_attn_scalar": 12},
    "mixtral": {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2},
}


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal language model of `family`: 3 blocks, hidden size 32, eager attention, float32, eval mode.

    overrides: fields of the family's configuration. The global random state is left as it was.
    """
    config = AutoConfig.for_model(family, **{**_COMMON, **(FAMILIES | FURTHER)[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Freshly built biases and norms are constant; a law should not hold because they are. Larger weights than
        # 0.02 make the logits differ enough to tell answers apart.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 256 tokens over ASCII: `<s>` 0, `</s>` 1 (also the padding, as in SmolLM2), `<unk>` 2.

    bos: whether it puts `<s>` before every text by itself.
    """
    backend = Tokenizer.from_str(_trained())
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


@cache
def shipped_task(name: str, *overrides: str) -> Any:
    """The task of `conf/task/<name>.yaml`, with Hydra overrides; composing it takes longer than most tests."""
    return from_conf(f"task={name}", *overrides)


@cache
def _trained() -> str:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    printable = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=[*printable, "Ġ", "Ċ"],  # space and newline in the byte-level alphabet
        show_progress=False,
    )
    backend.train_from_iterator([_TEXT], trainer)
    return backend.to_str()


_TEXT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.
### Instruction: Question: What is the capital of France? Options: (A) Paris (B) London (C) Rome (D) Madrid
### Response: Answer: The answer is B. Answer: equivalent. Answer: not equivalent. Answer: acceptable.
Tell me if the statements equivalent, not equivalent. Sentence 1: the cat sat on the mat. Sentence 2: a dog ran.
Question: Which region of the world is the country in? Answer: Europe. Answer: Africa. Answer: Asia.
"""
