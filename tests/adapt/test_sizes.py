"""The size of an adapter is counted before it is made, and what no layer can use or no memory can hold is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model

from layerif.adapt.adapters import EqualLoraAdapter, LoraAdapter, LoraMoeAdapter
from layerif.adapt.module import AdapterModule
from layerif.adapt.sizes import adapted_shapes, num_parameters
from layerif.allocate.allocation import Allocation
from layerif.models.blocks import blocks
from layerif.models.pretrained import LocalModel
from tests.tiny import tiny_model

KINDS: Any = (LoraMoeAdapter, LoraAdapter, EqualLoraAdapter)


@pytest.fixture
def skeleton():
    with torch.device("meta"):
        return tiny_model("llama")


def spent(kind: Any, values: tuple[int, ...]) -> Allocation:
    names = tuple(f"model.layers.{index}" for index in range(3))
    return Allocation(names, "rank" if kind is LoraAdapter else "experts", values, sum(values))


@pytest.mark.parametrize("targets", [None, ["q_proj", "mlp.up_proj"]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_that_of_the_adapter(skeleton, kind, targets):
    adapter, allocation = kind(target_modules=targets), spent(kind, (1, 3, 2))
    shapes, capacities = adapted_shapes(skeleton, targets), adapter.capacities(skeleton, allocation)
    with torch.device("meta"):
        made = get_peft_model(skeleton, adapter.peft_config(skeleton, allocation))
    trained = [parameter.numel() for parameter in made.parameters() if parameter.requires_grad]
    assert num_parameters(shapes, capacities) == sum(trained)


@pytest.mark.parametrize(
    ("adapter", "values", "message"),
    [
        (
            LoraAdapter(),
            (8, 25, 8),
            r"a rank of 25 is .*layers\.1\.self_attn\.k_proj .* 24 outputs, so 24 is full",
        ),
        (LoraAdapter(), (333_333,) * 3, r"a rank of 333,333 .*; lower allocator\.budget, or name fewer layers"),
        (LoraMoeAdapter(r=100_000), (1, 1, 1), r"a rank of 100,000 .*; lower method\.r, or name fewer"),
        (EqualLoraAdapter(), (10**11,) * 3, r"a rank of 849,253,731,344 is more than model\.layers\.0\.self_attn"),
        (LoraMoeAdapter(), (10**11,) * 3, r"would have [\d,]+ parameters, whose training takes [\d,]+ GB .* 1e\+06 GB"),
        (LoraMoeAdapter(), (10**400,) * 3, r"would have about 10\^404 parameters"),
        (LoraAdapter(), (10**400,) * 3, r"a rank of about 10\^400 is more"),
    ],
)
def test_what_no_layer_can_use_and_no_memory_can_hold_is_refused_with_the_numbers(skeleton, adapter, values, message):
    with pytest.raises(ValueError, match=message):
        adapter.check_fits(skeleton, spent(adapter, values), free=1e15)
    assert list(blocks(skeleton)) == list(spent(adapter, values).units)  # nothing was put on it


def test_the_memory_is_that_of_weights_gradients_and_moments_in_float32(skeleton):
    adapter, allocation = LoraMoeAdapter(), spent(LoraMoeAdapter, (1, 3, 2))
    needed = 16 * num_parameters(adapted_shapes(skeleton, None), adapter.capacities(skeleton, allocation))
    with pytest.raises(ValueError, match=r"; lower method\.adapter\.r or method\.experts\.budget, or name fewer"):
        adapter.check_fits(
            skeleton, allocation, free=needed - 1, where="method.adapter", budget="method.experts.budget"
        )
    adapter.check_fits(skeleton, allocation, free=needed)


def test_full_rank_is_allowed(skeleton):
    LoraAdapter().check_fits(skeleton, spent(LoraAdapter, (24, 24, 24)), free=math.inf)


def test_scores_that_ask_for_more_than_full_rank_are_followed_and_told(model_folder):
    model = {"_target_": f"{LocalModel.__module__}.LocalModel", "path": str(model_folder)}
    module = AdapterModule(LoraAdapter(), model, spent(LoraAdapter, (1, 25, 1)))
    with pytest.warns(RuntimeWarning, match=r"a rank of 25 is more than model\.layers\.1\.self_attn\.k_proj can use"):
        module.configure_model()


def test_equal_ranks_need_a_layer_inside_the_blocks(skeleton):
    with pytest.raises(ValueError, match="names only layers outside the blocks"):
        EqualLoraAdapter(target_modules=["lm_head"]).check_fits(skeleton, spent(EqualLoraAdapter, (1, 1, 1)))
