"""Gates on a trained adapter: the model they interpolate, what they learn, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from layerif.data.batches import Encoded, collate
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.models.loss import per_sample_loss
from layerif.moe import LoraMoeConfig
from layerif.probe import gates
from layerif.probe.gates import learn_gates
from tests.tiny import tiny_model

SETTINGS: dict[str, Any] = {"num_steps": 6, "samples_per_step": 3, "learning_rate": 0.1, "start": 0.0}


def adapted(*, moe: bool = False, scale: float = 0.3):
    config = LoraMoeConfig(num_experts=2) if moe else LoraConfig(r=2, target_modules="all-linear")
    model: Any = get_peft_model(tiny_model("llama"), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".lora_B." in name or ".lora_moe_B." in name):
            parameter.data.normal_(std=scale)
    return model.eval()


def samples() -> list[Encoded]:
    """Makes samples of several lengths, some with a prompt that does not count."""
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 4, 9, 5, 7, 3, 8, 6)
    rows = [tuple(torch.randint(3, 64, (length,), generator=generator).tolist()) for length in lengths]
    return [Encoded(row, 2, loss_from=2 * (number % 2)) for number, row in enumerate(rows)]


SAMPLES = samples()


def layers_of(model) -> LayerMap:
    return layer_map(model, scope="all", skip_unsupported=True)


@pytest.mark.parametrize("moe", [False, True])
def test_a_step_follows_the_gradient_of_the_interpolated_loss(moe):
    """The adapter's own scaling, changed by a finite difference, gives the same slope."""
    model = adapted(moe=moe).double()
    one_step: dict[str, Any] = {"num_steps": 1, "samples_per_step": 99, "learning_rate": 1.0, "start": 0.3}
    scores = learn_gates(model, layers_of(model), SAMPLES, **one_step)
    gate = torch.tensor(0.3).sigmoid()

    def loss(block: int, shift: float) -> float:
        for number, layer in enumerate(model.get_base_model().model.layers):
            for module in layer.modules():
                if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                    original = 2.0 if moe else 4.0  # α/r: 16/8, and PEFT's 8/2
                    module.scaling["default"] = original * float(gate + shift * (number == block))
        with torch.no_grad():
            return float(per_sample_loss(model, collate(SAMPLES, 0)).mean())

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
    scores = learn_gates(model, layers_of(model), SAMPLES, **SETTINGS)
    assert (scores != 0).tolist() == [True, False, True]


def test_gates_are_a_function_of_the_seed_and_leave_the_model_as_it_was():
    model = adapted().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    first = learn_gates(model, layers_of(model), SAMPLES, **SETTINGS, seed=1)
    assert torch.equal(first, learn_gates(model, layers_of(model), SAMPLES, **SETTINGS, seed=1))
    assert not torch.equal(first, learn_gates(model, layers_of(model), SAMPLES, **SETTINGS, seed=2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained
    assert model.training


def test_what_fits_the_memory_at_once_changes_no_gate():
    model = adapted()
    alone = learn_gates(model, layers_of(model), SAMPLES, **SETTINGS, batch_size=1)
    assert bool((alone != 0).all())
    for options in ({"batch_size": 2}, {"batch_size": 8}, {"batch_size": 8, "pad_id": 7}):
        together = learn_gates(model, layers_of(model), SAMPLES, **SETTINGS, **options)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_every_sample_is_seen_once_a_round(monkeypatch):
    model, seen = adapted(), []
    loss = gates.per_sample_loss
    monkeypatch.setattr(gates, "per_sample_loss", lambda model, batch: seen.append(batch) or loss(model, batch))
    options = {**SETTINGS, "num_steps": 4, "samples_per_step": 2}
    learn_gates(model, layers_of(model), SAMPLES, **options)
    lengths = sorted(int(row.sum()) for batch in seen for row in batch["attention_mask"])
    assert lengths == sorted(map(len, SAMPLES))


def test_an_adapter_that_changes_nothing_is_refused():
    model = adapted(scale=0.0)
    with pytest.raises(ValueError, match=r"changes nothing.*train it first"):
        learn_gates(model, layers_of(model), SAMPLES, **SETTINGS)


@pytest.mark.parametrize("config", [None, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")])
def test_an_adapter_of_no_layer_is_refused(config):
    model: Any = tiny_model("llama")
    layers = layers_of(model)
    with pytest.raises(ValueError, match=r"no layer of any block.*nothing to gate"):
        learn_gates(get_peft_model(model, config) if config else model, layers, SAMPLES, **SETTINGS)
