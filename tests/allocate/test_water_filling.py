"""Laws of water-filling: budgets met exactly, the published form, optimality of both programs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from layerif.allocate.water_filling import WaterFilling, experts_by_gain, sparsity_by_gain
from layerif.estimators.reversed import Reversed
from layerif.estimators.uniform import Uniform
from layerif.layers import LayerMap
from layerif.scores import LayerScores

law = settings(deadline=None, max_examples=50)
layers_of = st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**9)), min_size=1, max_size=30)
powers = st.sampled_from([1.0, 1.5, 2.0])

NAMES = tuple(f"layers.{l}" for l in range(4))
LAYERS = LayerMap(NAMES, tuple((f"{name}.w",) for name in NAMES), (10,) * 4)
GAINS = LayerScores(NAMES, (0.5, 1.0, 2.0, 4.0), "important", "quadratic", "f")


@law
@given(layers_of, st.floats(0, 0.95), powers, st.floats(0.5, 0.99))
def test_sparsities_meet_the_target_and_are_the_published_form_with_one_multiplier(layers, target, power, cap):
    assume(target <= cap)
    gains, numel = map(list, zip(*layers, strict=True))
    sparsities = sparsity_by_gain(gains, numel, target, power=power, cap=cap)
    assert np.average(sparsities, weights=numel) == pytest.approx(target, abs=1e-6)
    assert all(0 <= sparsity <= cap for sparsity in sparsities)
    least = 1e-12 * max(gains)
    multipliers = [
        s * max(q, least) ** power / n
        for s, q, n in zip(sparsities, gains, numel, strict=True)
        if s < cap and max(gains) > 0
    ]
    assert multipliers == pytest.approx([multipliers[0]] * len(multipliers), rel=1e-9) if multipliers else True
    capped = [max(q, least) ** power / n for s, q, n in zip(sparsities, gains, numel, strict=True) if s == cap]
    if multipliers and capped:  # and those at the cap would lie above it
        assert min(multipliers) >= cap * max(capped) * (1 - 1e-9)


def test_power_one_spends_the_weights_at_the_least_quadratic_cost():
    gains, numel, target = np.array([0.3, 1.0, 2.5]), np.array([3, 5, 2]), 0.4

    def cost(sparsities: np.ndarray) -> float:
        return float((gains * sparsities**2).sum())

    found = np.array(sparsity_by_gain(gains.tolist(), numel.tolist(), target, cap=0.99))
    generator = np.random.default_rng(0)
    for _ in range(200):
        step = 0.05 * generator.normal(size=3)
        step -= numel * (step @ numel) / (numel @ numel)  # keeps the budget
        other = np.clip(found + step, 0, 0.99)
        if abs(other @ numel - target * numel.sum()) < 1e-9:
            assert cost(other) >= cost(found) - 1e-12


def test_layers_of_one_size_lose_in_inverse_proportion_to_their_gain():
    found = sparsity_by_gain([1.0, 2.0, 4.0], [5, 5, 5], 0.35, cap=0.99)
    assert found == pytest.approx([0.6, 0.3, 0.15])
    assert sparsity_by_gain([0.0, 0.0], [5, 5], 0.35) == pytest.approx([0.35, 0.35])
    assert sparsity_by_gain([0.0, 1.0], [5, 5], 0.6) == pytest.approx([0.9, 0.3])
    assert sparsity_by_gain([1.0, 5.0], [5, 2], 0.9) == pytest.approx([0.9, 0.9])


@law
@given(layers_of, st.integers(0, 300), powers, st.integers(1, 3), st.sampled_from([1e-9, 0.1, 7e8]))
def test_experts_spend_the_budget_in_the_order_of_gain_by_cost_in_any_unit(layers, spare, power, floor, unit):
    gains, costs = map(list, zip(*layers, strict=True))
    budget = floor * len(gains) + spare
    counts = experts_by_gain(gains, costs, budget, power=power, floor=floor)
    assert sum(counts) == budget
    assert min(counts) >= floor
    by = [q**power / c for q, c in zip(gains, costs, strict=True)]
    for one, other in itertools.permutations(range(len(gains)), 2):
        if by[one] > by[other] * (1 + 1e-9):
            assert counts[one] >= counts[other]
    assert sum(experts_by_gain(gains, [unit * cost for cost in costs], budget, power=power, floor=floor)) == budget


def test_experts_are_the_published_form_where_it_is_whole():
    # γ = 3: 3·4/1 − 1 = 11, 3·2/1 − 1 = 5, 3·1/1 − 1 = 2, and 3·0.3 − 1 is below 0.
    assert experts_by_gain([4.0, 2.0, 1.0, 0.3], [1, 1, 1, 1], 4 + 18) == [12, 6, 3, 1]
    # A layer whose expert costs twice as much: 3·4/2 − 1 = 5.
    assert experts_by_gain([4.0, 2.0, 1.0], [2, 1, 1], 3 + 12) == [6, 6, 3]
    assert experts_by_gain([4.0, 2.0], [1, 1], 2) == [1, 1]
    assert experts_by_gain([0.0, 0.0, 0.0], [1, 1, 1], 7) == [3, 2, 2]


def test_experts_maximise_the_published_objective():
    gains, budget = [3.0, 1.7, 0.8], 9

    def objective(counts: tuple[int, ...]) -> float:
        return sum(q * math.log(n) for q, n in zip(gains, counts, strict=True))  # n = 1 + e

    found = experts_by_gain(gains, [1, 1, 1], budget)
    best = max(
        (counts for counts in itertools.product(range(1, budget), repeat=3) if sum(counts) == budget), key=objective
    )
    assert objective(tuple(found)) == pytest.approx(objective(best), abs=0.05)


def test_equal_gains_and_sizes_give_the_uniform_allocation():
    equal = replace(GAINS, values=(0.3,) * 4)
    assert WaterFilling(target=0.6)(equal, LAYERS).values == pytest.approx((0.6,) * 4)
    assert WaterFilling(kind="experts")(equal, LAYERS).values == (5,) * 4


def test_the_allocator_spends_gains_by_name_and_turns_undertrained_scores_round():
    sparsity, experts = WaterFilling(), WaterFilling(kind="experts", budget=14)
    assert sparsity(GAINS, LAYERS).values == pytest.approx(sparsity_by_gain(GAINS.values, LAYERS.numel, 0.5))
    assert experts(GAINS, LAYERS).values == tuple(experts_by_gain(GAINS.values, LAYERS.numel, 14))
    backwards = replace(GAINS, layers=NAMES[::-1], values=GAINS.values[::-1])
    undertrained = replace(GAINS, higher_means="undertrained")
    for allocator in (sparsity, experts):
        assert allocator(backwards, LAYERS) == allocator(GAINS, LAYERS)
    assert experts(undertrained, LAYERS) == experts(GAINS, LAYERS)
    turned = replace(GAINS, values=(4.0, 3.5, 2.5, 0.5))
    assert sparsity(undertrained, LAYERS) == sparsity(turned, LAYERS)
    assert Reversed(of=Uniform()).score(LAYERS).values == Uniform().score(LAYERS).values


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: WaterFilling(target=0.95), r"target=0\.95 is outside the feasible range 0 to 0\.9; .*allocator\.cap"),
        (lambda: sparsity_by_gain([1.0], [1], 0.95), "0 to 0.9"),
        (lambda: sparsity_by_gain([-1.0], [1], 0.5), "finite and >= 0"),
        (lambda: sparsity_by_gain([1.0], [1], 0.5, power=3), r"allocator\.power=3 is not allowed"),
        (lambda: experts_by_gain([1.0, 2.0], [1], 4), "a number above 0 for each of 2 layers"),
        (lambda: experts_by_gain([1.0, 2.0], [1, 1], 1), r"budget=1 cannot give 2 layers 1 expert each"),
    ],
)
def test_impossible_settings_are_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()
