"""Laws of bits: true budgets in steps, by curves and by scores, whatever the order of the units."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerif.allocate.allocation import Allocation
from layerif.allocate.bits import Bits, to_bits
from layerif.allocate.curves import Curves, Knapsack, equal_curves
from layerif.formats import formats_called
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.scores import LayerScores
from tests.tiny import tiny_model

LEVELS = tuple(each.bits for each in formats_called("all"))
law = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 10**6)
targets_of = st.floats(LEVELS[0], LEVELS[-1])


def curves_of(costs: Any, weights: Any, levels: tuple[float, ...] = LEVELS) -> Curves:
    sizes_UK = torch.tensor(weights, dtype=torch.float64)[:, None] * torch.tensor(levels, dtype=torch.float64)
    names = tuple(f"model.layers.{index // 2}.{'up' if index % 2 else 'down'}" for index in range(len(weights)))
    costs_UK = torch.as_tensor(np.array(costs), dtype=torch.float64)
    return Curves(names, levels, costs_UK, sizes_UK, kind="bits", is_stepped=True)


def random_curves(seed: int, num_units: int = 6, levels: tuple[float, ...] = LEVELS) -> Curves:
    """Curves that fall by about a factor of four a bit, with so much noise that some rise here and there."""
    drawn = np.random.default_rng(seed)
    costs = np.exp(
        drawn.normal(size=(num_units, 1)) * 2 - 1.39 * np.array(levels) + 0.3 * drawn.normal(size=len(levels))
    )
    return curves_of(costs, drawn.integers(1, 10**6, num_units).tolist(), levels)


def spent(found: Allocation) -> float:
    assert found.sizes is not None
    return math.fsum(value * size for value, size in zip(found.values, found.sizes, strict=True))


# By curves


@law
@given(seeds, targets_of)
def test_the_budget_is_never_exceeded_and_short_by_less_than_the_smallest_step_that_lowers_a_price(seed, target):
    curves = random_curves(seed)
    found = Knapsack(target=target)(curves)
    assert found.kind == "bits"
    assert {*found.values} <= {*LEVELS}
    assert found.sizes is not None
    total = sum(found.sizes)
    assert found.budget == pytest.approx(spent(found) / total, abs=1e-9)
    room = target * total - spent(found)
    assert room >= -1e-6 * total
    for value, size, costs in zip(found.values, found.sizes, curves.costs.tolist(), strict=True):
        here = LEVELS.index(value)
        least = min(costs[: here + 1])
        assert costs[here] == least  # nobody has more bits than it takes to have that price
        for above in range(here + 1, len(LEVELS)):
            assert costs[above] >= least or (LEVELS[above] - value) * size > room - 1e-6 * total


@law
@given(seeds, st.integers(1, 4))
def test_it_is_within_one_segment_of_the_best_of_all_choices(seed, num_units):
    levels = LEVELS[::3]
    curves = random_curves(seed, num_units, levels)
    target = float(np.random.default_rng(seed).uniform(levels[0], levels[-1]))
    found = Knapsack(target=target)(curves)
    sizes, costs = curves.sizes.tolist(), curves.costs.tolist()
    budget = target * sum(found.sizes or ())
    allowed = [
        sum(cost[level] for cost, level in zip(costs, each, strict=True))
        for each in itertools.product(range(len(levels)), repeat=num_units)
        if sum(size[level] for size, level in zip(sizes, each, strict=True)) <= budget * (1 + 1e-12)
    ]
    largest = max(max(cost) - min(cost) for cost in costs)  # no segment is worth more
    assert min(allowed) - 1e-12 <= curves.at(found.by_name()) <= min(allowed) + largest


@law
@given(seeds, targets_of, st.randoms(use_true_random=False))
def test_units_can_be_listed_in_any_order(seed, target, chosen: random.Random):
    curves = random_curves(seed)
    order = chosen.sample(range(6), 6)
    turned = Curves(
        tuple(curves.units[index] for index in order),
        LEVELS,
        curves.costs[order],
        curves.sizes[order],
        kind="bits",
        is_stepped=True,
    )
    assert Knapsack(target=target)(turned).by_name() == Knapsack(target=target)(curves).by_name()


@law
@given(targets_of, st.lists(st.integers(1, 10**6), min_size=2, max_size=8))
def test_curves_that_are_equal_for_each_weight_are_as_uniform_as_steps_allow(target, weights):
    shape = [4.0**-level for level in LEVELS]
    curves = curves_of([[weight * cost for cost in shape] for weight in weights], weights)
    for level in LEVELS:
        assert {*Knapsack(target=level)(curves).values} == {level}
    alike = curves_of([shape] * len(weights), [1] * len(weights))
    found = Knapsack(target=target)(alike)
    room = target * len(weights) - spent(found)
    low, high = (LEVELS.index(end(found.values)) for end in (min, max))
    # One step down from the highest does not pay for one step up of the lowest.
    assert high <= low + 1 or LEVELS[high] - LEVELS[high - 1] + room < LEVELS[low + 1] - LEVELS[low] + 1e-9


def test_equal_curves_of_a_model_take_turns():
    layers = layer_map(tiny_model(), scope="all")
    for unit in ("matrix", "block"):
        found = Knapsack(target=4.5)(equal_curves(layers, unit, LEVELS, True, "bits"))
        assert {*found.values} == {4.5}
        assert found.kind == "bits"


def test_floor_and_cap_stand_for_the_fewest_and_the_most_bits_and_bound_every_unit():
    curves = random_curves(3, 40)
    free = Knapsack(target=4.0)(curves).values
    assert min(free) < 3.25
    bounded = Knapsack(target=4.0, floor=3.25, cap=5.0)(curves).values
    assert 3.25 <= min(bounded) <= max(bounded) <= 5.0
    assert {*Knapsack(target=LEVELS[0])(curves).values} == {LEVELS[0]}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"target": 2.0}, r"allocator\.target=2\.0 is outside the feasible range 2\.25 to 8\.5 bits; change it"),
        ({"target": 9.0}, r"outside the feasible range 2\.25 to 8\.5 bits"),
        ({"target": 4.0, "cap": 3.5}, r"outside the feasible range 2\.25 to 3\.5 bits"),
        ({"target": 3.0, "floor": 2.6, "cap": 3.1}, r"outside the levels .* of 2\.25, 2\.5, .*estimator\.formats"),
    ],
)
def test_a_target_that_no_formats_give_is_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        Knapsack(**asked)(random_curves(0))


# By scores


def wishes(scores: list[float], numel: list[int], target: float, spread: float) -> list[float]:
    """c + spread·x clipped to the levels, with c by bisection."""
    low, high = min(scores), max(scores)
    steps = [spread * (score - low) / (high - low) for score in scores]
    ends = [LEVELS[0] - spread, LEVELS[-1]]
    for _ in range(200):
        c = sum(ends) / 2
        found = [min(max(c + step, LEVELS[0]), LEVELS[-1]) for step in steps]
        mean = sum(bits * size for bits, size in zip(found, numel, strict=True)) / sum(numel)
        ends[mean > target] = c
    return found


@law
@given(seeds, targets_of, st.floats(0.5, 6))
def test_bits_by_scores_spend_the_budget_and_lie_near_their_wishes(seed, target, spread):
    drawn = np.random.default_rng(seed)
    scores, numel = drawn.random(8).tolist(), [100] * 8
    found = to_bits(scores, numel, target, levels=LEVELS, spread=spread)
    assert {*found} <= {*LEVELS}
    room = 8 * target - sum(found)
    assert room >= -1e-9
    steps = [after - before for before, after in itertools.pairwise(LEVELS)]
    assert all(room < steps[LEVELS.index(bits)] + 1e-9 for bits in found if bits < LEVELS[-1])
    for lower, higher in itertools.pairwise(LEVELS.index(found[index]) for index in np.argsort(scores)):
        # A higher score gets less only where its next step costs more than the last one of the lower score.
        assert higher >= lower or room + steps[lower - 1] < steps[higher] + 1e-9
    furthest = max(abs(bits - wish) for bits, wish in zip(found, wishes(scores, numel, target, spread), strict=True))
    assert furthest <= 2 * max(steps)


@pytest.mark.parametrize("level", LEVELS)
def test_equal_scores_give_everybody_the_target_where_a_format_has_it(level):
    assert to_bits([0.3] * 5, [7, 100, 3, 12, 9], level, levels=LEVELS, spread=2.0) == [level] * 5
    assert to_bits([0.1, 0.9, 0.4], [1, 2, 3], level, levels=LEVELS, spread=0.0) == [level] * 3


def test_important_blocks_get_more_bits_and_undertrained_ones_fewer():
    names = tuple(f"model.layers.{index}" for index in range(4))
    layers = LayerMap(names, tuple((f"{name}.up.weight",) for name in names), (64,) * 4)
    for means, order in (("important", 1), ("undertrained", -1)):
        scores = LayerScores(names, (0.0, 1.0, 2.0, 3.0), means, "x", "f")  # type: ignore[arg-type]
        found = Bits(target=5.5, spread=3.0, formats="all")(scores, layers)
        assert list(found.values)[::order] == sorted(found.values)
        assert found.budget == pytest.approx(sum(found.values) / 4)
        assert found.budget <= 5.5
        assert len({*found.values}) > 2


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"target": 0}, r"allocator\.target=0 is not allowed"),
        ({"target": 33}, r"allocator\.target=33 is not allowed"),
        ({"spread": -1}, r"allocator\.spread=-1 is not allowed"),
        ({"formats": "K"}, r"allocator\.formats='K' is not allowed; allowed: gguf, all, MXFP4"),
    ],
)
def test_settings_out_of_range_are_refused(settings_, words):
    with pytest.raises(ValueError, match=words):
        Bits(**settings_)


def test_a_target_outside_the_formats_is_refused():
    with pytest.raises(
        ValueError, match=r"allocator\.target=9 is outside the feasible range 2\.25 to 8\.5 bits; change"
    ):
        to_bits([1.0, 2.0], [1, 1], 9, levels=LEVELS, spread=1.0)
