"""The greedy search takes the best of all at every step, and leaves the model as it was."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from layerif.compress import greedy as search
from layerif.compress.drop import without
from layerif.compress.greedy import greedy
from layerif.models.blocks import blocks
from layerif.pruning.trials import mean_token_loss
from tests.tiny import tiny_model

WINDOWS = [torch.randint(3, 256, (2, 20), generator=torch.Generator().manual_seed(1))]


def test_each_step_is_the_best_by_brute_force(tmp_path):
    model = tiny_model("llama", num_hidden_layers=5)
    names, before = list(blocks(model)), mean_token_loss(model, WINDOWS)
    found = greedy(model, names, 3, WINDOWS, state=tmp_path / "state.json")
    assert found.dense == before == mean_token_loss(model, WINDOWS)
    gone: list[str] = []
    for unit, loss in zip(found.dropped, found.losses, strict=True):
        losses = {}
        for other in names:
            if other not in gone:
                with without(model, [*gone, other]):
                    losses[other] = mean_token_loss(model, WINDOWS)
        assert loss == min(losses.values()) == losses[unit]
        gone.append(unit)
    pairs = {}
    for pair in combinations(names, 1):
        with without(model, pair):
            pairs[pair] = mean_token_loss(model, WINDOWS)
    assert found.losses[0] == min(pairs.values())


def test_a_search_carries_on_and_a_longer_one_begins_where_it_ended(tmp_path, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=4)
    names = list(blocks(model))
    whole = greedy(model, names, 3, WINDOWS)
    state = tmp_path / "state.json"
    first = greedy(model, names, 2, WINDOWS, state=state)
    assert first.dropped == whole.dropped[:2]
    calls: list[int] = []
    real = search.mean_token_loss
    monkeypatch.setattr(search, "mean_token_loss", lambda *given: (calls.append(1), real(*given))[1])
    assert greedy(model, names, 3, WINDOWS, state=state).losses == whole.losses
    assert len(calls) == 2  # the units that are left
    assert greedy(model, names, 1, WINDOWS, state=state).dropped == whole.dropped[:1]
    assert len(calls) == 2
    other = [WINDOWS[0] + 1 - (WINDOWS[0] == 255).long()]
    assert greedy(model, names, 1, other, state=state).dense != whole.dense  # of another text, so it begins anew
    state.write_text("{")
    with pytest.warns(UserWarning, match="is damaged and the search begins anew"):
        assert greedy(model, names, 1, WINDOWS, state=state).losses == whole.losses[:1]


def test_equal_losses_let_the_last_unit_go(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(search, "mean_token_loss", lambda model, windows: 1.0)
    assert greedy(model, list(blocks(model)), 2, WINDOWS).dropped == ["model.layers.2", "model.layers.1"]


def test_a_search_without_a_finite_loss_says_so(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(search, "mean_token_loss", lambda model, windows: float("nan"))
    with pytest.raises(ValueError, match=r"no unit can go: all losses .*; load the model in a wider dtype"):
        greedy(model, list(blocks(model)), 1, WINDOWS)


@pytest.mark.parametrize("number", [0, 3])
def test_a_number_that_leaves_nothing_to_search_is_refused(number):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=rf"number={number} is not allowed; allowed: 1 to 2 of 3 units"):
        greedy(model, list(blocks(model)), number, WINDOWS)
