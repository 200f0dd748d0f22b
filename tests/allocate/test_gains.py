"""Laws of gain curves and of spending them: concave, in parameters, never above the budget, whatever the order."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerif.allocate.curves import Curves, Knapsack
from layerif.allocate.gains import concave_majorant, gain_curves, sizes_of_levels
from layerif.allocate.rank import Rank
from layerif.layers import LayerMap
from layerif.scores import LayerScores

law = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 10**6)
SHAPES = ((48, 32), (24, 32), (32, 48), (56, 40))


def layers_of(shapes: Any = SHAPES, blocks: int = 2) -> LayerMap:
    names = tuple(f"model.layers.{number}" for number in range(blocks))
    params = tuple(tuple(f"{name}.m{index}.weight" for index in range(len(shapes))) for name in names)
    numel = tuple(outputs * inputs for outputs, inputs in shapes)
    return LayerMap(names, params, (sum(numel),) * blocks, numel * blocks, tuple(shapes) * blocks)


def drawn(seed: int, layers: LayerMap | None = None, **options: Any) -> Curves:
    """Curves of random gains that fall with the rank, some of them negative."""
    layers = layers or layers_of()
    draw = np.random.default_rng(seed)
    gains = []
    for shape in layers.matrix_shapes or ():
        falling = np.exp(draw.normal() - 0.3 * np.arange(min(shape)))
        gains.append(torch.from_numpy(falling * draw.normal(0.5, 1.0, (2, min(shape)))))
    return gain_curves(layers, gains, **options)


def spent(curves: Curves, values: Any) -> float:
    return curves.size_at(dict(zip(curves.units, values, strict=True)))


@law
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_a_gain_is_the_least_concave_curve_from_zero_above_the_sums_that_never_falls(gains):
    found = concave_majorant(gains)
    sums = [0.0, *itertools.accumulate(gains)]
    assert found[0] == 0
    assert len(found) == len(sums)
    steps = np.diff(found)
    assert (steps >= -1e-9).all()
    assert (np.diff(steps) <= 1e-9).all()
    assert all(value >= below - 1e-9 for value, below in zip(found, sums, strict=True))
    # Every line over two of the sums and the highest one stay below a concave curve above them: it is the least one.
    rising = np.maximum.accumulate(sums)
    for level in range(len(sums)):
        under = [
            rising[low] + (rising[high] - rising[low]) * (level - low) / (high - low)
            for low in range(level + 1)
            for high in range(level, len(sums))
            if high > low
        ]
        assert found[level] == pytest.approx(max([rising[level], *under]), abs=1e-9)


def test_sizes_are_those_of_lora_and_of_lora_moe():
    assert sizes_of_levels("rank", [(5, 3)], [0, 1, 4]).tolist() == [[0, 8, 32]]
    assert sizes_of_levels("experts", [(5, 3)], [0, 1, 2, 4], 2).tolist() == [[0, 16, 2 * 16 + 2 * 3, 4 * 16 + 4 * 3]]


@law
@given(seeds, st.floats(0.01, 0.99), st.sampled_from(["rank", "experts"]), st.sampled_from(["matrix", "block"]))
def test_the_budget_is_never_exceeded_and_no_step_fits_into_what_is_left(seed, share, kind, unit):
    curves = drawn(seed, kind=kind, expert_rank=2)
    floor = 1 if kind == "experts" else 0
    of_units = curves.by_block if unit == "block" else curves
    least, most = (spent(of_units, [level] * len(of_units.units)) for level in (floor, 12))
    budget = int(least + max(share * (most - least), float(of_units.sizes[:, 1].min())))
    found = Knapsack(budget=budget, unit=unit, cap=12)(curves)
    assert found.units == of_units.units
    assert (found.kind, found.budget, found.source) == (kind, sum(found.values), {})
    assert all(floor <= value <= 12 for value in found.values)
    used = spent(of_units, found.values)
    assert used <= budget
    for number, value in enumerate(found.values):
        if value < 12:
            more = [*found.values[:number], value + 1, *found.values[number + 1 :]]
            assert spent(of_units, more) > budget


@pytest.mark.parametrize("kind", ["rank", "experts"])
@pytest.mark.parametrize("gains", ["per parameter", "none"])
def test_equal_curves_are_spent_evenly_up_to_a_step(kind, gains):
    layers = layers_of()
    even = gain_curves(layers, None, kind=kind, expert_rank=2)
    if gains == "none":
        even = replace(even, costs=even.costs * 0)
    assert set(Knapsack()(even).values) == {8 if kind == "rank" else 5}
    low = 1 if kind == "experts" else 0
    for budget in range(int(spent(even, [low] * 8)) + 200, int(spent(even, [12] * 8)), 397):
        values = Knapsack(budget=budget)(even).values
        assert max(values) - min(values) <= 1


@law
@given(seeds, st.sampled_from(["rank", "experts"]), st.randoms())
def test_the_order_of_the_matrices_does_not_matter(seed, kind, chosen):
    curves = drawn(seed, kind=kind, expert_rank=2)
    curves = replace(curves, costs=(curves.costs * 4).round() / 4)  # ties
    order = list(range(8))
    chosen.shuffle(order)
    most = None if curves.most is None else tuple(curves.most[unit] for unit in order)
    turned = replace(
        curves,
        units=tuple(curves.units[unit] for unit in order),
        costs=curves.costs[order],
        sizes=curves.sizes[order],
        by_half=None,
        most=most,
    )
    assert Knapsack()(turned).by_name() == Knapsack()(curves).by_name()


@law
@given(seeds, st.integers(200, 700))
def test_a_gain_misses_the_best_by_less_than_one_step_at_most(seed, budget):
    curves = drawn(seed, layers_of(SHAPES[:3], blocks=1))
    found = Knapsack(budget=budget, cap=4)(curves)

    def gain(values: Any) -> float:
        return sum(float(curves.costs[unit, level]) for unit, level in enumerate(values))

    best = max(gain(v) for v in itertools.product(range(5), repeat=3) if spent(curves, v) <= budget)
    steps = curves.costs.diff(dim=1)[:, :4]
    assert best - gain(found.values) <= float(steps.max()) + 1e-9


def test_gains_decide_where_parameters_go_and_matrices_of_other_shapes_compete_by_parameter():
    layers = layers_of(((30, 30), (60, 30)), blocks=1)
    same = torch.ones(2, 30, dtype=torch.float64) / 2
    # Equal gains: the small matrix is cheaper. Gains in proportion to its size: even.
    assert Knapsack(budget=900)(gain_curves(layers, [same, same])).values == (15, 0)
    assert Knapsack(budget=900)(gain_curves(layers, [same, 1.5 * same])).values == (6, 6)
    assert Knapsack(budget=900)(gain_curves(layers, [same, 1.6 * same])).values == (0, 10)
    assert Knapsack(budget=900, floor=1, cap=9)(gain_curves(layers, [same, 1.6 * same])).values == (1, 9)


def test_a_block_has_the_sum_of_its_matrices_and_experts_what_as_many_ranks_gain():
    curves = drawn(3)
    assert torch.allclose(curves.by_block.costs, curves.costs.view(2, 4, -1).sum(1))
    assert curves.by_block.most == (24, 24)
    experts = drawn(3, kind="experts", expert_rank=4)
    assert torch.equal(experts.costs[:, :7], curves.costs[:, : 7 * 4 : 4])
    assert experts.most is None
    assert max(Knapsack(floor=0)(experts).values) > 5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budget": 55}, r"allocator\.budget=55 parameters are below one step, of which the smallest takes 56; raise"),
        ({"budget": 500, "floor": 1}, r"cannot pay the ranks of 8 matrices, 1 each, which take 624"),
        (
            {"budget": 10**6},
            r"budget=1000000 parameters are more than the \d+ that the ranks of 8 matrices .* raise allo",
        ),
        ({"cap": 0.5}, r"allocator\.floor=0 and allocator\.cap=0\.5 must be whole numbers of ranks"),
        ({"floor": 5, "cap": 4}, r"the floor at most the cap; allowed: 0 to 40"),
        ({"floor": 30}, r"allocator\.floor=30 is more than model\.layers\.0\.m1 can have, whose curve ends at rank 24"),
        ({"target": 0.5}, r"allocator\.target=0\.5 has no meaning for rank; use allocator\.budget"),
    ],
)
def test_what_cannot_be_spent_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        Knapsack(**asked)(drawn(0))


def test_a_budget_of_parameters_is_not_one_of_sparsity():
    curves = replace(drawn(0), kind="sparsity", sense="cost")
    with pytest.raises(ValueError, match=r"allocator\.budget=5 has no meaning for sparsity; use allocator\.target"):
        Knapsack(budget=5)(curves)


# Ranks of matrices by scores


def scores(names: Any, values: Any) -> LayerScores:
    return LayerScores(tuple(names), tuple(values), "undertrained", "test", "none")


@law
@given(st.lists(st.floats(0, 10), min_size=2, max_size=2), st.integers(8, 200), st.integers(0, 10**6))
def test_ranks_of_matrices_meet_their_budget_by_size_or_by_score(values, budget, seed):
    layers = layers_of()
    by_size = Rank(budget=budget, matrices="size")(scores(layers.names, values), layers)
    of_each = np.random.default_rng(seed).exponential(size=8).tolist()
    by_score = Rank(budget=budget, matrices="score")(scores(layers.each_matrix.names, of_each), layers)
    for found in (by_size, by_score):
        assert found.units == layers.each_matrix.names
        assert sum(found.values) == found.budget == budget
        assert min(found.values) >= 1
    for block in (by_size.values[:4], by_size.values[4:]):  # of 1536, 768, 1536 and 2240 weights
        assert (block[1], block[3]) == (min(block), max(block))
    assert all(np.diff(np.array(by_score.values)[np.argsort(of_each, kind="stable")]) >= 0)


def test_ranks_go_to_the_matrices_with_an_adapter_alone():
    layers = layers_of()
    found = Rank(matrices="size", target_modules=["m0", "m3"])(scores(layers.names, (1.0, 1.0)), layers)
    assert {unit.rpartition(".")[2] for unit in found.units} == {"m0", "m3"}
    assert found.budget == 8 * 4
    with pytest.raises(ValueError, match=r"needs the score of every matrix .*m3 has none \(1 of 8\); use probe\.scope"):
        Rank(matrices="score")(scores(layers.each_matrix.names[:-1], [1.0] * 7), layers)
    with pytest.raises(ValueError, match=r"method\.target_modules holds 'm7', which is not a linear layer .*m0, m1"):
        Rank(matrices="size", target_modules=["m7"])(scores(layers.names, (1.0, 1.0)), layers)
