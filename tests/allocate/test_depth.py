"""Laws of sparsities by depth: the target met exactly, a straight line where nothing is clipped, spared blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerif.allocate.depth import RISES, Depth, along_depth
from layerif.layers import LayerMap
from layerif.scores import LayerScores

law = settings(deadline=None, max_examples=50)
sizes = st.lists(st.integers(1, 10**9), min_size=1, max_size=40)


def deep(*numel: int) -> LayerMap:
    names = tuple(f"layers.{l}" for l in range(len(numel)))
    return LayerMap(names, tuple((f"{name}.w",) for name in names), numel)


def unscored(layers: LayerMap) -> LayerScores:
    return LayerScores(layers.names, (1.0,) * len(layers.names), "undertrained", "equal", "none")


@law
@given(sizes, st.floats(0, 0.95), st.floats(-1, 1), st.integers(0, 3), st.floats(0, 0.9), st.floats(0.5, 0.99))
def test_any_feasible_target_is_met_within_bounds_in_the_order_of_the_line(numel, target, slope, spare, floor, cap):
    assume(spare < len(numel) and floor <= target)
    assume(target * sum(numel) <= floor * sum(numel[:spare]) + cap * sum(numel[spare:]) and target <= cap)
    sparsities = along_depth(numel, target, slope=slope, spare=spare, floor=floor, cap=cap)
    assert np.average(sparsities, weights=numel) == pytest.approx(target, abs=1e-6)
    assert sparsities[:spare] == [floor] * spare
    line = sparsities[spare:]
    assert all(0 <= sparsity <= cap for sparsity in line)
    for before, after in itertools.pairwise(line):
        assert slope * (after - before) >= -1e-12
        if 0 < before < cap and 0 < after < cap:
            assert after - before == pytest.approx(slope, abs=1e-9)


def test_blocks_of_one_size_lie_on_the_published_line():
    found = along_depth([7] * 5, 0.5, slope=0.05)
    assert found == pytest.approx([0.5 + 0.05 * (l - 2) for l in range(5)], abs=1e-12)
    assert along_depth([7, 9, 3], 0.5, slope=0.0) == pytest.approx([0.5] * 3, abs=1e-12)


def test_the_others_make_up_for_a_spared_block():
    found = along_depth([2, 1, 1], 0.5, slope=0.0, spare=1)
    assert found == pytest.approx([0.2, 0.8, 0.8], abs=1e-12)


def test_a_spared_block_costs_more_than_the_others_can_give():
    with pytest.raises(ValueError, match=r"target=0\.6 cannot be reached with allocator\.spare=1: .* 0\.55"):
        along_depth([1, 1], 0.6, slope=0.0, spare=1)
    with pytest.raises(ValueError, match=r"spare=2 leaves none of 2 layers to prune; use allocator\.spare<=1"):
        along_depth([1, 1], 0.5, slope=0.0, spare=2)
    with pytest.raises(ValueError, match=r"floor=0\.2 is above allocator\.target=0\.1.* 1 spared block would"):
        Depth(target=0.1, spare=1)
    with pytest.raises(ValueError, match=r"target=0\.95 is outside the feasible range 0 to 0\.9; .*allocator\.cap"):
        Depth(target=0.95)


@pytest.mark.parametrize("spare", [0, 1])
def test_candidates_are_the_lines_of_a_symmetric_grid_and_equal_ones_first(spare):
    layers = deep(*[12] * 11)
    allocator = Depth(target=0.6, spare=spare)
    candidates, lines = allocator.candidates(layers), allocator.with_each_slope(layers)
    assert candidates == [line(unscored(layers), layers) for line in lines]
    assert (
        candidates[0]
        == allocator(unscored(layers), layers)
        == Depth(target=0.6, slope=0.0, spare=spare)(unscored(layers), layers)
    )
    assert sorted(RISES) == sorted(-rise for rise in RISES)
    assert len({candidate.values for candidate in candidates}) == len(RISES)
    for candidate, rise in zip(candidates, RISES, strict=True):
        assert (candidate.kind, candidate.budget) == ("sparsity", 0.6)
        risen = candidate.values[-1] - candidate.values[spare]
        assert risen == pytest.approx(rise * (10 - spare) / 10, abs=1e-9)
    assert Depth(slope=0.01).candidates(layers) == [Depth(slope=0.01)(unscored(layers), layers)]


def test_one_block_has_one_line():
    assert [candidate.values for candidate in Depth().candidates(deep(4))] == [(0.5,)]
    assert len(Depth(spare=1).candidates(deep(4, 4))) == 1


def test_the_source_says_if_the_slope_comes_from_trials():
    assert Depth().source == "depth(slope=by trials, spare=0)"
    assert Depth(slope=0.01, spare=2).source == "depth(slope=0.01, spare=2)"
    assert Depth.spends == "nothing"
