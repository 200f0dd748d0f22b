"""Trials find what pruning for good would find, and leave no bit of the model changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerif.models.blocks import blocks, linears
from layerif.pruning import Pruner
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.sparsegpt import SparseGPT
from layerif.pruning.targets import targets
from layerif.pruning.trials import least_loss, loss_by_block, mean_token_loss
from layerif.pruning.walk import Walk
from layerif.pruning.wanda import Wanda
from tests.tiny import VOCAB_SIZE, tiny_model

PRUNERS = [Magnitude(), Wanda(), SparseGPT(block_size=16)]
every_pruner = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: type(pruner).__name__)


def windows(length: int = 40) -> list[torch.Tensor]:
    return list(torch.randint(VOCAB_SIZE, (3, length), generator=torch.Generator().manual_seed(0)).split([2, 1]))


def pruned(model: nn.Module, pruner: Pruner, allocation: dict[str, float]) -> nn.Module:
    """Prunes a copy for good."""
    model = copy.deepcopy(model)
    walk = Walk(model, pruner, targets(model, allocation, pruner), windows() if pruner.needs_inputs else [], None)
    for index in range(len(walk.blocks)):
        walk(index)
    return model


def loss_of(model: nn.Module) -> float:
    """Computes the mean token loss window by window."""
    losses = []
    with torch.no_grad():
        for window in torch.cat(windows()):
            logits = model(input_ids=window[None]).logits[0, :-1]
            losses.append(float(F.cross_entropy(logits.double(), window[1:])))
    return sum(losses) / len(losses)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_loss_is_the_mean_over_tokens_whatever_the_batches():
    model = tiny_model()
    assert mean_token_loss(model, windows()) == pytest.approx(loss_of(model), rel=1e-5)
    assert mean_token_loss(model, [torch.cat(windows())]) == pytest.approx(loss_of(model), rel=1e-5)


@every_pruner
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_candidate_has_the_loss_of_pruning_for_good_and_the_least_is_found(family, pruner):
    model = tiny_model(family).train()
    before, names = state(model), list(blocks(model))
    candidates = [dict(zip(names, values, strict=True)) for values in ((0.5,) * 3, (0.2, 0.5, 0.8), (0.9, 0.5, 0.1))]
    best, losses = least_loss(model, pruner, candidates, windows())
    expected = [loss_of(pruned(model.eval(), pruner, candidate)) for candidate in candidates]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert best == expected.index(min(expected))
    assert len(set(losses)) == 3
    assert is_unchanged(model, before)


def test_the_first_of_equal_candidates_is_taken():
    model = tiny_model()
    alike = dict.fromkeys(blocks(model), 0.5)
    best, losses = least_loss(model, Wanda(), [alike, alike], windows())
    assert (best, losses[0]) == (0, losses[1])


def test_training_mode_and_gradients_are_left_alone():
    model = tiny_model().train()
    least_loss(model, Wanda(), [dict.fromkeys(blocks(model), 0.5)], windows())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_after_an_error_the_model_is_as_it_was():
    model = tiny_model()
    before = state(model)

    class Failing(Wanda):
        def prepare(self, statistic, num_windows, *, name):
            if "layers.1" in name:
                raise RuntimeError("in the second block")
            return super().prepare(statistic, num_windows, name=name)

    with pytest.raises(RuntimeError, match="second block"):
        least_loss(model, Failing(), [dict.fromkeys(blocks(model), 0.5)], windows())
    assert is_unchanged(model, before)
    with pytest.raises(RuntimeError, match="second block"):
        loss_by_block(model, Failing(), [0.5], windows())
    assert is_unchanged(model, before)


def test_candidates_that_cannot_be_are_refused_before_any_work():
    model = tiny_model()
    with pytest.raises(ValueError, match="at least one candidate"):
        least_loss(model, Wanda(), [], windows())
    with pytest.raises(ValueError, match=r"'model\.layers\.9', which holds no linear layer"):
        least_loss(model, Wanda(), [{"model.layers.9": 0.5}], windows())
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="none of 1 candidates has a finite loss"):
        least_loss(model, Wanda(), [dict.fromkeys(blocks(model), 0.5)], windows())


@every_pruner
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_rise_of_each_block_is_that_of_pruning_it_alone_from_dense_inputs(family, pruner):
    model = tiny_model(family)
    before, levels = state(model), [0.0, 0.3, 0.8]
    rises_LK = loss_by_block(model, pruner, levels, windows())
    assert rises_LK.shape == (3, 3)
    assert not rises_LK[:, 0].any()
    dense = loss_of(model)
    for l, name in enumerate(blocks(model)):
        for k, level in enumerate(levels):
            alone = pruned(model, pruner, {**dict.fromkeys(blocks(model), 0.0), name: level})
            zeros = [int((linear.weight == 0).sum()) for _, linear in linears(blocks(alone)[name])]
            assert bool(sum(zeros)) == (level > 0)
            assert float(rises_LK[l, k]) == pytest.approx(loss_of(alone) - dense, abs=2e-5)
    assert is_unchanged(model, before)


def test_blocks_are_pruned_one_at_a_time_with_n_of_m_too():
    model = tiny_model()
    of_any_n = loss_by_block(model, Wanda(m=4), [0.25, 0.5], windows())
    of_two = loss_by_block(model, Wanda(n=2, m=4), [0.5], windows())
    assert torch.equal(of_any_n[:, 1:], of_two)
    assert bool((of_any_n[:, 0] != of_any_n[:, 1]).all())
