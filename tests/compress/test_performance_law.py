"""The Performance Law against figures worked out from its formula, its two ends, and what it is not about."""

from __future__ import annotations

import pytest

from layerif.compress.performance_law import CHANCE, fewer_layers, performance_law
from tests.tiny import tiny_model

# (layers, hidden size, width of the feed-forward part, parameters, tokens) -> per cent, from the published constants.
GOLDEN = {
    (32, 4096, 14336, 8.03e9, 15e12): 65.4543984233602,
    (80, 8192, 28672, 70.6e9, 15e12): 81.09095999532973,
    (126, 16384, 53248, 405e9, 15e12): 87.63740651405702,
    (24, 2048, 5504, 1.8e9, 2.2e12): 52.80702348852927,
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_the_figures_are_those_of_the_formula(shape):
    layers, hidden_size, ffn_size, parameters, tokens = shape
    ours = performance_law(layers, hidden_size=hidden_size, ffn_size=ffn_size, parameters=parameters, tokens=tokens)
    assert 100 * ours == pytest.approx(GOLDEN[shape], rel=1e-12)


def test_the_law_stays_between_chance_and_one():
    small = {"hidden_size": 576, "ffn_size": 1536, "parameters": 1.35e8, "tokens": 2e12}
    assert performance_law(30, **small) == CHANCE
    assert performance_law(10_000, **small) == CHANCE  # u is too small for a float
    large = performance_law(500, hidden_size=100_000, ffn_size=400_000, parameters=1e15, tokens=1e15)
    assert 0.9 < large <= 1


def test_tokens_beyond_the_parameters_add_nothing():
    shape = {"hidden_size": 4096, "ffn_size": 14336, "parameters": 8e9}
    assert performance_law(32, tokens=8e12, **shape) == performance_law(32, tokens=80e12, **shape)
    assert performance_law(32, tokens=1e12, **shape) < performance_law(32, tokens=8e12, **shape)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": 0}, r"performance_law\.layers=0 is not allowed"),
        ({"tokens": 0.0}, r"performance_law\.tokens=0.0 is not allowed"),
    ],
)
def test_what_no_model_has_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        performance_law(**{"layers": 4, "hidden_size": 8, "ffn_size": 8, "parameters": 1e9, "tokens": 1e12} | wrong)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_every_row_has_the_parameters_of_a_model_with_so_many_layers(family):
    rows = fewer_layers(tiny_model(family, num_hidden_layers=4), 1e12)
    assert [row.layers for row in rows] == [4, 3, 2]
    for row in rows:
        smaller = tiny_model(family, num_hidden_layers=row.layers)
        assert row.parameters == sum(parameter.numel() for parameter in smaller.parameters())
        assert row.change == row.mmlu - rows[0].mmlu


def test_a_model_with_experts_is_refused():
    with pytest.raises(ValueError, match=r"training_tokens.*a mixtral has experts; leave it null"):
        fewer_layers(tiny_model("mixtral"), 1e12)
