"""Leaving out experts: the rest computes what it did with those out of reach, and transformers loads it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerif.compress.drop import check_droppable, drop, without
from layerif.models.blocks import layer_map
from layerif.models.pretrained import auto_class
from tests.families import WITH_EXPERTS, each_family, model_of

IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
WITHOUT_GROUPS = each_family(family for family in WITH_EXPERTS if family != "deepseek_v3")


def experts_of(model: nn.Module) -> dict[str, list[str]]:
    """The experts of the model, by the module that holds them."""
    found: dict[str, list[str]] = {}
    for name in layer_map(model, scope="all").each_expert.names:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def out_of_reach(model, experts: list[str]):
    """Lets every router see experts as the worst."""
    hooks = []
    for name in experts:
        holder, _, number = name.rpartition(".")
        around = model.get_submodule(holder.rpartition(".")[0])
        router = around.gate if hasattr(around, "gate") else around.router
        bias = torch.zeros(4)
        bias[int(number)] = -1e9
        linear = nn.functional.linear

        def forward(given, router=router, bias=bias, linear=linear):
            def shifted(values, weight, own=None):
                return linear(values, weight, own) + bias if weight is router.weight else linear(values, weight, own)

            nn.functional.linear = shifted
            try:
                return type(router).forward(router, given)
            finally:
                nn.functional.linear = linear

        router.forward = forward
        hooks.append(router)
    found = logits(model)
    for router in hooks:
        del router.forward
    return found


@pytest.mark.parametrize("family", WITHOUT_GROUPS)
def test_what_is_left_is_the_model_whose_routers_never_choose_what_went(tmp_path, family):
    model = model_of(family)
    gone = [names[number % 4] for number, names in enumerate(experts_of(model).values(), 1)]
    before, expected = logits(model), out_of_reach(model, gone)
    with without(model, gone):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), before)
    check_droppable(model, gone)
    drop(model, gone)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert {len(names) for names in experts_of(model).values()} == {3}
    model.save_pretrained(tmp_path)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    again = auto_class(model.config).from_pretrained(tmp_path, **eager).eval()
    assert torch.equal(logits(again), logits(model))


def test_what_cannot_be_left_out_is_refused_in_a_sentence():
    model = model_of("mixtral")
    first, second = experts_of(model).values()
    with pytest.raises(ValueError, match=r"would keep 3 to 4 experts, and a configuration has one number for all"):
        drop(model, first[:1])
    with pytest.raises(ValueError, match=r"sent to 2 experts .* 1 would be left; use allocator\.keep>=2"):
        drop(model, [*first[:3], *second[:3]])
    with pytest.raises(ValueError, match=r"experts\.4' is not one of the 8 experts .*did you mean"):
        drop(model, [first[0].replace("experts.0", "experts.4")])
    with pytest.raises(ValueError, match="experts cannot be left out together with other units"):
        drop(model, [first[0], "model.layers.1"])
    with pytest.raises(ValueError, match=r"deepseek_v3 model choose among 2 groups of experts"):
        drop(model_of("deepseek_v3"), [names[0] for names in experts_of(model_of("deepseek_v3")).values()])
