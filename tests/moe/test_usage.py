"""Expert usage: what the meter sums on the device equals a count token by token of the router's own probabilities."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from layerif.moe import LoraMoeConfig, LoraMoeLinear, expert_usage, measure_usage, record_routing
from layerif.moe.usage import ExpertUsage, between_tasks, describe_unused, usage_by_block
from tests.tiny import VOCAB_SIZE, tiny_model

BLOCKS = ["model.layers.0", "model.layers.1", "model.layers.2"]
COUNTS = {"model.layers.0": 1, "model.layers.1": 4, "model.layers.2": 2}


def routed(top_k: int = 2, **options: Any) -> Any:
    config: Any = LoraMoeConfig(r=2, num_experts=COUNTS, top_k=top_k, balance_coefficient=0.1, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(tiny_model(attn_implementation="sdpa").double(), config, autocast_adapter_dtype=False)


def batch(seed: int, *, padding: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def recount(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, tuple[Any, Any, float]]:
    """Load, weight and entropy of every router, one token at a time, from the inputs it saw."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, LoraMoeLinear) and module.has_router
    ]
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, _: seen.setdefault(layer.name, []).append((args[0], mask)), prepend=True
        )
        for layer in layers
    ]
    for inputs in batches:
        mask = inputs["attention_mask"].bool()
        with torch.no_grad():
            model(**inputs)
    for hook in hooks:
        hook.remove()
    found = {}
    for layer in layers:
        router = layer.lora_moe_router["default"].weight
        top_k = layer.top_k["default"]
        tokens = [(x[kept] @ router.detach().T).softmax(-1) for x, kept in seen[layer.name]]
        loads, weights, entropies = [], [], []
        for p in torch.cat(tokens):
            chosen = p.argsort(descending=True)[:top_k]
            loads.append(torch.zeros_like(p).index_fill(0, chosen, 1 / top_k))
            weights.append(torch.zeros_like(p).index_copy(0, chosen, p[chosen] / p[chosen].sum()))
            entropies.append(-float((p * p.log()).sum()))
        found[layer.name] = torch.stack(loads).mean(0), torch.stack(weights).mean(0), sum(entropies) / len(entropies)
    return found


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_usage_over_forwards_equals_a_count_token_by_token(top_k):
    model = routed(top_k)
    batches = [batch(0), batch(1, padding=3)]
    with measure_usage(model) as meter, torch.no_grad():
        for inputs in batches:
            model(**inputs)
    usage, expected = meter.take(), recount(model, batches)
    assert usage.keys() == expected.keys()
    assert len(usage) == 14
    for name, (load, weight, entropy) in expected.items():
        torch.testing.assert_close(usage[name].load, load)
        torch.testing.assert_close(usage[name].weight, weight)
        assert usage[name].entropy == pytest.approx(entropy)
        assert float(usage[name].load.sum()) == pytest.approx(1)
        assert float(usage[name].weight.sum()) == pytest.approx(1)
    assert meter.take() == {}

    blocks = usage_by_block(usage, BLOCKS)
    assert list(blocks) == BLOCKS[1:]  # one expert has no router
    for block, found in blocks.items():
        mine = [value for name, value in expected.items() if name.startswith(f"{block}.")]
        assert found["load"] == pytest.approx(torch.stack([load for load, _, _ in mine]).mean(0).tolist())
        assert sum(found["load"]) == pytest.approx(1)
        assert found["entropy"] == pytest.approx(sum(entropy for _, _, entropy in mine) / 7)


def test_a_meter_counts_its_own_kind_of_forward_once_and_leaves_no_trace():
    model = routed().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    with measure_usage(model, with_grad=True) as training:
        model(**batch(0)).logits.sum().backward()  # runs every block again
        with torch.no_grad():
            model(**batch(1))
    trained = training.take()
    with measure_usage(model) as evaluating, torch.no_grad():
        model(**batch(0))
    for name, one in evaluating.take().items():
        torch.testing.assert_close(trained[name].load, one.load)
        assert trained[name].entropy == pytest.approx(one.entropy)
    with torch.no_grad():
        model(**batch(0))
    assert evaluating.take() == {}


def test_the_last_forward_is_read_by_the_same_definition():
    model = routed()
    with record_routing(model), torch.no_grad():
        model(**batch(2, padding=1))
    expected = recount(model, [batch(2, padding=1)])
    for name, one in expert_usage(model).items():
        torch.testing.assert_close(one.load, expected[name][0])
        assert one.entropy == pytest.approx(expected[name][2])


def test_other_models_leave_the_meter_empty():
    with measure_usage(tiny_model()) as meter, torch.no_grad():
        tiny_model()(**batch(0))
    assert meter.take() == {}
    assert usage_by_block({}, BLOCKS) == {}
    assert describe_unused({}) is None


def test_a_model_that_is_measured_can_be_copied():
    model = routed()
    with measure_usage(model) as meter, torch.no_grad():
        copy.deepcopy(model)(**batch(0))
        assert meter.take() == {}


@pytest.mark.parametrize(("block", "experts"), [("model.layers.1", 4), ("model.layers.2", 2)])
def test_a_router_that_collapses_is_named_also_where_every_expert_is_chosen(block, experts):
    model = routed()
    for name, router in model.named_parameters():
        if "router" in name:
            router.data.zero_()
    collapsed: Any = model.base_model.model.get_submodule(f"{block}.self_attn.q_proj")
    inputs = batch(0)
    seen: list[Tensor] = []
    hook = collapsed.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    # Fewer tokens than dimensions: some weight gives every token a logit of 50 for the first expert.
    logits = torch.full((14, 1), 50.0, dtype=torch.float64)
    collapsed.lora_moe_router["default"].weight.data[0] = (torch.linalg.pinv(seen[0].flatten(0, 1)) @ logits)[:, 0]
    with measure_usage(model) as meter, torch.no_grad():
        model(**inputs)
    usage = meter.take()
    one = usage[f"{block}.self_attn.q_proj"]
    assert one.unused == list(range(1, experts))
    assert one.entropy < 0.01 < math.log(experts)
    said = describe_unused({f"{block}.self_attn.q_proj": one})
    assert said is not None
    assert said.startswith(f"{experts - 1} of {experts} experts are hardly used (most in {block}.self_attn.q_proj)")
    even = ExpertUsage(torch.full((4,), 0.25), torch.full((4,), 0.25), math.log(4))
    assert describe_unused({"q": one} | {f"q{number}": even for number in range(9)}) is None  # one of many is no news
    if experts == 2:  # both are chosen for every token: the load cannot tell
        assert one.load.tolist() == [0.5, 0.5]
        assert usage[f"{block}.self_attn.k_proj"].unused == []


def test_experts_that_serve_one_task_each_split_the_tasks_and_equal_loads_do_not():
    def usage(*load):
        return {"q": ExpertUsage(torch.tensor(load), torch.tensor(load), 0.0)}

    assert between_tasks({"a": usage(1.0, 0.0), "b": usage(0.0, 1.0)})["q"] == pytest.approx(math.log(2))
    assert between_tasks({"a": usage(0.3, 0.7), "b": usage(0.3, 0.7)})["q"] == pytest.approx(0, abs=1e-7)
    mixed = between_tasks({"a": usage(0.5, 0.5), "b": usage(1.0, 0.0)})["q"]
    by_hand = 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) + 0.5 * math.log(1 / 0.75)
    assert mixed == pytest.approx(by_hand)
