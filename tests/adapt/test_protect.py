"""SPIDER's update and score equal their dense definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from layerif.adapt.protect import Protection
from layerif.estimators.spider import Spider
from layerif.models.blocks import blocks
from layerif.models.loss import per_sample_loss
from layerif.probe.update_masks import importance, update_mask
from tests.tiny import tiny_model


def dense_importance(values: torch.Tensor) -> list[float]:
    sizes = [abs(value) for value in values.flatten().tolist()]
    if len({*sizes}) == 1:
        return [0.5 if sizes[0] else 0.0] * len(sizes)
    mean = sum(sizes) / len(sizes)
    spread = math.sqrt(sum((size - mean) ** 2 for size in sizes) / (len(sizes) - 1))
    return [1 / (1 + math.exp(-(size - mean) / spread)) for size in sizes]


def dense_mask(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    pairs = zip(dense_importance(weight), dense_importance(gradient), strict=True)
    mask = [task / (before + task) if task > before else 0.0 for before, task in pairs]
    positive = [value for value in mask if value > 0]
    scaled = [min(1.0, value * len(positive) / sum(positive)) if positive else 0.0 for value in mask]
    return torch.tensor(scaled, dtype=torch.float64).view_as(weight)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("weight", "gradient"),
    [
        (drawn(5, 7, seed=1), drawn(5, 7, seed=2)),
        (drawn(5, 7, seed=1), torch.zeros(5, 7).double()),
        (torch.ones(6).double(), drawn(6, seed=3)),
        (torch.ones(6).double(), torch.ones(6).double()),
        (torch.zeros(6).double(), drawn(6, seed=3)),
        (drawn(1, seed=1), drawn(1, seed=2)),
    ],
)
def test_the_mask_is_its_definition(weight, gradient):
    torch.testing.assert_close(importance(weight).flatten().tolist(), dense_importance(weight))
    found = update_mask(weight, gradient)
    torch.testing.assert_close(found, dense_mask(weight, gradient))
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    torch.testing.assert_close(update_mask(3 * weight, -0.2 * gradient), found)


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_training_equals_its_dense_definition_step_by_step():
    model = tiny_model().double().requires_grad_(False)
    weights = dict(blocks(model)["model.layers.1"].named_parameters())
    for weight in weights.values():
        weight.requires_grad_()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    summed = {name: torch.zeros_like(weight) for name, weight in before.items()}
    plain = torch.optim.AdamW([weight.clone().requires_grad_() for weight in before.values()], lr=0.01)
    mixed = torch.optim.AdamW(weights.values(), lr=0.01)
    Protection(model).follow(mixed)
    for step in range(4):
        mixed.zero_grad()
        per_sample_loss(model, batch_of(step)).mean().backward()
        expected = dict(zip(weights, plain.param_groups[0]["params"], strict=True))
        for name, weight in weights.items():
            assert weight.grad is not None
            expected[name].grad = weight.grad.clone()
            summed[name] += weight.grad
        mixed.step()
        plain.step()
        for name, weight in weights.items():
            mask = dense_mask(before[name], summed[name])
            with torch.no_grad():
                expected[name].copy_((1 - mask) * before[name] + mask * expected[name])
            torch.testing.assert_close(weight.detach(), expected[name].detach(), rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(weight, before[name]) for name, weight in weights.items())


def test_a_protection_takes_up_the_gradients_of_another_one():
    model = tiny_model()
    first, second = Protection(model), Protection(model)
    per_sample_loss(model, batch_of(0)).mean().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first.follow(optimizer)
    optimizer.step()
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert any(bool(value.any()) for value in second.state_dict().values())


@pytest.mark.usefixtures("softmax_in_the_models_dtype")
def test_the_score_is_the_mean_of_the_mask_with_the_mean_gradient(decider):
    decider = replace(decider, model=replace(decider.model, dtype="float64"), estimator=Spider())
    scored, _ = decider.scored()
    model = decider.model.load()
    train = decider.samples()[0]
    losses = []
    for sample in train:
        ids = torch.tensor([sample.input_ids])
        losses.append(per_sample_loss(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}))
    torch.cat(losses).mean().backward()
    layers = decider.layers()
    for block, params, value in zip(layers.names, layers.params, scored.scores.values, strict=True):
        masks = [
            dense_mask(model.get_parameter(param).detach(), model.get_parameter(param).grad).flatten()
            for param in params
        ]
        assert value == pytest.approx(float(torch.cat(masks).mean()), rel=1e-6), block
    assert scored.scores.higher_means == "undertrained"
    assert scored.num_samples == (len(train), 0)


def test_a_mask_is_of_weights_and_not_of_an_adapter(decider):
    adapted = replace(decider, estimator=Spider(), probe=replace(decider.probe, parameters="lora"))
    with pytest.raises(
        ValueError, match=r"^estimator=spider compares gradients with pretrained weights, .*; use probe"
    ):
        adapted.check()
