"""Conv1D, hybrids, text decoders and fused experts are pruned as the same models with linear layers alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerif.models.blocks import blocks
from layerif.models.pretrained import auto_class
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.sparsegpt import SparseGPT
from layerif.pruning.targets import matrices, targets
from layerif.pruning.wanda import Wanda
from tests.families import each_family, model_of, separated
from tests.pruning.test_walk import walked, weights, windows

PRUNERS = [Magnitude(), Wanda(), SparseGPT(block_size=16)]


@pytest.mark.parametrize("family", each_family())
def test_every_matrix_is_pruned_as_a_linear_layer_of_its_own_and_the_layout_stays(tmp_path, family):
    model, pruner = model_of(family), Wanda()
    layout = {name: (each.shape, each.dtype) for name, each in model.state_dict().items()}
    reference = matrices(walked(separated(model), pruner, tmp_path / "separated"))
    walked(model, pruner, tmp_path / "blocks")
    assert {name: (each.shape, each.dtype) for name, each in model.state_dict().items()} == layout
    found = matrices(model)
    assert found.keys() == reference.keys()
    for name, linear in reference.items():
        torch.testing.assert_close(found[name].weight, linear.weight, rtol=1e-5, atol=1e-6)
        assert 0.3 < float((found[name].weight == 0).float().mean()) < 0.7, name
    model.save_pretrained(tmp_path / "model")
    again = auto_class(model.config).from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    for name, value in weights(model).items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("pruner", [Magnitude(), SparseGPT(block_size=16), Wanda(n=2, m=4)], ids=lambda one: one.called)
def test_other_pruners_take_experts_one_by_one(tmp_path, pruner):
    model = model_of("gpt_oss")
    allocation = dict.fromkeys(blocks(model), 0.5)
    reference = separated(model)
    for each, folder in ((model, "fused"), (reference, "separated")):
        from layerif.pruning.walk import Walk

        walk = Walk(each, pruner, targets(each, allocation, pruner), windows(), tmp_path / folder)
        for index in range(len(walk.blocks)):
            walk(index)
    for name, linear in matrices(reference).items():
        torch.testing.assert_close(matrices(model)[name].weight, linear.weight, rtol=1e-4, atol=1e-5)


def test_a_killed_walk_over_experts_ends_with_the_same_bits(tmp_path):
    whole = weights(walked(model_of("gpt_oss"), Wanda(), tmp_path / "whole"))
    walked(model_of("gpt_oss"), Wanda(), tmp_path / "killed", num_blocks=1)
    found = weights(walked(model_of("gpt_oss"), Wanda(), tmp_path / "killed"))
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_experts_in_an_unknown_layout_are_refused_and_the_rest_is_pruned_when_asked():
    model = model_of("gpt2")
    unknown = nn.Module()
    unknown.experts = nn.Parameter(torch.zeros(2, 3, 4))  # type: ignore[assignment]
    model.transformer.h[1].add_module("unknown", unknown)
    allocation = dict.fromkeys(blocks(model), 0.5)
    with pytest.raises(ValueError, match=r"h\.1\.unknown\.experts \(2, 3, 4\) .* pruner\.skip_unsupported=true"):
        targets(model, allocation, Wanda())
    assert len(targets(model, allocation, Wanda(skip_unsupported=True))["transformer.h.1"]) == 4
