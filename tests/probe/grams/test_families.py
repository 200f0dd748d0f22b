"""Grams of families with Conv1D, hybrid blocks, text decoders and fused experts, against a batch-1 autograd loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerif.models.blocks import layer_map
from layerif.models.loss import per_sample_loss
from layerif.probe.grams.measure import measure
from tests.families import TOLERANCES, WITH_EXPERTS, each_family, model_of, separated
from tests.probe.grams.test_measure import NUM_TRAIN, assert_equal, batch, batched, samples

pytestmark = pytest.mark.usefixtures("softmax_in_the_models_dtype", "all_in_the_models_dtype")


def grams_of(model: Any, side: str = "left", size: int = 3):
    rows, layers = samples(), layer_map(model, scope="all")
    return measure(model, layers, batched(rows[:NUM_TRAIN], size, side), batched(rows[NUM_TRAIN:], size, side))


@pytest.mark.parametrize("family", each_family())
def test_equals_an_autograd_loop_over_the_same_model_with_separate_linear_layers(family):
    model, tolerance = model_of(family).double(), TOLERANCES.get(family, 1e-8)
    grams, reference = grams_of(model), separated(model)
    gradients: dict[str, list[torch.Tensor]] = {param: [] for param in grams.grams}
    for row in samples():
        reference.zero_grad()
        loss = per_sample_loss(reference, batch([row]))
        torch.testing.assert_close(loss, per_sample_loss(model, batch([row])), rtol=tolerance, atol=0)
        loss.sum().backward()
        for param, rows in gradients.items():
            weight = reference.get_parameter(param)
            rows.append((torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten().clone())
    for param, rows in gradients.items():
        train_NP, val_MP = torch.stack(rows[:NUM_TRAIN]), torch.stack(rows[NUM_TRAIN:])
        gram = grams.grams[param]
        torch.testing.assert_close(gram.train_train, train_NP @ train_NP.T, rtol=tolerance, atol=1e-14)
        torch.testing.assert_close(gram.val_train, val_MP @ train_NP.T, rtol=tolerance, atol=1e-14)
        torch.testing.assert_close(gram.val_norms, val_MP.norm(dim=1), rtol=tolerance, atol=1e-14)
        assert gram.numel == train_NP.shape[1]


@pytest.mark.parametrize("family", each_family())
def test_batch_size_and_padding_side_change_nothing_and_the_model_stays_as_it_was(family):
    model = model_of(family).double()
    forwards = {name: module.forward for name, module in model.named_modules()}
    assert_equal(grams_of(model, side="right", size=7), grams_of(model, size=1), TOLERANCES.get(family, 1e-8))
    assert all(module.forward == forwards[name] for name, module in model.named_modules())


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_every_expert_is_a_matrix_of_its_own(family):
    model = model_of(family)
    found = [param for param in layer_map(model, scope="all").matrices if ".experts." in param]
    fused = [parameter for name, parameter in model.named_parameters() if ".experts." in name and parameter.ndim == 3]
    assert len(found) == sum(len(each) for each in fused)
