"""Gates on a trained adapter: the model they interpolate, what they learn, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from layerif.blocks import layer_map
from layerif.gates import learn_gates
from layerif.layers import LayerMap
from layerif.loss import per_sample_loss
from layerif.moe import LoraMoeConfig
from tests.tiny import tiny_model

SETTINGS: dict[str, Any] = {"num_steps": 6, "learning_rate": 0.1, "start": 0.0}


def adapted(*, moe: bool = False, scale: float = 0.3):
    config = LoraMoeConfig(num_experts=2) if moe else LoraConfig(r=2, target_modules="all-linear")
    model: Any = get_peft_model(tiny_model("llama"), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".lora_B." in name or ".lora_moe_B." in name):
            parameter.data.normal_(std=scale)
    return model.eval()


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


BATCHES = [batch_of(seed) for seed in range(3)]


def layers_of(model) -> LayerMap:
    return layer_map(model, scope="all", skip_unsupported=True)


@pytest.mark.parametrize("moe", [False, True])
def test_a_step_follows_the_gradient_of_the_interpolated_loss(moe):
    """The adapter's own scaling, changed by a finite difference, gives the same slope."""
    model = adapted(moe=moe).double()
    scores = learn_gates(model, layers_of(model), BATCHES[:1], num_steps=1, learning_rate=1.0, start=0.3)
    gate = torch.tensor(0.3).sigmoid()

    def loss(block: int, shift: float) -> float:
        for number, layer in enumerate(model.get_base_model().model.layers):
            for module in layer.modules():
                if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                    original = 2.0 if moe else 4.0  # α/r: 16/8, and PEFT's 8/2
                    module.scaling["default"] = original * float(gate + shift * (number == block))
        with torch.no_grad():
            return float(per_sample_loss(model, BATCHES[0]).mean())

    # Attention and routers compute in float32: a smaller difference would be their rounding.
    slopes = [(loss(block, 3e-3) - loss(block, -3e-3)) / 6e-3 for block in range(3)]
    steps = torch.tensor(slopes) * gate * (1 - gate)
    assert bool((steps.abs() > 1e-4).all())
    torch.testing.assert_close(scores - 0.3, -steps, rtol=2e-2, atol=1e-6)


def test_a_block_without_change_keeps_its_gate_exactly():
    model = adapted()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and "layers.1." in name:
            parameter.data.zero_()
    scores = learn_gates(model, layers_of(model), BATCHES, **SETTINGS)
    assert (scores != 0).tolist() == [True, False, True]


def test_gates_are_a_function_of_the_seed_and_leave_the_model_as_it_was():
    model = adapted().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    first = learn_gates(model, layers_of(model), BATCHES, **SETTINGS, seed=1)
    assert torch.equal(first, learn_gates(model, layers_of(model), BATCHES, **SETTINGS, seed=1))
    assert not torch.equal(first, learn_gates(model, layers_of(model), BATCHES, **SETTINGS, seed=2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained
    assert model.training


def test_an_adapter_that_changes_nothing_is_refused():
    model = adapted(scale=0.0)
    with pytest.raises(ValueError, match=r"changes nothing.*train it first"):
        learn_gates(model, layers_of(model), BATCHES, **SETTINGS)
    bare = tiny_model("llama")
    with pytest.raises(ValueError, match=r"changes nothing.*train it first"):
        learn_gates(bare, layers_of(bare), BATCHES, **SETTINGS)
