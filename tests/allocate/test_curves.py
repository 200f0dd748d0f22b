"""Laws of curves and of the knapsack: budgets met to the weight, the optimum of small cases, no dependence on order."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from layerif.allocate.curves import Curves, Knapsack, equal_curves, knapsack, sizes_of
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.pruning.mask import counts
from tests.tiny import tiny_model

LEVELS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
law = settings(deadline=None, max_examples=40)
targets_of = st.floats(0.2, 0.9)
seeds = st.integers(0, 10**6)


def named(number: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{index // 2}.{'up' if index % 2 else 'down'}" for index in range(number))


def curves_of(
    costs: Sequence[Sequence[float]] | Tensor, weights: Sequence[int], levels: Sequence[float] = LEVELS, **more: Any
) -> Curves:
    """Curves of units with so many weights."""
    costs_UK = torch.as_tensor(costs, dtype=torch.float64)
    sizes_UK = torch.tensor(weights, dtype=torch.float64)[:, None] * torch.tensor(levels, dtype=torch.float64)
    return Curves(named(len(weights)), tuple(levels), costs_UK, sizes_UK, **more)


def random_curves(seed: int, num_units: int = 6, levels: Sequence[float] = LEVELS, **more: Any) -> Curves:
    """Curves that rise, in any shape, of units of different sizes."""
    drawn = np.random.default_rng(seed)
    costs = np.exp(drawn.normal(size=(num_units, len(levels) - 1))).cumsum(1)
    costs = np.concatenate([np.zeros((num_units, 1)), costs], axis=1)
    return curves_of(torch.from_numpy(costs), drawn.integers(1, 10**6, num_units).tolist(), levels, **more)


def convex(drawn: np.random.Generator, num_levels: int, most: int = 40) -> list[int]:
    """Whole costs whose rises rise."""
    return [0, *np.sort(drawn.integers(0, most, num_levels - 1)).cumsum().tolist()]


# The budget


@law
@given(seeds, targets_of, st.sampled_from(["matrix", "block"]))
def test_the_budget_is_met_to_the_weight_between_floor_and_cap(seed, target, unit):
    curves = random_curves(seed)
    found = Knapsack(target=target, unit=unit)(curves)
    assert found.units == (curves.units if unit == "matrix" else curves.by_block.units)
    assert found.kind == "sparsity"
    assert found.budget == target
    assert all(0.2 <= value <= 0.9 for value in found.values)
    assert found.sizes is not None
    total = sum(found.sizes)
    assert total == round(float(curves.sizes[:, -1].sum()) / 0.9)
    assert abs(math.fsum(v * n for v, n in zip(found.values, found.sizes, strict=True)) - target * total) < 1e-8 * total
    removed = counts(found.by_name(), dict(zip(found.units, found.sizes, strict=True)))
    assert abs(sum(removed.values()) - Fraction(target) * total) <= Fraction(1, 2) + Fraction(1, 1000)


@pytest.mark.parametrize(
    ("asked", "low", "high"),
    [
        ({"target": 0.1}, 0.1, 0.9),
        ({"target": 0.1, "floor": 0.0}, 0.0, 0.9),
        ({"floor": 0.45, "cap": 0.55}, 0.45, 0.55),
    ],
)
def test_floor_and_cap_bound_every_unit(asked, low, high):
    values = Knapsack(**asked)(random_curves(1)).values
    assert min(values) == pytest.approx(low, abs=1e-12)
    assert max(values) <= high + 1e-12
    if "cap" in asked:
        assert max(values) == pytest.approx(high, abs=1e-12)


@pytest.mark.parametrize("target", [0.2, 0.9])
def test_the_ends_of_the_range_give_everybody_the_same(target):
    assert Knapsack(target=target)(random_curves(2)).values == pytest.approx([target] * 6, abs=1e-12)


@law
@given(st.sampled_from([0.1 + 0.2, 0.3, 0.7 - 0.4, 1 / 3]), st.sampled_from([0.7, 0.1 * 7, 0.6 + 0.1]), seeds)
def test_floors_and_caps_beside_a_level_by_rounding_alone_are_that_level(floor, cap, seed):
    found = Knapsack(target=0.5, floor=floor, cap=cap)(random_curves(seed, 20))
    assert all(floor - 1e-9 <= value <= cap + 1e-9 for value in found.values)
    expected = Knapsack(target=0.5, floor=round(floor, 12), cap=round(cap, 12))(random_curves(seed, 20))
    assert found.values == pytest.approx(expected.values, abs=1e-6)


# The optimum


@law
@given(seeds, st.integers(1, 3), st.integers(2, 5), st.booleans())
def test_it_is_the_best_of_all_choices_where_curves_are_convex_and_steps_are_one(seed, num_units, num_levels, stepped):
    """Whole budgets of steps of the same size, by brute force over every choice of levels."""
    drawn = np.random.default_rng(seed)
    levels = list(range(num_levels))
    costs = [convex(drawn, num_levels) for _ in range(num_units)]
    sizes = [[3 * level for level in levels]] * num_units
    steps = int(drawn.integers(0, num_units * (num_levels - 1) + 1))
    found = knapsack(costs, sizes, [levels] * num_units, 3 * steps, is_stepped=stepped)
    price = sum(np.interp(value, levels, cost) for value, cost in zip(found, costs, strict=True))
    assert sum(found) == pytest.approx(steps, abs=1e-9)
    choices = [each for each in itertools.product(levels, repeat=num_units) if sum(each) == steps]
    best = min(sum(cost[level] for cost, level in zip(costs, each, strict=True)) for each in choices)
    assert price == pytest.approx(best, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(seeds, st.floats(0, 1), st.booleans())
def test_it_is_the_optimum_of_the_linear_programme_where_curves_are_convex(seed, share, is_gain):
    drawn = np.random.default_rng(seed)
    costs, sizes, levels = [], [], []
    for _ in range(4):
        number = int(drawn.integers(2, 6))
        sizes.append((drawn.random() + drawn.random(number).cumsum()).tolist())
        slopes = np.sort(drawn.random(number - 1))[:: -1 if is_gain else 1]
        costs.append([0.0, *(slopes * np.diff(sizes[-1])).cumsum().tolist()])
        levels.append(list(range(number)))
    least, most = sum(each[0] for each in sizes), sum(each[-1] for each in sizes)
    budget = least + share * (most - least)
    sense = "gain" if is_gain else "cost"
    found = knapsack(costs, sizes, levels, budget, sense=sense)

    def total(of: list[list[float]]) -> float:
        return sum(float(np.interp(*each)) for each in zip(found, levels, of, strict=True))

    assert total(sizes) == pytest.approx(budget, abs=1e-9)
    # A weight for each level of each unit; those of a unit add up to 1, and what they spend to the budget.
    owners = np.repeat(np.arange(4), [len(each) for each in levels])
    rows = np.vstack([owners == unit for unit in range(4)] + [np.concatenate(sizes)])
    sign = -1 if is_gain else 1
    best = linprog(sign * np.concatenate(costs), A_eq=rows, b_eq=[1, 1, 1, 1, budget])
    assert total(costs) == pytest.approx(sign * best.fun, abs=1e-7)


@law
@given(seeds, st.floats(0.25, 0.85), seeds)
def test_no_transfer_of_sparsity_between_two_units_lowers_a_convex_price(seed, target, second):
    """With the settings of a user, on measured curves that rise ever faster."""
    drawn = np.random.default_rng(seed)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    shapes = torch.from_numpy(drawn.uniform(1.5, 4, (5, 1)))
    scales = torch.from_numpy(np.exp(drawn.normal(size=(5, 1))))
    curves = curves_of(scales * levels**shapes, drawn.integers(100, 10**4, 5).tolist())
    found = Knapsack(target=target)(curves)
    price, generator = curves.at(found.by_name()), random.Random(second)
    assert found.sizes is not None
    for _ in range(10):
        first, other = generator.sample(range(5), 2)
        moved, values = generator.uniform(0, 50), list(found.values)
        values[first] += moved / found.sizes[first]
        values[other] -= moved / found.sizes[other]
        if max(values) <= 0.9 and min(values) >= 0.2:
            assert curves.at(dict(zip(found.units, values, strict=True))) >= price - 1e-9 * price


# Steps


@st.composite
def of_steps(draw) -> tuple[list[list[int]], list[list[int]], int]:
    """Gains that do not fall, sizes that rise, of some units, and a budget for more than the lowest levels."""
    gains, sizes = [], []
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(1, 4))
        steps = st.lists(st.integers(1, 9), min_size=number, max_size=number)
        sizes.append(list(itertools.accumulate(draw(steps))))
        rises = st.lists(st.integers(0, 30), min_size=number - 1, max_size=number - 1)
        gains.append([0, *itertools.accumulate(draw(rises))])
    least, most = sum(each[0] for each in sizes), sum(each[-1] for each in sizes)
    return gains, sizes, draw(st.integers(least, most + 3))


def first_that_does_not_fit(gains: list[list[int]], sizes: list[list[int]], budget: int) -> int:
    """Gives the most that a hull segment is worth of those whose slope is the first that the budget cuts."""
    segments = []
    for gain, size in zip(gains, sizes, strict=True):
        at = 0
        while at < len(size) - 1:
            slopes = {stop: Fraction(gain[stop] - gain[at], size[stop] - size[at]) for stop in range(at + 1, len(size))}
            stop = max(slopes, key=lambda stop: (slopes[stop], stop))
            segments.append((slopes[stop], size[stop] - size[at], gain[stop] - gain[at]))
            at = stop
    rest = budget - sum(size[0] for size in sizes)
    for slope, of_slope in itertools.groupby(sorted(segments, key=lambda each: -each[0]), key=lambda each: each[0]):
        together = list(of_slope)
        rest -= sum(size for _, size, _ in together)
        if rest < 0:
            return max(gain for each, _, gain in together if each == slope)
    return 0


@settings(deadline=None, max_examples=150)
@given(of_steps())
def test_steps_never_exceed_the_budget_leave_no_step_that_fits_and_miss_the_best_by_one_segment_at_most(case):
    gains, sizes, budget = case
    levels = [list(range(len(size))) for size in sizes]
    found = knapsack(gains, sizes, levels, budget, sense="gain", is_stepped=True)
    spent = sum(size[level] for size, level in zip(sizes, found, strict=True))
    assert spent <= budget
    for size, level in zip(sizes, found, strict=True):
        assert all(size[stop] - size[level] > budget - spent for stop in range(int(level) + 1, len(size)))
    price = sum(gain[level] for gain, level in zip(gains, found, strict=True))
    best = max(
        sum(gain[level] for gain, level in zip(gains, each, strict=True))
        for each in itertools.product(*levels)
        if sum(size[level] for size, level in zip(sizes, each, strict=True)) <= budget
    )
    assert best - price <= first_that_does_not_fit(gains, sizes, budget)


@law
@given(of_steps())
def test_steps_that_cost_never_exceed_the_budget_and_leave_no_step_that_fits(case):
    costs, sizes, budget = case
    levels = [list(range(len(size))) for size in sizes]
    found = knapsack(costs, sizes, levels, budget, is_stepped=True)
    left = budget - sum(size[level] for size, level in zip(sizes, found, strict=True))
    assert left >= 0
    for size, level in zip(sizes, found, strict=True):
        assert all(size[stop] - size[level] > left for stop in range(int(level) + 1, len(size)))


OF_4 = (0.0, 0.25, 0.5, 0.75)


@law
@given(seeds, st.floats(0.26, 0.74))
def test_levels_of_m_are_levels_of_m_whose_mean_is_the_budget(seed, target):
    curves = random_curves(seed, 8, OF_4, is_stepped=True)
    found = Knapsack(target=target)(curves)
    assert {*found.values} <= {*OF_4[1:]}  # 0 is below the floor
    assert found.sizes is not None
    mean = math.fsum(v * n for v, n in zip(found.values, found.sizes, strict=True)) / sum(found.sizes)
    assert found.budget == pytest.approx(mean, abs=1e-12)
    smallest = min((n for v, n in zip(found.values, found.sizes, strict=True) if v < 0.75), default=0)
    assert mean <= target + 1e-9
    assert target - mean < 0.25 * smallest / sum(found.sizes) + 1e-9
    assert curves.at(found.by_name()) == pytest.approx(
        sum(float(np.interp(v, OF_4, costs)) for v, costs in zip(found.values, curves.costs.numpy(), strict=True))
    )


def test_the_only_level_of_n_of_m_is_given_to_all():
    curves = random_curves(0, 4, (0.0, 0.5), is_stepped=True)
    assert Knapsack(target=0.5)(curves).values == (0.5,) * 4


# What does not matter, and what does


@law
@given(seeds, targets_of, st.randoms(use_true_random=False), st.booleans())
def test_units_can_be_listed_in_any_order(seed, target, chosen, stepped):
    levels = OF_4 if stepped else LEVELS
    target = min(target, 0.74) if stepped else target
    assume(not stepped or target > 0.26)
    curves = random_curves(seed, 6, levels, is_stepped=stepped)
    order = list(range(6))
    chosen.shuffle(order)
    shuffled = replace(
        curves, units=tuple(curves.units[u] for u in order), costs=curves.costs[order], sizes=curves.sizes[order]
    )
    found, other = (Knapsack(target=target)(each).by_name() for each in (curves, shuffled))
    assert other == pytest.approx(found, abs=1e-9)


@law
@given(seeds, targets_of, st.sampled_from([1e-12, 0.3, 1e9]))
def test_the_unit_of_the_cost_does_not_matter(seed, target, factor):
    curves = random_curves(seed)
    found, other = (
        Knapsack(target=target)(each).values for each in (curves, replace(curves, costs=factor * curves.costs))
    )
    assert other == pytest.approx(found, abs=1e-6)


@law
@given(seeds, targets_of, st.lists(st.integers(1, 10**6), min_size=2, max_size=8))
def test_curves_that_are_equal_for_each_weight_give_everybody_the_same(seed, target, weights):
    (shape,) = random_curves(seed, 1).costs.tolist()
    curves = curves_of([[weight * cost for cost in shape] for weight in weights], weights)
    values = Knapsack(target=target)(curves).values
    assert values == pytest.approx([target] * len(weights), abs=1e-6)


@law
@given(st.sampled_from([(1, 1, 1), (0, 2, 7), (0, 0, 0)]), st.lists(st.integers(1, 10**6), min_size=2, max_size=8))
def test_steps_that_are_equal_for_each_weight_are_taken_by_everybody_in_turn(rises, weights):
    costs = [[weight * cost for cost in itertools.accumulate((0, *rises))] for weight in weights]
    curves = curves_of(costs, weights, OF_4, is_stepped=True)
    for target in OF_4[1:]:
        assert Knapsack(target=target)(curves).values == (target,) * len(weights)
    values = Knapsack(target=0.6)(curves).values
    assert {*values} <= {0.5, 0.75}


@pytest.mark.parametrize("unit", ["matrix", "block"])
def test_equal_curves_of_a_model_give_everybody_the_same(unit):
    layers = layer_map(tiny_model(), scope="all")
    curves = equal_curves(layers, unit, LEVELS)
    names, numel = sizes_of(layers, unit)
    assert (curves.units, curves.unit, len(names)) == (names, unit, 21 if unit == "matrix" else 3)
    found = Knapsack(target=0.6)(curves)
    assert found.values == pytest.approx([0.6] * len(names), abs=1e-12)
    assert found.sizes == numel


@law
@given(seeds, st.integers(0, 5))
def test_a_unit_without_cost_is_filled_first(seed, number):
    """Up to the cap, and with less than that it alone is above the floor."""
    curves = random_curves(seed)
    weights = (curves.sizes[:, -1] / 0.9).round()
    free = replace(curves, costs=curves.costs.index_fill(0, torch.tensor([number]), 0.0))
    share = float(weights[number] / weights.sum())
    full = Knapsack(target=min(0.2 + 0.7 * share + 0.05, 0.9))(free).values
    assert full[number] == pytest.approx(0.9, abs=1e-9)
    half = Knapsack(target=0.2 + 0.35 * share)(free).values
    assert half == pytest.approx([0.55 if unit == number else 0.2 for unit in range(6)], abs=1e-6)


def test_all_curves_without_cost_give_everybody_the_same():
    curves = random_curves(3)
    assert Knapsack(target=0.6)(replace(curves, costs=0 * curves.costs)).values == pytest.approx([0.6] * 6, abs=1e-9)


def test_what_costs_more_gets_less():
    curves = random_curves(5)
    dearer = replace(curves, costs=curves.costs * torch.tensor([[10.0]] + [[1.0]] * 5))
    assert Knapsack(target=0.5)(dearer).values[0] < Knapsack(target=0.5)(curves).values[0]


# Curves


@law
@given(seeds)
def test_finer_curves_pass_through_the_measured_levels_and_rise_where_these_do(seed):
    curves = random_curves(seed)
    fine = curves.finer
    assert fine.levels == (0.0, *[pytest.approx(each / 100) for each in range(20, 91)])
    where = [fine.levels.index(level) for level in LEVELS]
    torch.testing.assert_close(fine.costs[:, where], curves.costs, rtol=1e-9, atol=0)
    torch.testing.assert_close(fine.sizes[:, where], curves.sizes, rtol=1e-9, atol=0)
    assert bool((fine.costs.diff(dim=1) > 0).all())
    assert fine.fingerprint == curves.fingerprint
    for costs_K, fine_K in zip(curves.costs.tolist(), fine.costs.tolist(), strict=True):
        for low, high in itertools.pairwise(range(len(LEVELS))):
            between = fine_K[where[low] : where[high] + 1]
            assert costs_K[low] * (1 - 1e-9) <= min(between)
            assert max(between) <= costs_K[high] * (1 + 1e-9)


def test_the_logarithm_is_what_is_interpolated():
    """A cost that grows by a constant factor a level stays so between levels; below the first it is a line from 0."""
    curves = curves_of([[0.0, *(math.exp(7 * level) for level in LEVELS[1:])]], [100])
    for level, cost in zip(curves.finer.levels[1:], curves.finer.costs[0, 1:].tolist(), strict=True):
        assert cost == pytest.approx(math.exp(7 * level), rel=1e-9)
    for level in (0.05, 0.1, 0.15):
        assert curves.at({curves.units[0]: level}) == pytest.approx(level / 0.2 * math.exp(1.4))


@law
@given(seeds)
def test_falls_of_a_noisy_curve_and_costs_of_zero_are_kept(seed):
    drawn = np.random.default_rng(seed)
    costs = drawn.random((3, 9)) * (drawn.random((3, 9)) < 0.6)
    costs[:, 0], costs[0, 4] = 0, 1.0
    curves = curves_of(torch.from_numpy(costs), [5, 7, 100])
    fine = curves.finer
    where = [fine.levels.index(level) for level in LEVELS]
    torch.testing.assert_close(fine.costs[:, where], curves.costs, rtol=1e-9, atol=1e-11)
    assert float(fine.costs.min()) >= 0
    assert float(fine.costs.max()) <= costs.max() * (1 + 1e-9)
    values = Knapsack(target=0.5)(curves).values
    assert all(0.2 <= value <= 0.9 for value in values)


def test_steps_and_few_levels_are_not_interpolated():
    for curves in (random_curves(0, 3, OF_4, is_stepped=True), random_curves(0, 3, (0.0, 0.4, 0.8))):
        assert curves.finer is curves


@law
@given(seeds, targets_of, st.sampled_from(["matrix", "block"]))
def test_the_price_of_an_allocation_is_what_its_units_cost_on_the_fine_levels(seed, target, unit):
    curves = random_curves(seed)
    found = curves.allocate(target, unit)
    assert found == Knapsack(target=target, unit=unit)(curves)
    spent = curves if unit == "matrix" else curves.by_block
    fine, values = spent.finer, found.by_name()
    priced = zip(fine.units, fine.costs.numpy(), strict=True)
    price = sum(float(np.interp(values[name], fine.levels, costs)) for name, costs in priced)
    assert spent.at(found.by_name()) == pytest.approx(price, rel=1e-12)


def test_curves_of_matrices_add_up_to_those_of_blocks():
    halves = torch.stack([random_curves(seed).costs for seed in (1, 2)])
    curves = replace(random_curves(0), costs=halves.sum(0), by_half=halves, source={"model": "a"}, fingerprint="f")
    blocks = curves.by_block
    assert blocks.units == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert (blocks.unit, blocks.levels, blocks.source, blocks.fingerprint) == ("block", LEVELS, {"model": "a"}, "f")
    for field in ("costs", "sizes"):
        each = getattr(curves, field)
        torch.testing.assert_close(getattr(blocks, field), each[0::2] + each[1::2], rtol=1e-12, atol=0)
    assert blocks.by_half is not None
    torch.testing.assert_close(blocks.by_half.sum(0), blocks.costs, rtol=1e-12, atol=0)
    assert blocks.halves is not None
    first, second = blocks.halves
    torch.testing.assert_close((first.costs + second.costs) / 2, blocks.costs, rtol=1e-12, atol=0)


def test_halves_are_the_curves_of_every_other_sample():
    halves = torch.stack([random_curves(seed).costs for seed in (1, 2)])
    curves = random_curves(0).with_costs(halves)
    torch.testing.assert_close(curves.costs, halves.sum(0))
    assert curves.halves is not None
    first, second = curves.halves
    torch.testing.assert_close(first.costs, 2 * halves[0])  # each half weighs as much as both do
    torch.testing.assert_close(second.costs, 2 * halves[1])
    assert first.halves is None
    assert random_curves(0).halves is None
    assert curves.finer.by_half is None


# Refusals


def test_a_target_outside_floor_and_cap_is_refused():
    settings_: dict[str, Any]
    for settings_, low, high in (
        ({"target": 0.95}, 0.2, 0.9),
        ({"target": 0.1, "floor": 0.3}, 0.3, 0.9),
        ({"target": 0.6, "cap": 0.5}, 0.2, 0.5),
    ):
        with pytest.raises(
            ValueError,
            match=rf"allocator\.target={settings_['target']} is outside the feasible range {low} to {high}; change it, "
            r"or allocator\.floor or allocator\.cap",
        ):
            random_curves(0).allocate(**settings_)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("target", 1.0, "below 1"),
        ("target", -0.1, "at least 0"),
        ("floor", -0.1, "at least 0"),
        ("cap", 1.0, "below 1"),
        ("unit", "blocks", "did you mean 'block'"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value, words):
    with pytest.raises(ValueError, match=rf"allocator\.{setting}={value!r} is not allowed; allowed: .*{words}"):
        Knapsack(**{setting: value})(random_curves(0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cost_that_is_not_finite_names_its_unit(value):
    curves = random_curves(0)
    costs = curves.costs.clone()
    costs[3, 5] = value
    with pytest.raises(ValueError, match=r"the cost of model\.layers\.1\.up is not finite; .*model\.dtype=float32"):
        replace(curves, costs=costs)


def test_matrices_cannot_be_made_of_blocks():
    with pytest.raises(ValueError, match=r"allocator\.unit=matrix needs curves of matrices, .*granularity=matrix, or "):
        Knapsack(unit="matrix")(random_curves(0).by_block)
    assert Knapsack(unit="block")(random_curves(0).by_block) == Knapsack()(random_curves(0).by_block)


def test_costs_sizes_levels_and_names_must_fit_one_another():
    curves = random_curves(0, 3)
    for change, words in (
        (
            {"costs": curves.costs[:2]},
            r"3 units and 9 levels must have costs and sizes of \(3, 9\), got \(2, 9\) and \(3, 9\)",
        ),
        ({"sizes": curves.sizes[:, :-1]}, r"got \(3, 9\) and \(3, 8\)"),
        ({"sizes": curves.sizes.flip(1)}, "levels and sizes of curves must ascend; give every level once"),
        ({"levels": (*LEVELS[:-1], 0.8)}, "levels and sizes of curves must ascend; give every level once"),
        ({"units": ("a", "b", "a")}, "must not name the layer 'a' twice"),
        ({"sense": "loss"}, "sense='loss' is not allowed; allowed: cost, gain"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(curves, **change)


def test_gains_and_other_kinds_are_not_spent_on_a_sparsity():
    for change in ({"sense": "gain"}, {"kind": "rank"}):
        with pytest.raises(
            ValueError, match=r"curves of what .* cost, or of what ranks or experts gain, got (sparsity|rank) \("
        ):
            Knapsack()(replace(random_curves(0), **change))


def test_a_budget_beyond_the_levels_is_refused_with_those_that_are_allowed():
    costs, sizes, levels = [[0, 1], [0, 2]], [[1, 3], [2, 4]], [[0, 1]] * 2
    for budget in (2.9, 7.1):
        with pytest.raises(ValueError, match=rf"a budget of {budget} is not allowed; allowed: 3\.0 to 7\.0"):
            knapsack(costs, sizes, levels, budget)
    with pytest.raises(ValueError, match="a budget of 2 is not allowed"):
        knapsack(costs, sizes, levels, 2, is_stepped=True)
    assert knapsack(costs, sizes, levels, 99, is_stepped=True) == [1, 1]  # whatever is left over buys nothing


@pytest.mark.parametrize(
    ("asked", "is_stepped"),
    [
        ({"target": 0.2}, True),  # below the lowest level of m above the floor
        ({"target": 0.85}, True),
        ({"target": 0.85}, False),
        ({"target": 0.85, "floor": 0.8}, True),
        ({"target": 0.85, "floor": 0.8}, False),
        ({"target": 0.3, "floor": 0.3, "cap": 0.4}, True),
    ],
)
def test_a_target_beyond_the_levels_names_them(asked, is_stepped):
    curves = random_curves(0, 4, OF_4, is_stepped=is_stepped)
    with pytest.raises(
        ValueError,
        match=rf"allocator\.target={asked['target']} is outside the levels .* of 0, 0\.25, 0\.5, 0\.75; change one ",
    ):
        Knapsack(**asked)(curves)


def test_layers_that_do_not_say_how_large_a_matrix_is_have_no_curves_of_matrices():
    layers = LayerMap(("a",), (("a.q", "a.k"),), (3,))
    with pytest.raises(ValueError, match=r"do not say how large each matrix is; take them of a model"):
        equal_curves(layers, "matrix", LEVELS)
    assert equal_curves(layers, "block", LEVELS).units == ("a",)
