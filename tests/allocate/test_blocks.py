"""Blocks to keep: the number is exact, the best stay, ties are settled, and controls go by place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerif.allocate import to_blocks
from layerif.allocate.blocks import Blocks
from layerif.allocate.curves import Curves
from layerif.allocate.position import Position
from layerif.allocate.spans import block_curves, equal_costs
from layerif.layers import LayerMap
from layerif.scores import LayerScores


def layers_of(number: int) -> LayerMap:
    names = tuple(f"b.{index}" for index in range(number))
    parts = ("self_attn.q", "mlp.up")
    params = tuple(tuple(f"{name}.{part}" for part in parts) for name in names)
    return LayerMap(names, params, (30,) * number, (10, 20) * number)


def scores_of(values: Any, higher_means: Any = "important") -> LayerScores:
    return LayerScores(layers_of(len(values)).names, tuple(values), higher_means, "test", "none")


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.data())
def test_exactly_so_many_stay_and_none_that_goes_is_above_one_that_stays(values, data):
    keep = data.draw(st.integers(1, len(values) - 1))
    found = to_blocks(values, keep)
    assert sum(found) == keep
    stays = [(value, -index) for index, (value, kept) in enumerate(zip(values, found, strict=True)) if kept]
    goes = [(value, -index) for index, (value, kept) in enumerate(zip(values, found, strict=True)) if not kept]
    assert min(stays) > max(goes)  # among equal values the earlier one stays


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5, unique=True))
def test_important_blocks_stay_and_undertrained_ones_go_first(values):
    important = Blocks(keep=2)(scores_of(values), layers_of(5))
    undertrained = Blocks(keep=2)(scores_of(values, "undertrained"), layers_of(5))
    order = sorted(range(5), key=lambda index: values[index])
    assert {index for index, kept in enumerate(important.values) if kept} == {*order[-2:]}
    gaps = sorted(values)
    if gaps[2] - gaps[1] > 1e-9:  # max − s may round two values to one
        assert {index for index, kept in enumerate(undertrained.values) if kept} == {*order[:2]}


@pytest.mark.parametrize(
    ("keep", "number", "kept"), [(0.8, 30, 24), (0.9, 30, 27), (0.7, 30, 21), (24, 30, 24), (0.5, 3, 2), (0.25, 2, 1)]
)
def test_a_fraction_is_a_share_of_the_blocks_and_a_whole_number_is_a_number(keep, number, kept):
    found = Blocks(keep=keep)(scores_of(range(1, number + 1)), layers_of(number))
    assert found.budget == sum(found.values) == kept
    assert found.kind == "blocks"


def test_prices_of_units_are_spent_whatever_their_sign():
    names = ("b.0", "b.1", "b.2")
    curves = block_curves(names, torch.tensor([-0.5, 0.2, -0.1]), (1, 1, 1), "block")
    assert Blocks(keep=1)(curves).values == (0, 1, 0)
    assert Blocks(keep=2)(curves).values == (0, 1, 1)
    assert curves.at({"b.0": 0, "b.1": 1, "b.2": 0}) == pytest.approx(-0.6)
    parts = equal_costs(layers_of(2), "sublayer")
    assert parts.units == ("b.0.self_attn", "b.0.mlp", "b.1.self_attn", "b.1.mlp")
    assert Blocks(keep=0.5, unit="sublayer")(parts).values == (0, 1, 0, 1)  # the smaller ones cost less


@pytest.mark.parametrize(
    ("allocator", "gone"),
    [
        (Position(kind="blocks", keep=7, rule="first"), {7, 8, 9}),
        (Position(kind="blocks", keep=7, rule="but_spaced"), {1, 5, 8}),
        (Position(kind="blocks", keep=0.5, rule="but_spaced"), {1, 3, 5, 7, 9}),
        (Position(kind="blocks", keep=9, rule="but_spaced"), {5}),
    ],
)
def test_controls_go_by_place(allocator, gone):
    found = allocator(scores_of([1.0] * 10), layers_of(10))
    assert {index for index, kept in enumerate(found.values) if not kept} == gone
    assert found.budget == 10 - len(gone)
    assert allocator.source == f"position({allocator.rule})"


def test_what_cannot_be_spent_is_refused():
    layers, scores = layers_of(3), scores_of([1.0, 2.0, 3.0])
    sparsity = Curves(("b.0",), (0.0, 1.0), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"must have curves of blocks, got sparsity; use estimator=skip_curve"):
        Blocks(keep=1)(sparsity)
    with pytest.raises(ValueError, match=r"allocator\.unit=sublayer cannot be spent: estimator=test scores blocks"):
        Blocks(keep=1, unit="sublayer")(scores, layers)
    with pytest.raises(ValueError, match=r"allocator\.unit=block cannot be spent: these prices are of sublayers"):
        Blocks(keep=1)(equal_costs(layers, "sublayer"))
    with pytest.raises(ValueError, match=r"values must be finite, got nan at index 1; give"):
        to_blocks([1.0, float("nan"), 2.0], 1)
    with pytest.raises(ValueError, match=r"allocator\.keep=3 keeps all of 3 blocks"):
        Position(kind="blocks", keep=3)(scores, layers)
    with pytest.raises(ValueError, match=r"allocator\.keep=2\.0 is neither a whole number nor a share of 3 blocks"):
        Blocks(keep=2.0)(scores, layers)
    with pytest.raises(ValueError, match=r"a model with 1 block has none to spare"):
        to_blocks([1.0], 1)
