"""Swaps of levels keep the budget to the weight, never raise the KL, and end the same when they were interrupted."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from layerif.allocate.allocation import Allocation
from layerif.models.blocks import blocks, linears
from layerif.pruning import Pruner
from layerif.pruning import refine as module
from layerif.pruning.levels import Levels
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.module import given_allocation
from layerif.pruning.refine import Refinement, refined
from layerif.pruning.sparsegpt import SparseGPT
from layerif.pruning.targets import matrices, targets
from layerif.pruning.walk import Walk
from layerif.pruning.wanda import Wanda
from tests.damage import flip
from tests.pruning.test_walk import weights, windows
from tests.tiny import tiny_model

PRUNERS: dict[str, Pruner] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "swaps": Wanda(swaps=True, most_swaps=2),
    "sparsegpt": SparseGPT(),
    "n:4": Wanda(m=4),
}


def start(model: nn.Module, sparsity: float = 0.5) -> Allocation:
    return given_allocation(dict.fromkeys(blocks(model), sparsity), model)


def search(model: nn.Module, pruner: Pruner, forwards: int = 12, step: float = 0.2, **options) -> Refinement:
    levels = Levels(model, pruner, windows())
    return refined(model, levels, start(model), windows(), forwards=forwards, step=step, **options)


def kl(model: nn.Module, pruner: Pruner, by_name: dict[str, float]) -> float:
    """KL(dense ‖ pruned) from whole forwards, in float64, with the model pruned by the inputs of the dense one."""
    levels, counts = Levels(model, pruner, windows()), {}
    for block, aims in targets(model, by_name, pruner).items():
        for name, aim in aims.items():
            removed = aim.sparsity if aim.n is None else 1 - aim.n / (pruner.m or 1)
            counts[f"{block}.{name}"] = round((removed or 0) * matrices(model)[f"{block}.{name}"].weight.numel())
    with torch.no_grad():
        dense = torch.cat([model(input_ids=batch).logits for batch in windows()])
        for name, count in counts.items():
            matrices(model)[name].weight.copy_(levels(name, count))
        pruned = torch.cat([model(input_ids=batch).logits for batch in windows()])
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (dense, pruned))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in PRUNERS), ("gemma2", "wanda"), ("opt", "wanda"), ("opt", "n:4")]
)
def test_the_budget_is_exact_and_the_kl_falls_as_stated(family, name):
    pruner, model = PRUNERS[name], tiny_model(family)
    found = search(model, pruner)
    assert (found.tried, found.seconds > 0) == (12, True)
    assert 0 < found.accepted < 12
    assert found.kl < found.kl_before
    sizes = [linear.weight.numel() for linear in matrices(model).values()]
    assert found.allocation.units == tuple(matrices(model))
    removed = [value * size for value, size in zip(found.allocation.values, sizes, strict=True)]
    assert sum(map(round, removed)) * 2 == sum(sizes)
    assert removed == pytest.approx(list(map(round, removed)), abs=1e-9)
    first, last = start(model).by_name(), found.allocation.by_name()
    assert found.kl_before == pytest.approx(kl(tiny_model(family), pruner, first), rel=1e-4)
    assert found.kl == pytest.approx(kl(tiny_model(family), pruner, last), rel=1e-4)
    if name == "n:4":
        assert {value * 4 for value in found.allocation.values} <= {0, 1, 2, 3}


def test_more_candidates_never_raise_the_kl_and_each_moves_weights_between_two_matrices():
    found = [search(tiny_model(), Wanda(), forwards) for forwards in range(1, 16)]
    assert all(after.kl <= before.kl for before, after in pairwise(found))
    for before, after in pairwise(found):
        values = zip(before.allocation.values, after.allocation.values, after.allocation.sizes or (), strict=True)
        changed = [(new - old) * size for old, new, size in values if old != new]
        assert len(changed) == (2 if after.accepted > before.accepted else 0)
        assert sum(changed) == pytest.approx(0, abs=1e-6)
    assert search(tiny_model(), Wanda(), 15, seed=1).allocation != found[-1].allocation


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_what_is_not_calculated_again_changes_nothing(monkeypatch, family):
    found, forwards = search(tiny_model(family), Wanda()), []

    def whole(self, changed=(), *, below=float("inf")):
        forwards.append(changed)
        return calculated(self)

    calculated = module._Distance.__call__
    monkeypatch.setattr(module._Distance, "__call__", whole)
    assert same(search(tiny_model(family), Wanda()), found)
    assert len(forwards) == 13


def test_floor_and_cap_hold():
    found = search(tiny_model(), Magnitude(), 40, floor=0.4, cap=0.55, step=0.05)
    assert found.accepted
    assert min(found.allocation.values) >= 0.4 - 1e-9
    assert max(found.allocation.values) <= 0.55 + 1e-9
    for floor, cap, step in ((0.5, 0.95, 0.2), (0.0, 0.5, 0.2), (0.0, 0.95, 0.9)):
        with pytest.raises(ValueError, match="no two matrices can exchange"):
            search(tiny_model(), Magnitude(), floor=floor, cap=cap, step=step)


def same(one: Refinement, other: Refinement) -> bool:
    def plain(found: Refinement):
        return found.allocation, found.kl_before, found.kl, found.tried, found.accepted

    return plain(one) == plain(other)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, name):
    whole = search(tiny_model(), PRUNERS[name])
    state, model, tried = tmp_path / "state.json", tiny_model(), module._tried
    dense = weights(model)

    def die(*arguments):
        found = tried(*arguments)
        if json.loads(state.read_text())["tried"] == 6:
            raise KeyboardInterrupt
        return found

    search(tiny_model(), PRUNERS[name], 3, state=state)
    monkeypatch.setattr(module, "_tried", die)
    with pytest.raises(KeyboardInterrupt):
        search(model, PRUNERS[name], state=state)
    assert all(torch.equal(value, dense[key]) for key, value in weights(model).items())
    monkeypatch.setattr(module, "_tried", tried)
    seconds = json.loads(state.read_text())["seconds"]
    resumed = search(tiny_model(), PRUNERS[name], state=state)
    assert same(resumed, whole)
    assert resumed.seconds > seconds
    again = search(tiny_model(), PRUNERS[name], state=state)
    assert same(again, whole)
    assert again.seconds == resumed.seconds


@pytest.mark.parametrize("other", [{"seed": 1}, {"cap": 0.8}, {"model": 1}])
def test_the_state_of_another_search_is_not_taken_over(tmp_path, other):
    state = tmp_path / "state.json"
    search(tiny_model(), Magnitude(), 4, state=state)
    model = tiny_model(seed=other.pop("model", 0))
    found = search(model, Magnitude(), 6, state=state, **other)
    assert same(found, search(model, Magnitude(), 6, **other))
    assert json.loads(state.read_text())["tried"] == 6


@pytest.mark.parametrize("damage", ["a bit", "half", "another shape"])
def test_a_damaged_state_is_said_and_the_search_begins_anew(tmp_path, damage):
    state = tmp_path / "state.json"
    expected = search(tiny_model(), Magnitude(), 4, state=state)
    if damage == "a bit":
        flip(state, 200)
    else:
        state.write_text("[1]" if damage == "another shape" else state.read_text()[:100])
    with pytest.warns(UserWarning, match=r"state\.json is damaged and the search begins anew"):
        assert same(search(tiny_model(), Magnitude(), 4, state=state), expected)


def test_the_model_comes_back_dense_and_in_its_mode():
    model = tiny_model("gemma2").train()
    dense = weights(model)
    assert search(model, SparseGPT()).accepted
    assert all(torch.equal(value, dense[key]) for key, value in weights(model).items())
    assert all(each.training for each in model.modules())
    assert not any("forward" in vars(block) for block in blocks(model).values())


@pytest.mark.parametrize("pruner", [Wanda(), SparseGPT(), Wanda(m=4)], ids=["wanda", "sparsegpt", "n:4"])
def test_levels_are_the_pruners_own_by_dense_inputs(pruner):
    model, seen = tiny_model().double(), {}
    levels = Levels(model, pruner, windows())
    hooks = [linear.register_forward_pre_hook(_keep(seen, name)) for name, linear in matrices(model).items()]
    with torch.no_grad():
        for batch in windows():
            model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, linear in matrices(model).items():
        shared = pruner.prepare(pruner.observe(None, torch.cat(seen[name])), 3, name=name)
        for quarters in range(4):
            found = levels(name, quarters * linear.weight.numel() // 4)
            n, sparsity = (None, quarters / 4) if pruner.m is None else (4 - quarters, None)
            expected = pruner(linear.weight, shared, sparsity, n) if quarters else linear.weight
            torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-9)
            assert torch.equal(found == 0, expected == 0)
            assert int((found == 0).sum()) * 4 == quarters * found.numel()


def _keep(seen: dict[str, list[Tensor]], name: str):
    return lambda module, given: seen.setdefault(name, []).append(given[0].flatten(0, -2))


def test_the_first_block_is_pruned_as_the_walk_prunes_it():
    model, pruner = tiny_model(), SparseGPT()
    levels = Levels(model, pruner, windows())
    walk = Walk(model, pruner, targets(model, dict.fromkeys(blocks(model), 0.5), pruner), windows(), None)
    walk(0)
    name, block = next(iter(blocks(model).items()))
    for inside, linear in linears(block):
        assert torch.equal(levels(f"{name}.{inside}", linear.weight.numel() // 2), linear.weight)


def test_what_does_not_fit_in_memory_is_refused_by_its_bytes(monkeypatch):
    model = tiny_model()
    size = sum(linear.weight.nbytes for linear in matrices(model).values())
    levels = Levels(model, SparseGPT(), windows())
    statistics = sum(each[0].nbytes + each[1].nbytes for each in levels._shared.values())
    weights_take = f"the dense weights take {size:,} bytes, and half of the free memory is {size - 1:,}"
    statistics_take = (
        f"the statistics of SparseGPT for all matrices take {statistics:,} bytes.* use pruner=wanda without"
    )
    for free, message in (([2 * size - 1], weights_take), ([2 * statistics - 1, 2 * size], statistics_take)):
        monkeypatch.setattr("layerif.pruning.levels.free_bytes", lambda device, free=free: free.pop())
        with pytest.raises(ValueError, match=message):
            Levels(model, SparseGPT(), windows())
    predictions = 3 * 40 * 256 * 4
    monkeypatch.setattr("layerif.pruning.levels.free_bytes", lambda device: 2 * predictions - 1)
    with pytest.raises(ValueError, match=f"predictions of 120 tokens take {predictions:,} bytes.* use fewer windows"):
        refined(model, levels, start(model), windows(), forwards=1)


def test_bad_settings_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"removes the same share from every matrix; use pruner\.n=null"):
        Levels(model, Wanda(n=2, m=4), windows())
    levels = Levels(model, Magnitude(), [])
    experts = Allocation(tuple(blocks(model)), "experts", (1, 1, 1), 3)
    with pytest.raises(ValueError, match="an allocation of experts cannot be refined"):
        refined(model, levels, experts, windows(), forwards=1)
    for setting in ({"forwards": 0}, {"step": 1.0}, {"floor": -0.1}, {"cap": 1.0}):
        with pytest.raises(ValueError, match=r"refined\.\w+=.* is not allowed"):
            refined(model, levels, start(model), windows(), **{"forwards": 1, **setting})
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="predictions of the pruned model are not finite"):
        refined(model, levels, start(model), windows(), forwards=1)
