"""Laws of aggregation, smoothing and the direction of scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerif.allocate.sparsity import Sparsity
from layerif.files import read_json
from layerif.layers import LayerMap
from layerif.scores import AllocationKind, Direction, LayerScores, aggregate, smooth

GOLDEN = json.loads((Path(__file__).parent / "golden" / "pruning_scores.json").read_text())
SCORES = LayerScores(("a", "b", "c"), (1.0, 0.0, 4.0), "undertrained", "datainf", "abc")


def test_each_aggregation_is_its_definition():
    influence = torch.tensor([[-4.0, 1.0, -1.0, -2.0, 3.0], [-1.0, 1.0, 0.0, -2.0, -4.0]])
    # a = (-5, 2, -1, -4, -1); ⌈5/4⌉ = 2 samples
    assert aggregate(influence) == -9
    assert aggregate(influence, "positive") == -11
    assert aggregate(influence, "top25") == -9


def test_top25_leaves_positive_samples_out():
    assert aggregate(torch.tensor([[1.0, 2.0, -3.0, 4.0, 5.0]]), "top25") == -3
    assert aggregate(torch.tensor([[1.0, 2.0]]), "top25") == 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_aggregation_ignores_the_order_of_samples_and_top25_lies_within_positive(values, random):
    shuffled = values[:]
    random.shuffle(shuffled)
    for how in ("all", "positive", "top25"):
        one = aggregate(torch.tensor([values], dtype=torch.float64), how)
        other = aggregate(torch.tensor([shuffled], dtype=torch.float64), how)
        assert math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-6)
    influence = torch.tensor([values], dtype=torch.float64)
    assert aggregate(influence, "positive") - 1e-6 <= aggregate(influence, "top25") <= 0


def test_aggregation_refuses_an_unknown_word_and_a_vector():
    with pytest.raises(ValueError, match="top25"):
        aggregate(torch.zeros(2, 2), "top_25")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"M×N.*\(3,\)"):
        aggregate(torch.zeros(3))


def test_smoothing_reproduces_the_published_values():
    # Both columns are stored at 4 decimals.
    np.testing.assert_allclose(smooth(GOLDEN["raw"]), GOLDEN["smoothed"], atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.integers(7, 20))
def test_smoothing_keeps_every_cubic(coefficients, num_layers):
    depth = np.linspace(-1, 1, num_layers)
    cubic = np.polyval(coefficients, depth)
    np.testing.assert_allclose(smooth(cubic.tolist()), cubic, atol=1e-9)


@given(st.floats(0, 1e12), st.integers(7, 40))
@settings(deadline=None, max_examples=30)
def test_smoothing_keeps_constants_exactly(value, num_layers):
    assert smooth([value] * num_layers) == [value] * num_layers


def test_smoothing_fewer_layers_than_the_window_names_the_window():
    with pytest.raises(ValueError, match=r"window=7 needs at least 7 layers, got 6.*smoothing=false"):
        smooth([1.0] * 6)
    with pytest.raises(ValueError, match="window=6"):
        smooth([1.0] * 8, window=6)
    with pytest.raises(ValueError, match="finite"):
        smooth([math.nan] * 8)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "1", True, None])
def test_scores_refuse_values_that_are_no_finite_number_and_name_the_layer(bad):
    with pytest.raises(ValueError, match=r"datainf.*layer 'b'"):
        replace(SCORES, values=(1.0, bad, 4.0))


def test_scores_refuse_wrong_lengths_names_and_directions():
    with pytest.raises(ValueError, match="2 for 3 layers"):
        replace(SCORES, values=(1.0, 2.0))
    with pytest.raises(ValueError, match="'a' twice"):
        replace(SCORES, layers=("a", "a", "b"))
    with pytest.raises(ValueError, match="did you mean 'important'"):
        replace(SCORES, higher_means="importance")


def test_scores_survive_json():
    assert LayerScores.from_dict(json.loads(json.dumps(SCORES.to_dict()))) == SCORES


@pytest.mark.parametrize("kind", get_args(AllocationKind))
def test_important_layers_lose_less_and_undertrained_ones_are_worth_less_as_they_are(kind):
    turned_round = (3.0, 4.0, 0.0)
    by_direction = {"sparsity": "important", "bits": "undertrained", "blocks": "undertrained"}
    for direction in get_args(Direction):
        expected = turned_round if by_direction.get(kind) == direction else SCORES.values
        assert replace(SCORES, higher_means=direction).oriented(kind) == expected


@pytest.mark.parametrize("direction", ["important", "undertrained"])
@pytest.mark.parametrize("smoothing", [False, True])
def test_scores_equal_but_for_rounding_give_equal_sparsity_in_either_direction(direction, smoothing):
    names = tuple(f"layer.{index}" for index in range(8))
    noisy = tuple(0.3 * (1 + index % 3 * 2.3e-16) for index in range(8))
    assert len(set(noisy)) > 1
    layers = LayerMap(names, tuple((name,) for name in names), (10,) * 8)
    scores = LayerScores(names, noisy, direction, "any", "none")
    found = Sparsity(target=0.5, epsilon=0.3, smoothing=smoothing)(scores, layers)
    assert found.values == pytest.approx((0.5,) * 8, abs=1e-9)


def test_a_missing_or_truncated_file_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json.*cannot be read"):
        read_json(tmp_path / "none.json", what="scores file")
    (tmp_path / "cut.json").write_text('{"layers": ["a"')
    with pytest.raises(ValueError, match=r"cut\.json.*not valid JSON"):
        read_json(tmp_path / "cut.json", what="scores file")
