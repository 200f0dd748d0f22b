"""Laws of the LoRA-MoE: its definition as a loop over experts, and what PEFT promises of an adapter."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from layerif.moe import LoraMoeConfig, LoraMoeLinear, balance_loss, expert_usage, record_routing

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi3": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt_neox": {},
}
LINEARS = {"phi3": 4, "opt": 6, "gpt_neox": 4}  # of a block; 7 elsewhere


def tiny(family: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(TINY | FAMILIES[family] | options))
    return AutoModelForCausalLM.from_config(config).eval()


def batch() -> dict[str, Tensor]:
    """Two rows, the second left-padded by three tokens."""
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (2, 9))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def shake(model: nn.Module, seed: int = 2) -> None:
    """Random adapter weights: at the start B is zero and hides everything."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3


def moe(base: nn.Module, *, adapter: str = "default", **options: Any) -> PeftModel:
    config = LoraMoeConfig(**({"r": 4, "num_experts": 3, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"} | options))
    model = get_peft_model(base, config, adapter_name=adapter)  # pyright: ignore[reportArgumentType]
    shake(model)
    return model  # pyright: ignore[reportReturnType]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def layer_of(num_experts: int, dtype: torch.dtype, **options: Any) -> Any:
    """One layer of a model that is nothing but a linear, 6 → 5."""
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    config = LoraMoeConfig(num_experts=num_experts, r=3, lora_alpha=7, target_modules=["0"], **options)
    model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    shake(model)
    layer = model.base_model.model[0]  # pyright: ignore[reportIndexIssue]
    assert isinstance(layer, LoraMoeLinear)
    return layer


def loop_over_experts(layer: Any, x: Tensor, top_k: int, dropout: float) -> Tensor:
    """The definition, one expert and one token's choice at a time."""
    weights = {name: getattr(layer, f"lora_moe_{name}")["default"].weight for name in ("A", "B", "router")}
    rank, scaling = layer.r["default"], layer.scaling["default"]
    dropped = F.dropout(x, dropout)
    probs, chosen = F.softmax(x @ weights["router"].T, dim=-1).topk(top_k, dim=-1)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    total = layer.base_layer(x)
    for expert in range(len(weights["router"])):
        rows = slice(expert * rank, (expert + 1) * rank)
        output = dropped @ weights["A"][rows].T @ weights["B"][:, rows].T * scaling
        total = total + output * (probs * (chosen == expert)).sum(dim=-1, keepdim=True)
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (2, 2), (5, 2), (7, 3), (3, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.filterwarnings("ignore:top_k=1")
def test_equals_the_loop_over_experts_with_every_gradient(
    dtype: torch.dtype, tolerance: float, num_experts: int, top_k: int, dropout: float
) -> None:
    layer = layer_of(num_experts, dtype, top_k=top_k, lora_dropout=dropout).train()
    x = torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
    probe = torch.randn(2, 4, 5, dtype=dtype)
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    assert len(inputs) == 4
    torch.manual_seed(4)
    ours = layer(x)
    torch.manual_seed(4)  # one mask per linear: a single draw of x's shape
    looped = loop_over_experts(layer, x, min(top_k, num_experts), dropout)
    assert torch.allclose(ours, looped, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad((ours * probe).sum(), inputs)
    expected = torch.autograd.grad((looped * probe).sum(), inputs)
    for got, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=10 * tolerance, atol=10 * tolerance)


@settings(max_examples=25, deadline=None)
@given(
    num_experts=st.integers(2, 9),
    top_k=st.integers(1, 10),
    tokens=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    scale=st.sampled_from([1e-6, 1.0, 300.0]),
)
@pytest.mark.filterwarnings("ignore:top_k=1")
def test_routing_weights_sum_to_one_over_the_largest_logits(
    num_experts: int, top_k: int, tokens: list[int], scale: float
) -> None:
    """At any number of experts and choices, for any shape of input, and for routers that hardly or wholly decide."""
    layer = layer_of(num_experts, torch.float64, top_k=top_k, lora_dropout=0.0)
    x = torch.randn(*tokens, 6, dtype=torch.float64)
    layer.lora_moe_router["default"].weight.data *= scale
    gates = layer._gates(x, "default")
    chosen = min(top_k, num_experts)
    assert gates.shape == (*tokens, num_experts)
    assert (gates >= 0).all()
    assert ((gates > 0).sum(dim=-1) <= chosen).all()
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(*tokens, dtype=torch.float64))
    logits_TE = layer.lora_moe_router["default"](x)
    least = logits_TE.topk(chosen, dim=-1).values[..., -1:]
    assert ((gates == 0) | (logits_TE >= least)).all()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), loop_over_experts(layer, x, chosen, 0.0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_routing_weights_sum_to_one(top_k: int) -> None:
    """Experts that are all alike mix to any one of them, whatever the router says."""
    layer = layer_of(4, torch.float64, top_k=top_k, lora_dropout=0.0)
    down, up = layer.lora_moe_A["default"].weight.data, layer.lora_moe_B["default"].weight.data
    down[:], up[:] = down[:3].repeat(4, 1), up[:, :3].repeat(1, 4)
    x = torch.randn(8, 6, dtype=torch.float64)
    assert torch.allclose(layer(x) - layer.base_layer(x), x @ down[:3].T @ up[:, :3].T * 7 / 3, rtol=1e-12, atol=1e-12)


def test_saves_a_tenth_of_the_loop_for_backward() -> None:
    torch.manual_seed(0)
    num_experts, width = 5, 96
    config = LoraMoeConfig(num_experts=num_experts, lora_dropout=0.0, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(width, width)), config)  # pyright: ignore[reportArgumentType]
    layer: Any = model.base_model.model[0]  # pyright: ignore[reportIndexIssue]
    x = torch.randn(512, width, requires_grad=True)

    def saved(run: Any) -> int:
        own = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _output = run()
        return sum(kept.values())

    ours = saved(lambda: layer(x))
    assert 0 < ours <= 4 * 512 * (2 * num_experts * 8 + num_experts + 3 * 2)  # T·(2·E·R + E) and the choices
    assert ours < 0.3 * saved(lambda: loop_over_experts(layer, x, 2, 0.0))  # 0.1 at a real width


def test_one_expert_is_peft_lora() -> None:
    ours = moe(tiny(), num_experts=1, lora_alpha=6)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    lora = get_peft_model(tiny(), config)
    state = {name.replace("lora_moe_", "lora_"): value for name, value in get_peft_model_state_dict(ours).items()}
    assert set_peft_model_state_dict(lora, state).unexpected_keys == []
    assert torch.allclose(logits(ours), logits(lora), rtol=1e-6, atol=1e-6)
    for model in (ours, lora):
        model(**batch()).logits.square().mean().backward()
    theirs = dict(lora.named_parameters())
    compared = [
        torch.allclose(p.grad, theirs[n.replace("lora_moe_", "lora_")].grad, rtol=1e-4, atol=1e-7)  # pyright: ignore
        for n, p in ours.named_parameters()
        if p.requires_grad
    ]
    assert len(compared) == 2 * 7 * 2
    assert all(compared)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_experts_in_all_block_linears_and_starts_as_the_base(family: str) -> None:
    base = tiny(family)
    before = logits(base)
    blocks = [
        name for name, module in base.named_modules() if type(module).__name__.endswith(("DecoderLayer", "NeoXLayer"))
    ]
    counts = dict(zip(blocks, (1, 3), strict=True))
    model = get_peft_model(base, LoraMoeConfig(num_experts=counts, balance_coefficient=0.1))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraMoeLinear)}
    assert len(layers) == 2 * LINEARS.get(family, 7)
    for name, layer in layers.items():
        block = next(block for block in blocks if name.removeprefix("base_model.model.").startswith(f"{block}."))
        assert layer.num_experts["default"] == counts[block]
        assert ("default" in layer.lora_moe_router) == (counts[block] > 1)
    assert torch.equal(logits(model), before)
    shake(model)
    assert not torch.equal(logits(model), before)
    model(**batch()).logits.float().logsumexp(-1).mean().add(balance_loss(model)).backward()
    # OPT's attention and Gemma's scale leave no parameter without gradient either.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert len(expert_usage(model)) == LINEARS.get(family, 7)


def test_initial_weights_have_lora_bounds() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny(), LoraMoeConfig(num_experts=4))  # pyright: ignore[reportArgumentType]
    for module in model.modules():
        if isinstance(module, LoraMoeLinear):
            bound = 1 / math.sqrt(module.in_features)  # kaiming-uniform(√5)
            assert not module.lora_moe_B["default"].weight.any()  # pyright: ignore
            for part in (module.lora_moe_A, module.lora_moe_router):
                weight: Any = part["default"].weight
                assert 0.8 * bound < weight.abs().max() <= bound


# Which modules get how many experts


def counts_of(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    return {module.name: module.num_experts[adapter] for module in model.modules() if isinstance(module, LoraMoeLinear)}


def test_more_specific_keys_win() -> None:
    counts = {
        "model.layers.0": 2,
        "model.layers.1": 3,
        "k_proj": 4,
        "layers.1.mlp.(up|down)_proj": 5,
        "model.layers.0.self_attn.k_proj": 1,
    }
    got = counts_of(moe(tiny(), num_experts=counts))
    assert got["model.layers.0.self_attn.k_proj"] == 1
    assert got["model.layers.1.self_attn.k_proj"] == 4
    assert got["model.layers.1.mlp.up_proj"] == got["model.layers.1.mlp.down_proj"] == 5
    assert got["model.layers.1.mlp.gate_proj"] == got["model.layers.1.self_attn.q_proj"] == 3
    assert got["model.layers.0.mlp.up_proj"] == 2


def test_a_block_key_is_no_prefix_of_a_longer_number() -> None:
    counts = {f"model.layers.{index}": index + 1 for index in range(11)}
    got = counts_of(moe(tiny(num_hidden_layers=11), num_experts=counts, target_modules=["q_proj"]))
    assert [got[f"model.layers.{index}.self_attn.q_proj"] for index in range(11)] == list(range(1, 12))
    del counts["model.layers.10"]
    with pytest.raises(ValueError, match=r"no count for model\.layers\.10\.self_attn"):
        moe(tiny(num_hidden_layers=11), num_experts=counts, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": {"model.layers.0": 2, "model.layer.1": 2}}, "'model.layer.1'.*did you mean 'model.layers.1'"),
        ({"num_experts": {"model.layers.0": 2}}, "no count for model.layers.1.*7 of 14"),
        ({"target_modules": ["mlp"]}, "model.layers.0.mlp, a LlamaMLP"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens, a Embedding"),
    ],
)
def test_bad_targets_are_refused_before_the_model_is_touched(options: dict[str, Any], message: str) -> None:
    base = tiny()
    with pytest.raises(ValueError, match=message):
        moe(base, **options)
    assert not any(isinstance(module, LoraMoeLinear) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 0}, {"num_experts": 1.5}, {"num_experts": True}, {"num_experts": {}},
        {"num_experts": {"model.layers.0": 0}}, {"num_experts": {"q_proj[": 2}}, {"r": 0}, {"top_k": 0},
        {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"balance_coefficient": -1}, {"target_modules": []},
        {"layers_pattern": "layers"}, {"layers_to_transform": 1, "target_modules": ".*q_proj"},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LoraMoeConfig(**options)


def test_a_conv1d_is_adapted_and_merged_as_a_linear_layer_is_and_other_modules_are_refused() -> None:
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=64))
    with pytest.raises(ValueError, match="ln_1, a LayerNorm"):
        moe(copy.deepcopy(gpt2), target_modules=["ln_1"])
    model = moe(gpt2, num_experts=1).eval()
    shake(model)
    with torch.no_grad():
        adapted = model(**batch()).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch()).logits, adapted, rtol=1e-4, atol=1e-5)
    assert isinstance(merged.transformer.h[0].mlp.c_fc, Conv1D)


def test_exclude_layers_and_modules_to_save_are_pefts() -> None:
    options = {"layers_to_transform": [1], "exclude_modules": ["up_proj"], "modules_to_save": ["lm_head"]}
    model = moe(tiny(), num_experts={"model.layers.1": 2}, **options)
    names = counts_of(model)
    assert len(names) == 6
    assert all(name.startswith("model.layers.1.") and "up_proj" not in name for name in names)
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    assert any("lm_head" in name for name in get_peft_model_state_dict(model))


def test_all_linear_means_the_blocks() -> None:
    assert counts_of(moe(tiny(), target_modules="all-linear")) == counts_of(moe(tiny()))


def test_a_router_that_cannot_learn_is_announced() -> None:
    with pytest.warns(UserWarning, match="router learns nothing"):
        LoraMoeConfig(top_k=1)


# Load balancing


def dense_balance(model: nn.Module, inputs: dict[str, Tensor], top_k: int) -> Tensor:
    """E·Σ f·P of every router, from the inputs it saw, token by token."""
    seen: dict[str, tuple[Any, Tensor]] = {}

    def see(layer: Any, args: tuple[Tensor], _output: Tensor) -> None:
        seen[layer.name] = layer, args[0]

    hooks = [
        module.register_forward_hook(see)
        for module in model.modules()
        if isinstance(module, LoraMoeLinear) and module.has_router
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    losses = []
    for layer, x in seen.values():
        probs = (x @ layer.lora_moe_router["default"].weight.T).softmax(-1)
        tokens = probs[inputs["attention_mask"][:, -probs.shape[1] :].bool()]  # a cache holds the earlier ones
        share: Any = sum(F.one_hot(token.argsort(descending=True)[:top_k], tokens.shape[1]).sum(0) for token in tokens)
        losses.append(tokens.shape[1] * (share.double() / (len(tokens) * top_k) * tokens.mean(0)).sum())
    return sum(losses) / len(losses)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_equals_its_definition_with_gradient(top_k: int) -> None:
    model = moe(
        tiny().double(), num_experts={"model.layers.0": 1, "model.layers.1": 3}, top_k=top_k, balance_coefficient=0.1
    )
    routers = [parameter for name, parameter in model.named_parameters() if "router" in name]
    assert len(routers) == 7
    model(**batch())
    ours = balance_loss(model)
    expected = dense_balance(model, batch(), top_k)
    assert torch.allclose(ours, expected, rtol=1e-12)
    for got, wanted in zip(torch.autograd.grad(ours, routers), torch.autograd.grad(expected, routers), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-14)


def test_balance_loss_is_one_when_even_and_zero_without_routers() -> None:
    model = moe(tiny(), balance_coefficient=0.1)
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data.zero_()
    model(**batch())
    assert balance_loss(model).item() == pytest.approx(1)
    plain = moe(tiny(), num_experts=1, balance_coefficient=0.1)
    plain(**batch())
    assert balance_loss(plain).item() == 0
    assert expert_usage(plain) == {}


@pytest.mark.parametrize("family", ["llama", "opt"])  # OPT flattens batch and tokens before its MLP
def test_padding_does_not_change_the_balance_loss(family: str) -> None:
    model = moe(tiny(family).double(), balance_coefficient=0.1)
    torch.manual_seed(5)
    ids = torch.randint(3, 64, (2, 6))
    ones = torch.ones_like(ids)

    def loss(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            model(input_ids=input_ids, attention_mask=attention_mask)
            return balance_loss(model)

    unpadded = loss(ids, ones)
    for padding in (0, 7):
        pad = torch.full((2, 4), padding)
        right = loss(torch.cat([ids, pad], 1), torch.cat([ones, 0 * pad], 1))
        left = loss(torch.cat([pad, ids], 1), torch.cat([0 * pad, ones], 1))
        assert torch.allclose(right, unpadded, rtol=1e-12)
        assert torch.allclose(left, unpadded, rtol=1e-9)
    assert not torch.allclose(loss(torch.cat([ids, pad], 1), torch.cat([ones, 1 + 0 * pad], 1)), unpadded, rtol=1e-4)


def test_a_coefficient_of_a_thousandth_trains_the_router() -> None:
    """At the start B is zero: only the balance loss reaches the routers."""
    model = get_peft_model(tiny(), LoraMoeConfig(num_experts=4, balance_coefficient=0.001)).train()
    config: Any = model.peft_config["default"]
    routers = [parameter for name, parameter in model.named_parameters() if "router" in name]
    optimizer = torch.optim.AdamW(routers, lr=3e-3)
    losses = []
    for _ in range(15):
        output = model(**batch(), labels=batch()["input_ids"])
        losses.append(balance_loss(model).item())
        (output.loss + config.balance_coefficient * balance_loss(model)).backward()
        assert all(router.grad is not None and router.grad.any() for router in routers)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_keeps_every_gradient_and_counts_once(dropout: float) -> None:
    model = moe(tiny().double(), balance_coefficient=0.5, lora_dropout=dropout).train()

    def gradients() -> tuple[list[Tensor], float]:
        model.zero_grad()
        torch.manual_seed(6)
        loss = model(**batch(), labels=batch()["input_ids"]).loss + 0.5 * balance_loss(model)
        before = balance_loss(model).item()
        loss.backward()
        assert balance_loss(model).item() == before  # the second run of a block replaced nothing
        assert len(expert_usage(model)) == 14
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], loss.item()

    plain, plain_loss = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed, loss = gradients()
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    assert len(plain) == 3 * 14
    for got, wanted in zip(checkpointed, plain, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-14)


def test_reentrant_checkpointing_is_refused_not_silent() -> None:
    model = moe(tiny(), balance_coefficient=0.5).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words about inputs without gradient
        model(**batch())
    with pytest.raises(ValueError, match="use_reentrant"):
        balance_loss(model)


def test_a_balance_loss_nobody_adds_is_announced() -> None:
    model = moe(tiny(), balance_coefficient=0.5).train()
    model(**batch())
    with pytest.warns(UserWarning, match="balance_loss"):
        model(**batch())
    balance_loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch())
        balance_loss(model)
        with torch.no_grad():
            model(**batch())


def test_nothing_is_kept_unless_asked_for() -> None:
    model = moe(tiny())
    model(**batch())
    with pytest.raises(ValueError, match="kept no routing"):
        balance_loss(model)
    with record_routing(model):
        model(**batch())
    usage = expert_usage(model)
    assert set(usage) == set(counts_of(model))
    for one in usage.values():
        assert one.load.shape == one.weight.shape == (3,)
        assert not one.load.requires_grad
    model(**batch())
    with pytest.raises(ValueError, match="kept no routing"):
        expert_usage(model)
    with pytest.raises(ValueError, match="no LoRA-MoE layer"):
        expert_usage(tiny())


def test_a_step_with_a_cache_counts_its_own_tokens() -> None:
    model = moe(tiny().double(), balance_coefficient=0.1)
    inputs: dict[str, Any] = batch()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.tensor([[1, 1], [1, 0]])], dim=1)

        def step() -> dict[str, Any]:
            ids = inputs["input_ids"][:, -2:]
            return {"input_ids": ids, "attention_mask": mask, "past_key_values": copy.deepcopy(cache)}

        model(**step())
        ours = balance_loss(model)
        assert torch.allclose(ours, dense_balance(model, step(), 2), rtol=1e-12)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model = moe(tiny(), balance_coefficient=0.1)
    model(input_ids=batch()["input_ids"], attention_mask=torch.zeros(2, 1, 9, 9))  # additive: 0 lets everything through
    with pytest.raises(ValueError, match=r"attention_mask \(2, 1, 9, 9\)"):
        balance_loss(model)


# What PEFT promises


def test_saves_and_loads_bit_equal(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    counts = {"model.layers.0": 1, "model.layers.1": 4}
    model = moe(base, num_experts=counts, balance_coefficient=0.001)
    model.save_pretrained(str(tmp_path / "adapter"))
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA_MOE"
    assert saved["num_experts"] == counts
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(again, tmp_path / "adapter"),
        PeftModel.from_pretrained(tiny(), tmp_path / "adapter", low_cpu_mem_usage=True),
    ):
        assert isinstance(loaded.peft_config["default"], LoraMoeConfig)
        assert counts_of(loaded) == counts_of(model)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        for name, value in get_peft_model_state_dict(model).items():
            assert torch.equal(get_peft_model_state_dict(loaded)[name], value)
        assert torch.equal(logits(loaded), logits(model))
    files = [tmp_path / folder / "adapter_config.json" for folder in ("adapter", "twice")]
    model.save_pretrained(str(tmp_path / "twice"))
    assert files[0].read_text() == files[1].read_text()


def test_state_dict_round_trip() -> None:
    model, other = moe(tiny()), moe(tiny())
    shake(other, seed=9)
    assert not torch.equal(logits(model), logits(other))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert result.unexpected_keys == []
    assert torch.equal(logits(model), logits(other))


def test_two_adapters(tmp_path: Path) -> None:
    model = moe(tiny(), adapter="first", num_experts=2)
    first = logits(model)
    model.add_adapter("second", LoraMoeConfig(num_experts={"model.layers.0": 1, "model.layers.1": 5}, r=2))
    assert torch.equal(logits(model), first)  # adding does not activate
    assert set(counts_of(model, "second").values()) == {1, 5}
    model.set_adapter("second")
    model.eval()  # as in PEFT, a new adapter's dropout is in training mode
    shake(model, seed=8)
    second = logits(model)
    assert not torch.equal(first, second)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".second." in name for name in trainable)
    model.save_pretrained(str(tmp_path))
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    assert torch.equal(logits(model), second)
    model.delete_adapter("third")
    model.delete_adapter("second")
    assert not any("second" in name or "third" in name for name, _ in model.named_parameters())
    assert set(model.peft_config) == {"first"}
    assert counts_of(model, "first") == dict.fromkeys(counts_of(model, "first"), 2)


def test_active_adapters_add_up() -> None:
    model = moe(tiny(), adapter="first", num_experts=2, balance_coefficient=0.1)
    model.add_adapter("second", LoraMoeConfig(num_experts=3, balance_coefficient=0.1, lora_dropout=0.0))
    shake(model)
    layer = next(module for module in model.modules() if isinstance(module, LoraMoeLinear))
    x = torch.randn(3, layer.in_features)
    alone = []
    for name in ("first", "second"):
        layer.set_adapter(name)
        alone.append(layer(x) - layer.base_layer(x))
    model.base_model.set_adapter(["first", "second"])  # pyright: ignore[reportCallIssue]
    assert torch.allclose(layer(x) - layer.base_layer(x), alone[0] + alone[1], atol=1e-5)
    model(**batch())
    assert {len(one.load) for one in expert_usage(model).values()} == {2, 3}
    assert len(expert_usage(model)) == 28


def test_disable_unload_and_copies() -> None:
    base = tiny()
    before = logits(base)
    model = moe(base, balance_coefficient=0.1)
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model(**batch())  # leaves tensors of a graph behind, which cannot be copied
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), adapted)
    with record_routing(twin), torch.no_grad():
        twin(**batch())
    assert len(expert_usage(twin)) == 14
    plain = model.unload()
    assert torch.equal(logits(plain), before)
    assert not plain._forward_pre_hooks


def test_generates_with_a_cache_under_a_padded_mask() -> None:
    model = moe(tiny(), balance_coefficient=0.1)
    with torch.no_grad():
        model.base_model.model.config.use_cache = True  # pyright: ignore
        cached = model.generate(**batch(), max_new_tokens=5, do_sample=False, min_new_tokens=5)
        usage = expert_usage(model)  # of the last token: two rows, two experts each
        plain = model.generate(**batch(), max_new_tokens=5, do_sample=False, min_new_tokens=5, use_cache=False)
    assert torch.equal(cached, plain)  # pyright: ignore[reportArgumentType]
    assert all(set((4 * one.load).tolist()) <= {0.0, 1.0, 2.0} for one in usage.values())


def test_one_expert_merges_and_comes_out_again() -> None:
    model = moe(tiny(), num_experts=1)
    adapted = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), adapted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), adapted, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, LoraMoeLinear) for module in merged.modules())
    assert torch.allclose(logits(merged), adapted, atol=1e-5)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_several_experts_is_refused_before_anything_is_merged(merge: str) -> None:
    model = moe(tiny(), num_experts={"model.layers.0": 1, "model.layers.1": 3})
    adapted = logits(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj.*3 experts"):
        getattr(model, merge)()
    assert torch.equal(logits(model), adapted)
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraMoeLinear))


def test_half_precision_base_keeps_a_float32_adapter() -> None:
    model = moe(tiny().bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model(**batch()).logits
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe(tiny())(**batch()).logits.isfinite().all()
    half = get_peft_model(tiny().bfloat16(), LoraMoeConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}
    assert half(**batch()).logits.isfinite().all()


def test_mixed_adapter_batches_are_refused() -> None:
    model = moe(tiny())
    with pytest.raises(ValueError, match="adapter_names is not supported"):
        model(**batch(), adapter_names=["default", "__base__"])


def test_says_what_it_is() -> None:
    model = moe(tiny(), num_experts={"model.layers.0": 1, "model.layers.1": 3})
    text = repr(model)
    assert "lora_moe.LoraMoeLinear" in text
    assert "default: 1 expert of rank 4" in text
    assert "default: 3 experts of rank 4, top 2" in text
    assert model.get_model_status().peft_types == {"default": "LORA_MOE"}
    assert peft.PeftType("LORA_MOE") in list(peft.PeftType)


def test_keeping_zeros_the_merged_weight_has_those_of_its_base_and_equals_the_adapted_model():
    base = tiny()
    linear = base.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        linear.weight[:, ::3] = 0  # type: ignore[index]
    zeros = linear.weight == 0
    model = get_peft_model(base, LoraMoeConfig(num_experts=1, keep_zeros=True, lora_dropout=0.0))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with torch.no_grad():
        layer.lora_moe_B["default"].weight.normal_()  # type: ignore[index,union-attr]
    ids = torch.arange(20)[None]
    adapted = model(input_ids=ids).logits
    adapted.sum().backward()
    assert bool(layer.lora_moe_A["default"].weight.grad.any())  # type: ignore[index,union-attr]
    merged = model.merge_and_unload()
    weight = merged.get_submodule("model.layers.0.mlp.up_proj").weight
    assert bool((weight[zeros] == 0).all())  # type: ignore[index]
    assert bool((weight[~zeros] != 0).all())  # type: ignore[index]
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)
