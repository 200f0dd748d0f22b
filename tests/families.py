"""Random tiny models of families whose matrices are not all linear layers of a text decoder: 2 blocks, 32 wide.

`separated` gives the same model with an nn.Linear for each matrix, the reference of what is measured and pruned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from layerif.models.pretrained import auto_class
from layerif.models.stored import fused_experts
from tests.tiny import VOCAB_SIZE

_TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_COMMON: dict[str, Any] = {
    **_TOKENS,
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED: dict[str, Any] = {**_COMMON, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 12}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_IMAGES = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}


def _rope(sections: list[int] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    return {"rope_parameters": found | ({"mrope_section": sections} if sections else {})}


CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**_TOKENS, "vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "falcon": {**_COMMON, "multi_query": True, "parallel_attn": True, "ffn_hidden_size": 56},
    "gemma3": {
        "text_config": {**_GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 12},
        "vision_config": {
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16,
        },
        "mm_tokens_per_image": 4, "image_token_index": 10, "boi_token_index": 11, "eoi_token_index": 12,
    },
    "qwen2_vl": {
        "text_config": {**{key: _GROUPED[key] for key in _GROUPED if key != "head_dim"}, **_rope([1, 1, 2])},
        "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        **_IMAGES, "pad_token_id": 1,
    },
    "qwen3_vl": {
        "text_config": {**_GROUPED, **_rope([2, 2, 2])},
        "vision_config": {
            "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
        **_IMAGES, "pad_token_id": 1,
    },
    "qwen3_next": {
        **_GROUPED, **_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"], "partial_rotary_factor": 0.5,
    },
    "jamba": {
        **_COMMON, **_EXPERTS, "intermediate_size": 24, "num_key_value_heads": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "mamba": {
        **_TOKENS, "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
        "time_step_rank": 4,
    },
    "llama4_text": {
        **_GROUPED, "intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 16, "no_rope_layers": [1, 0],
    },
    "deepseek_v3": {
        **_COMMON, "intermediate_size": 24, "num_key_value_heads": 4, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "gpt_oss": {
        **_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"], **_rope(),
    },
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "moe_intermediate_size": 16},
    "olmoe": {**_COMMON, **_EXPERTS, "intermediate_size": 24, "num_key_value_heads": 2},
}  # fmt: skip
TOLERANCES = {"qwen3_next": 1e-5}  # its delta rule computes in float32
WITH_EXPERTS = ("qwen3_next", "jamba", "llama4_text", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe", "olmoe")
QUICK = ("gpt2", "gemma3", "jamba", "deepseek_v3", "gpt_oss", "llama4_text")


def each_family(families: Iterable[str] = CONFIGS) -> list[Any]:
    """The parameters of a test of every family; all but a few kinds are for `make test-all`."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families]


def model_of(family: str, *, seed: int = 0) -> Any:
    """A random model of a family, in float32 and eval mode. The global random state is left as it was."""
    return copy.deepcopy(_made(family, seed))


@cache
def _made(family: str, seed: int) -> Any:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = AutoConfig.for_model(family, **CONFIGS[family], **eager)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():  # see `tests.tiny.tiny_model`
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def separated(model: nn.Module) -> Any:
    """The same model with an nn.Linear in place of every Conv1D and of every matrix of fused experts."""
    found = copy.deepcopy(model)
    for name, module in list(found.named_modules()):
        replacement: nn.Module | None = None
        if isinstance(module, Conv1D):
            replacement = _linear(module.weight.T, module.bias)
        elif module in fused_experts(found):
            replacement = SeparateExperts(module)
        if replacement is not None:
            holder, _, attribute = name.rpartition(".")
            setattr(found.get_submodule(holder), attribute, replacement)
    return found


class SeparateExperts(nn.Module):
    """Experts whose matrices are linear layers that see every token, as zeros where it is not sent to the expert."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.fused = (fused,)  # for its activation alone
        is_turned = getattr(fused, "is_transposed", True)
        for expert in range(len(fused.down_proj)):
            one: Any = nn.Module()
            for kind in ("gate_up_proj", "down_proj"):
                weight, biases = getattr(fused, kind)[expert], getattr(fused, f"{kind}_bias", None)
                bias = None if biases is None else biases[expert]
                one.add_module(kind, _linear(weight.T if is_turned else weight, bias))
            if getattr(fused, "has_post_expert_norm", False):
                one.down_proj = nn.Sequential(one.down_proj, fused.post_expert_norm)
            self.add_module(str(expert), one)

    def forward(self, hidden: Tensor, index_TK: Tensor | None = None, weights_TK: Tensor | None = None) -> Tensor:
        experts: dict[str, Any] = dict(self.named_children())
        if index_TK is None or weights_TK is None:  # Llama 4: the tokens of each expert, one after the other
            parts = hidden.chunk(len(experts))
            return torch.cat([self._run(one, part, 1.0) for one, part in zip(experts.values(), parts, strict=True)])
        total = torch.zeros_like(hidden)
        for number, one in experts.items():
            is_its_TK = index_TK == int(number)
            gates_T1 = (weights_TK * is_its_TK).sum(1, keepdim=True)
            total = total + gates_T1 * self._run(one, hidden, is_its_TK.any(1, keepdim=True))
        return total

    def _run(self, one: Any, hidden: Tensor, is_its: Any) -> Tensor:
        fused: Any = self.fused[0]
        inner = one.gate_up_proj(hidden * is_its)
        if hasattr(fused, "_apply_gate"):
            inner = fused._apply_gate(inner)
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = up * fused.act_fn(gate)
        return one.down_proj(inner * is_its)


def _linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    num_out, num_in = weight_OI.shape
    found = nn.Linear(num_in, num_out, bias=bias_O is not None, dtype=weight_OI.dtype)
    with torch.no_grad():
        found.weight.copy_(weight_OI)
        if bias_O is not None:
            found.bias.copy_(bias_O)
    return found
