"""Laws of layers to train: as many as asked for, those of the highest scores, and the controls at either end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerif.allocate._shares import number_to_keep
from layerif.allocate.file import SavedAllocation
from layerif.allocate.layers import Layers, to_layers
from layerif.allocate.position import Position
from layerif.layers import LayerMap
from layerif.scores import LayerScores

NAMES = tuple(f"model.layers.{l}" for l in range(5))
LAYERS = LayerMap(NAMES, tuple((f"{name}.weight",) for name in NAMES), (10,) * 5)
VALUES = (0.5, 2.0, 1.0, 3.0, 0.1)


def scores(values=VALUES, higher_means: Any = "undertrained") -> LayerScores:
    return LayerScores(NAMES, tuple(values), higher_means, "test", "f")


@pytest.mark.parametrize(
    ("keep", "of", "number"),
    [(1, 30, 1), (1.0, 30, 30), (0.5, 30, 15), (0.25, 30, 8), (0.29, 50, 15), (0.1, 5, 1), (30, 30, 30), (0.999, 3, 3)],
)
def test_a_whole_number_is_a_number_and_a_fraction_a_share_rounded_half_up(keep, of, number):
    assert number_to_keep(keep, of) == number


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, r"^allocator\.keep=0 is not allowed; allowed: a finite number above 0; a whole number is a number of bl"),
        (-0.5, r"^allocator\.keep=-0\.5 is not allowed"),
        (True, r"^allocator\.keep=True is not allowed"),
        (0.09, r"^allocator\.keep=0\.09 of 5 layers keeps none; use a whole number from 1 to 5, or a share such as"),
        (6, r"^allocator\.keep=6 is more than the 5 layers that there are; use a whole number from 1 to 5"),
        (1.5, r"^allocator\.keep=1\.5 is neither a whole number nor a share of 5 layers; use a whole number from 1"),
    ],
)
@pytest.mark.parametrize("allocator", [Layers, Position])
def test_none_and_more_than_there_are_is_refused(allocator, keep, message):
    with pytest.raises(ValueError, match=message):
        allocator(keep=keep)(scores(), LAYERS)


@pytest.mark.parametrize("keep", [5, 1.0, 0.95])
def test_all_are_refused_where_some_must_go(keep):
    with pytest.raises(
        ValueError, match=rf"keep={keep} keeps all of 5 blocks; use a whole number from 1 to 4, or a sh"
    ):
        number_to_keep(keep, 5, unit="block", all_allowed=False)
    assert number_to_keep(4, 5, all_allowed=False) == 4


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.data())
def test_as_many_as_asked_for_are_trained_and_none_scores_below_one_that_is_not(values, data):
    keep = data.draw(st.integers(1, len(values)))
    found = to_layers(values, keep)
    assert sum(found) == keep
    assert set(found) <= {0, 1}
    trained, left = ([value for value, one in zip(values, found, strict=True) if one == is_on] for is_on in (1, 0))
    assert not left or min(trained) >= max(left)


def test_of_equal_scores_the_earlier_layers_are_trained():
    assert to_layers([1.0, 2.0, 1.0, 1.0], 2) == [1, 1, 0, 0]
    assert to_layers([1.0] * 4, 0.5) == [1, 1, 0, 0]


@pytest.mark.parametrize("higher_means", ["undertrained", "important"])
def test_undertrained_and_important_layers_are_both_those_to_train(higher_means):
    allocation = Layers(keep=0.4)(scores(higher_means=higher_means), LAYERS)
    assert allocation.values == (0, 1, 0, 1, 0)
    assert (allocation.kind, allocation.budget) == ("layers", 2)


def test_scores_are_found_by_name():
    turned = LayerScores(NAMES[::-1], VALUES[::-1], "important", "test", "f")
    assert Layers(keep=2)(turned, LAYERS) == Layers(keep=2)(scores(), LAYERS)


def test_the_controls_are_the_layers_at_either_end():
    assert Position(keep=0.4, rule="first")(scores(), LAYERS).values == (1, 1, 0, 0, 0)
    assert Position(keep=2)(scores(), LAYERS).values == (0, 0, 0, 1, 1)
    assert Position(keep=1.0)(scores(), LAYERS) == Layers(keep=1.0)(scores(), LAYERS)
    assert (Position().source, Position().spends) == ("position(last)", "nothing")


def test_an_allocation_of_layers_is_read_from_a_file(tmp_path):
    allocation = Layers(keep=2)(scores(), LAYERS)
    file = tmp_path / "layers.json"
    for content in (list(allocation.values), allocation.by_name(), allocation.to_dict()):
        file.write_text(json.dumps(content))
        assert SavedAllocation(path=str(file), kind="layers")(scores(), LAYERS) == allocation
    file.write_text("[0, 1, 2, 0, 0]")
    with pytest.raises(ValueError, match=r"layers of 'model\.layers\.2' must be 0 or 1, got 2"):
        SavedAllocation(path=str(file), kind="layers")(scores(), LAYERS)
