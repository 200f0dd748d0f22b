"""Laws of allocation: budgets met exactly, order kept, no dependence on unit or position; the published figures.

What the published figures determine. Sparsities: fully, from the published scores. Expert vectors: no scores were
published beside them (the pruning scores belong to no named task and yield none of them at any tried β), so the scores
behind them cannot be checked; each vector does fix its own budget and floor, and must be what both roundings give for
the shares it stands for.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from layerif.allocate import Allocation, to_experts, to_rank, to_sparsity
from layerif.allocate.bits import Bits
from layerif.allocate.blocks import Blocks
from layerif.allocate.curves import Knapsack
from layerif.allocate.depth import Depth
from layerif.allocate.experts import Experts
from layerif.allocate.file import SavedAllocation
from layerif.allocate.layers import Layers
from layerif.allocate.position import Position
from layerif.allocate.rank import Rank
from layerif.allocate.shape import Shape
from layerif.allocate.sparsity import Sparsity
from layerif.allocate.water_filling import WaterFilling
from layerif.layers import LayerMap
from layerif.scores import LayerScores, smooth

GOLDEN = Path(__file__).parents[1] / "golden"
PRUNING = json.loads((GOLDEN / "pruning_scores.json").read_text())
PUBLISHED_EXPERTS = json.loads((GOLDEN / "expert_allocations.json").read_text())
TASKS = ("mrpc", "cola", "scienceqa", "commonsense_qa", "openbookqa")
CONF = Path(__file__).parents[2] / "conf" / "allocator"

law = settings(deadline=None, max_examples=50)
any_scores = st.lists(st.floats(0, 1e9), min_size=1, max_size=40)
# Scores a thousandth apart: away from ties, where the lower index decides by design.
spread_scores = st.lists(st.integers(0, 1000), min_size=1, max_size=40, unique=True).map(lambda s: [x / 7 for x in s])
betas = st.sampled_from([0.0, 0.5, 1.0, 2.5, 3.0])
shifts = st.sampled_from(["min", "none"])


# Experts and rank


@law
@given(any_scores, st.integers(0, 300), betas, shifts, st.integers(1, 3))
def test_counts_spend_the_budget_respect_the_floor_and_keep_the_order(scores, spare, beta, shift, floor):
    budget = floor * len(scores) + spare
    for counts in (
        to_experts(scores, budget, beta=beta, shift=shift, floor=floor),
        to_rank(scores, budget, beta=beta, shift=shift, floor=floor),
    ):
        assert sum(counts) == budget
        assert min(counts) >= floor
        distinct = sorted(set(scores))
        for lower, higher in itertools.pairwise(distinct):
            most_below = max(c for s, c in zip(scores, counts, strict=True) if s == lower)
            least_above = min(c for s, c in zip(scores, counts, strict=True) if s == higher)
            assert most_below <= least_above


def test_a_huge_budget_is_spent_exactly():
    assert sum(to_experts([0.1, 0.7, 1 / 3], 10**18 + 1, beta=2.5)) == 10**18 + 1


@law
@given(any_scores, st.integers(0, 300), st.sampled_from([1e-9, 0.1, 3.0, 7e8]))
def test_the_unit_of_scores_does_not_matter(scores, spare, unit):
    # Spreads near the float noise of the values are no information that a change of unit could keep.
    distinct = sorted(set(scores))
    assume(all(b - a > 1e-6 * max(scores) for a, b in itertools.pairwise(distinct)))
    budget = len(scores) + spare
    scaled = [unit * score for score in scores]
    assert to_experts(scaled, budget, beta=2.5) == to_experts(scores, budget, beta=2.5)
    np.testing.assert_allclose(
        to_sparsity(scaled, [7] * len(scores), 0.5, epsilon=0.3),
        to_sparsity(scores, [7] * len(scores), 0.5, epsilon=0.3),
        rtol=1e-6,
    )


@law
@given(spread_scores, st.integers(1, 300), st.sampled_from([0.5, 2.5, 3.0]), st.integers(0, 10**6))
def test_layers_can_be_listed_in_any_order(scores, spare, beta, seed):
    assume(len(scores) > 1)
    powers = (np.array(scores) - min(scores)) ** beta
    assume(no_ties(powers / powers.sum() * spare))
    order = list(range(len(scores)))
    random.Random(seed).shuffle(order)
    counts = to_experts(scores, len(scores) + spare, beta=beta)
    permuted = to_experts([scores[l] for l in order], len(scores) + spare, beta=beta)
    assert permuted == [counts[l] for l in order]


def no_ties(parts: np.ndarray) -> bool:
    """Tells if the fractions lie apart, also across a whole number."""
    fractions = np.sort(parts % 1)
    return bool(np.all(np.diff(fractions) > 1e-6)) and bool(fractions[-1] < 1 - 1e-6)


@law
@given(spread_scores, st.integers(0, 300), betas, shifts)
def test_experts_are_their_definition(scores, spare, beta, shift):
    weights = np.array(scores) - (min(scores) if shift == "min" else 0)
    powers = weights**beta
    assume(len(scores) > 1 and powers.sum() > 0)
    parts = powers / powers.sum() * spare
    counts = to_experts(scores, len(scores) + spare, beta=beta, shift=shift)
    assert all(
        math.floor(part - 1e-9) <= n - 1 <= math.floor(part + 1e-9) + 1 for n, part in zip(counts, parts, strict=True)
    )
    if no_ties(parts):
        expected = 1 + np.floor(parts).astype(int)
        expected[np.argsort(-(parts % 1))[: spare - int(np.floor(parts).sum())]] += 1
        assert counts == expected.tolist()


@law
@given(st.floats(0, 1e9), st.integers(1, 40), st.integers(0, 300), shifts)
def test_constant_scores_give_the_uniform_allocation(value, num_layers, spare, shift):
    budget = num_layers + spare
    each, extra = divmod(budget, num_layers)
    uniform = [each + 1] * extra + [each] * (num_layers - extra)
    assert to_experts([value] * num_layers, budget, beta=2.5, shift=shift) == uniform
    assert to_rank([value] * num_layers, budget, shift=shift) == uniform
    sparsities = to_sparsity([value] * num_layers, list(range(1, num_layers + 1)), 0.4, epsilon=0.2)
    assert sparsities == pytest.approx([0.4] * num_layers, abs=1e-12)


def test_the_rounding_of_equal_scores_is_no_difference():
    noisy = [0.1 + 0.2, 0.3, 0.3]
    assert noisy[0] != 0.3
    assert to_experts(noisy, 6, beta=2.5) == [2, 2, 2]
    assert to_sparsity(noisy, [1, 1, 1], 0.5, epsilon=0.3) == pytest.approx([0.5] * 3, abs=1e-12)


def test_ties_of_fractions_go_to_the_lower_index():
    # Shares 0, 1, 1, 2 of 6 spare experts are 0, 1.5, 1.5, 3: one half too many.
    assert to_experts([0, 1, 1, 2], 10, beta=1) == [1, 3, 2, 4]
    assert to_experts([2, 1, 1, 0], 10, beta=1) == [4, 3, 2, 1]
    # Shares 0, ½, 1, 1½ in any unit, though 0.3 / 0.1 is not 3 in floats.
    for unit in (1, 0.1, 0.3, 1.1, 7.7):
        assert to_experts([0 * unit, 1 * unit, 2 * unit, 3 * unit], 7, beta=1) == [1, 2, 2, 2]


def test_a_tie_between_unequal_scores_keeps_the_order():
    # 1 and its next float share one extra expert: their fractions are a tie, their order is not.
    assert to_experts([0, 1, math.nextafter(1, 2)], 4, beta=1) == [1, 1, 2]


def test_more_beta_gives_more_to_the_highest():
    scores = [0.1, 0.5, 0.7, 1.0]
    highest = [to_experts(scores, 40, beta=beta)[-1] for beta in (0, 1, 2.5, 8)]
    assert highest == sorted(highest)
    assert highest[0] < highest[-1]


def test_shift_none_leaves_the_lowest_layer_its_share():
    assert to_experts([1.0, 3.0], 10, beta=1, shift="min") == [1, 9]
    assert to_experts([1.0, 3.0], 10, beta=1, shift="none") == [3, 7]


# The upstream rounding


def test_upstream_rounds_half_to_even_and_puts_the_error_on_one_layer():
    # Shares of 5: 0.5, 0.5, 1.5, 2.5 → 0, 0, 2, 2 → floor 1, 1, 2, 2; the surplus of 1 is the highest's.
    assert to_experts([1, 1, 3, 5], 5, beta=1, shift="none", rounding="upstream") == [1, 1, 2, 1]
    # Shares of 10 are 3⅓ each: the missing one goes to the lowest, by index among equals.
    assert to_experts([1, 1, 1], 10, beta=1, shift="none", rounding="upstream") == [4, 3, 3]
    # Shares of 7: 2.33, 2.33, 2.33 with a lowest: 2.3, 2.3, 2.4.
    assert to_experts([24, 23, 23], 7, beta=1, shift="none", rounding="upstream") == [2, 3, 2]


@law
@given(any_scores, st.integers(0, 300), betas)
def test_upstream_meets_the_budget_or_says_that_it_cannot(scores, spare, beta):
    budget = len(scores) + spare
    try:
        outcome = to_experts(scores, budget, beta=beta, rounding="upstream")
    except ValueError as error:
        outcome = str(error)
    if isinstance(outcome, str):
        assert "use allocator.rounding=largest_remainder" in outcome
    else:
        assert sum(outcome) == budget
        assert min(outcome) >= 1


# Published figures


@pytest.mark.parametrize("task", TASKS)
def test_published_experts_spend_their_budget(task):
    counts = PUBLISHED_EXPERTS[task]
    assert len(counts) == 32
    assert sum(counts) == PUBLISHED_EXPERTS["budget"] == 160
    assert min(counts) == 1


@pytest.mark.parametrize("task", TASKS)
def test_published_experts_are_what_their_own_shares_round_to(task):
    counts = PUBLISHED_EXPERTS[task]
    beta = 2.5
    by_upstream = to_experts([n ** (1 / beta) for n in counts], 160, beta=beta, shift="none", rounding="upstream")
    assert by_upstream == counts
    assert to_experts([(n - 1) ** (1 / beta) for n in counts], 160, beta=beta) == counts


@pytest.mark.parametrize("scores", [PRUNING["smoothed"], None], ids=["published smoothing", "our smoothing"])
def test_published_sparsities_follow_from_the_published_scores(scores):
    numel = [PRUNING["block_numel"]] * 32
    if scores is None:
        scores = smooth(PRUNING["raw"])
    ours = to_sparsity(scores, numel, 0.5, epsilon=0.1)
    np.testing.assert_allclose(ours, PRUNING["sparsity_target0.5_epsilon0.1"], atol=1e-4)


def test_the_sparsity_allocator_gives_the_published_vector_from_raw_scores():
    names = tuple(f"layers.{l}" for l in range(32))
    layers = LayerMap(names, tuple((name,) for name in names), (PRUNING["block_numel"],) * 32)
    scores = LayerScores(names, tuple(PRUNING["raw"]), "undertrained", "published", "none")
    allocation = Sparsity(target=0.5, epsilon=0.1)(scores, layers)
    np.testing.assert_allclose(allocation.values, PRUNING["sparsity_target0.5_epsilon0.1"], atol=1e-4)


# Sparsity


@law
@given(
    st.lists(st.tuples(st.floats(0, 1e9), st.integers(1, 10**9)), min_size=1, max_size=40),
    st.floats(0, 1),
    st.floats(0, 0.999),
    st.floats(0.5, 1, exclude_max=True),
)
def test_sparsities_meet_the_target_within_bounds_and_keep_the_order(layers, target, epsilon, max_sparsity):
    assume(target <= max_sparsity)
    scores, numel = [s for s, _ in layers], [d for _, d in layers]
    sparsities = to_sparsity(scores, numel, target, epsilon=epsilon, max_sparsity=max_sparsity)
    assert np.average(sparsities, weights=numel) == pytest.approx(target, abs=1e-6)
    assert all(0 <= sparsity <= max_sparsity for sparsity in sparsities)
    by_score = [sparsity for _, sparsity in sorted(zip(scores, sparsities, strict=True))]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(by_score))


def test_sparsities_without_clipping_are_their_definition():
    scores, numel = [0.0, 1.0, 4.0], [10, 30, 20]
    relative = np.array([0.8, 0.9, 1.2])
    expected = relative * 0.5 * 60 / (relative * numel).sum()
    assert to_sparsity(scores, numel, 0.5, epsilon=0.2) == pytest.approx(expected.tolist())


def test_clipping_is_made_up_for_in_proportion():
    sparsities = to_sparsity([0.0, 0.5, 1.0], [1, 1, 1], 0.8, epsilon=0.3)
    assert sparsities[2] == 0.99
    assert sum(sparsities) / 3 == pytest.approx(0.8, abs=1e-12)
    assert sparsities[0] / sparsities[1] == pytest.approx(0.7 / 1.0)


def test_the_whole_feasible_range_is_reached():
    assert to_sparsity([0.0, 1.0], [3, 5], 0.99, epsilon=0.3) == pytest.approx([0.99, 0.99])
    assert to_sparsity([0.0, 1.0], [3, 5], 0.0, epsilon=0.3) == [0, 0]
    assert to_sparsity([0.0, 1.0], [5, 5], 0.495, epsilon=1.0) == pytest.approx([0, 0.99])


def test_an_infeasible_target_names_the_feasible_range():
    with pytest.raises(ValueError, match=r"target=0\.995 is outside the feasible range 0 to 0\.99; lower it, or raise"):
        to_sparsity([0.0, 1.0], [1, 1], 0.995, epsilon=0.1)
    with pytest.raises(ValueError, match=r"target=0\.6 .*epsilon=1\.0.*0 to 0\.495"):
        to_sparsity([0.0, 1.0], [1, 1], 0.6, epsilon=1.0)
    with pytest.raises(ValueError, match=r"0 to 0\.495"):
        to_sparsity([0.0, 1e-310, 1.0, 1.0], [1, 1, 1, 1], 0.6, epsilon=1.0)


# Refusals


def test_a_budget_below_the_floor_names_the_budget_to_use():
    message = r"budget=20 cannot give 32 layers 1 expert each; use allocator\.budget>=32"
    for rounding in ("largest_remainder", "upstream"):
        with pytest.raises(ValueError, match=message):
            to_experts([1.0] * 32, 20, beta=2.5, rounding=rounding)
    with pytest.raises(ValueError, match=r"budget=5 cannot give 3 layers 2 ranks each; use allocator\.budget>=6"):
        to_rank([1.0] * 3, 5, floor=2)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_scores_must_be_finite_and_not_negative(bad):
    for refused in (
        lambda: to_experts([1.0, bad], 4, beta=1),
        lambda: to_rank([1.0, bad], 4),
        lambda: to_sparsity([1.0, bad], [1, 1], 0.5, epsilon=0.1),
    ):
        with pytest.raises(ValueError, match=r"finite and >= 0.*index 1"):
            refused()


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: to_experts([], 4, beta=1), "at least one layer"),
        (lambda: to_experts([1.0], 4.5, beta=1), "budget=4.5 is not allowed"),  # pyright: ignore
        (lambda: to_experts([1.0], 4, beta=-1), "beta=-1"),
        (lambda: to_experts([1.0], 4, beta=1, shift="max"), "min, none"),  # pyright: ignore
        (lambda: to_experts([1.0], 4, beta=1, rounding="up"), "largest_remainder, upstream"),  # pyright: ignore
        (lambda: to_sparsity([1.0], [0], 0.5, epsilon=0.1), "sizes"),
        (lambda: to_sparsity([1.0], [1, 1], 0.5, epsilon=0.1), "sizes"),
        (lambda: to_sparsity([1.0], [1], 0.5, epsilon=1.5), r"epsilon=1\.5"),
        (lambda: to_sparsity([1.0], [1], 0.5, epsilon=0.1, max_sparsity=2), "max_sparsity=2"),
        (lambda: to_sparsity([1.0], [1], 0.5, epsilon=0.1, max_sparsity=1), "max_sparsity=1 is not allowed"),
        (lambda: to_experts([1.0], 4, beta=1, floor=0), "floor=0 is not allowed"),
        (lambda: to_rank([1.0], 4, floor=0), "floor=0 is not allowed"),
        (lambda: Sparsity(target=1.2), "target=1.2 is not allowed; allowed: a finite number of at least 0 and below 1"),
    ],
)
def test_bad_settings_are_refused_by_name(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


# Allocation and the allocators


NAMES = tuple(f"layers.{l}" for l in range(8))
LAYERS = LayerMap(NAMES, tuple((f"{name}.w",) for name in NAMES), tuple(range(10, 18)))
SCORES = LayerScores(NAMES, (0.5, 1.0, 2.0, 8.0, 4.0, 3.0, 1.0, 0.0), "undertrained", "test", "f1")


def test_an_allocation_checks_its_budget_on_construction():
    Allocation(("a", "b"), "experts", (1, 2), 3)
    with pytest.raises(ValueError, match="spend a budget of 3, not the 4 they were given; give budget=3"):
        Allocation(("a", "b"), "experts", (1, 2), 4)
    Allocation(("a", "b"), "sparsity", (0.2, 0.6), 0.3, (3, 1))
    with pytest.raises(ValueError, match=r"budget of 0\.4.* not the 0\.3"):
        Allocation(("a", "b"), "sparsity", (0.2, 0.6), 0.3, (1, 1))
    with pytest.raises(ValueError, match="needs sizes"):
        Allocation(("a", "b"), "sparsity", (0.2, 0.6), 0.4)
    assert Allocation(("a", "b"), "bits", (8.5, 4.5), 5.5, (1, 3)).budget == 5.5
    assert Allocation(("a", "b", "c"), "blocks", (1, 0, 1), 2).budget == 2


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("experts", (-1, 5), "experts of 'a' must be a whole number >= 0, got -1"),
        ("rank", (0, 0), "the rank of all 2 units is 0; give at least one of them 1"),
        ("rank", (1.5, 2.5), r"rank of 'a' must be a whole number >= 0, got 1\.5"),
        ("sparsity", (0.5, 1.5), r"sparsity of 'b' must be a fraction in \[0, 1\]"),
        ("bits", (4.5, 0), "bits of 'b' must be a number above 0 and at most 32, got 0"),
        ("bits", (33.0, 4.5), "bits of 'a' must be a number above 0 and at most 32"),
        ("blocks", (1, 2), "blocks of 'b' must be 0 or 1, got 2"),
        ("layers", (True, 1), "layers of 'a' must be 0 or 1, got True"),
        ("heads", (1, 3), "experts, rank, sparsity"),
        ("experts", (4,), "1 for 2 layers"),
    ],
)
def test_an_allocation_refuses_impossible_values_by_layer(kind, values, message):
    with pytest.raises(ValueError, match=message):
        Allocation(("a", "b"), kind, values, 4)


@pytest.mark.parametrize(
    "allocator", [Experts(), Experts(smoothing=True), Rank(), Sparsity(), Sparsity(smoothing=False)]
)
def test_allocators_spend_their_budget_by_name_in_any_order_of_scores(allocator):
    allocation = allocator(SCORES, LAYERS)
    assert allocation.units == NAMES
    assert Allocation.from_dict(json.loads(json.dumps(allocation.to_dict()))) == allocation
    assert list(allocation.by_name()) == list(NAMES)
    backwards = replace(SCORES, layers=NAMES[::-1], values=SCORES.values[::-1])
    assert allocator(backwards, LAYERS) == allocation


def test_default_budgets_are_the_papers_per_layer():
    assert Experts()(SCORES, LAYERS).budget == 5 * 8
    assert Rank()(SCORES, LAYERS).budget == 8 * 8
    assert Experts(budget=11)(SCORES, LAYERS).budget == 11


def test_important_layers_get_less_sparsity_and_more_experts():
    important = replace(SCORES, higher_means="important")
    plain = Sparsity(smoothing=False)
    assert Experts()(important, LAYERS) == Experts()(SCORES, LAYERS)
    assert np.argmax(plain(SCORES, LAYERS).values) == 3
    assert np.argmin(plain(important, LAYERS).values) == 3


def test_smoothing_spreads_a_peak_over_its_neighbours():
    peak = replace(SCORES, values=(0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0))
    assert Experts()(peak, LAYERS).values[3] == 33
    assert 1 < Experts(smoothing=True)(peak, LAYERS).values[3] < 33


def test_smoothing_too_few_layers_names_the_window():
    few = LayerMap(NAMES[:3], LAYERS.params[:3], LAYERS.numel[:3])
    with pytest.raises(ValueError, match="window=7"):
        Sparsity()(replace(SCORES, layers=NAMES[:3], values=SCORES.values[:3]), few)


def test_scores_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"'layer\.0'.*did you mean 'layers\.0'"):
        Experts()(replace(SCORES, layers=("layer.0", *NAMES[1:])), LAYERS)


def write(folder: Path, content: object) -> str:
    file = folder / "saved.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_file_reads_counts_by_name_as_list_and_from_a_record(tmp_path):
    counts = [1, 2, 3, 4, 5, 6, 7, 8]
    allocation = Allocation(NAMES, "experts", tuple(counts), 36)
    by_name = dict(zip(NAMES[::-1], counts[::-1], strict=True))
    of_0_1_0 = {
        "config": {},
        "layers": list(NAMES),
        "scores": [1] * 8,
        "allocation": {"kind": "experts", "budget": 36, "values": counts},
    }
    today = {"version": 2, "config": {}, "decision": {"scores": None, "allocation": allocation.to_dict()}}
    by_hand = {"layers": list(NAMES), "values": counts}
    alone = allocation.to_dict()
    for content in (by_name, counts, of_0_1_0, today, by_hand, alone, {"allocation": alone}):
        assert SavedAllocation(path=write(tmp_path, content))(SCORES, LAYERS) == allocation


def test_file_reads_sparsities(tmp_path):
    allocation = Sparsity()(SCORES, LAYERS)
    read = SavedAllocation(path=write(tmp_path, allocation.to_dict()), kind="sparsity")(SCORES, LAYERS)
    assert read.values == allocation.values
    assert read.budget == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**dict.fromkeys(NAMES[1:], 2), "layer.0": 2}, r"'layer\.0'.*did you mean 'layers\.0'"),
        (dict.fromkeys(NAMES[1:], 2), r"lacks 1 of the model's 8 layers.*'layers\.0'"),
        ([1, 2], "2 for 8 layers"),
        ([1, 2, 3, 4, 5, 6, 7, "8"], "numbers, got '8'"),
        ([1, 2, 3, 4, 5, 6, 7, -1], r"'layers\.7' must be a whole number >= 0, got -1"),
        ({"allocation": {"kind": "rank", "values": [1] * 8, "units": list(NAMES)}}, r"use allocator\.kind=rank"),
        ({"allocation": {}}, "holds no allocation"),
        ([1, 2], "there must be one value per layer, at least one, in allocation file"),
        ([1, 2, 3, 4, 5, 6, 7, 2.5], r"saved\.json': experts of 'layers\.7'.*got 2\.5"),
        ({"hello": "world"}, "names the layer 'hello', which this model does not have"),
        ("uniform", "a value per layer"),
    ],
)
def test_file_refuses_an_allocation_of_another_model_or_shape(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        SavedAllocation(path=write(tmp_path, content))(SCORES, LAYERS)


# Shapes over depth


def deep(depth: int) -> LayerMap:
    return LayerMap(tuple(f"layers.{l}" for l in range(depth)), (("q",),) * depth, (1,) * depth)


@pytest.mark.parametrize(
    ("shape", "depth", "runs", "budget"),
    [
        (2468, 32, [(2, 8), (4, 8), (6, 8), (8, 8)], 160),
        (5555, 32, [(5, 32)], 160),
        (8642, 32, [(8, 8), (6, 8), (4, 8), (2, 8)], 160),
        (3578, 28, [(3, 7), (5, 7), (7, 8), (8, 6)], 160),  # as published for Gemma-7B
        ("2468", 30, [(2, 8), (4, 7), (6, 7), (8, 8)], 150),
        (5555, 30, [(5, 30)], 150),
        (8642, 30, [(8, 8), (6, 7), (4, 7), (2, 8)], 150),
        ([1, 9, 1], 7, [(1, 2), (9, 3), (1, 2)], 31),
        ([1, 12], 8, [(1, 4), (12, 4)], 52),
        ([3, 1, 2], 3, [(3, 1), (1, 1), (2, 1)], 6),
    ],
)
def test_a_shape_gives_each_group_its_count(shape, depth, runs, budget):
    layers = deep(depth)
    allocation = Shape(shape=shape)(SCORES, layers)
    assert [(value, len(list(group))) for value, group in itertools.groupby(allocation.values)] == runs
    assert (allocation.budget, allocation.kind, allocation.units) == (budget, "experts", layers.names)
    assert Shape(shape=shape, budget=budget)(SCORES, layers) == allocation


@pytest.mark.parametrize("depth", range(4, 40, 2))
def test_groups_are_symmetric_and_cover_every_layer(depth):
    up, down = Shape(shape=2468)(SCORES, deep(depth)), Shape(shape=8642)(SCORES, deep(depth))
    assert up.values == down.values[::-1]
    assert len(up.values) == depth


def test_groups_may_be_given_and_ranks_have_shapes_too():
    allocation = Shape(shape=[4, 2], groups=[1, 7], kind="rank")(SCORES, LAYERS)
    assert (allocation.values, allocation.kind) == ((4, *[2] * 7), "rank")
    assert Shape(shape=2468).source == "shape(2-4-6-8)"


@pytest.mark.parametrize(
    ("settings", "depth", "message"),
    [
        ({"shape": 2468, "budget": 150}, 32, r"8, 8, 8, 8 layers adds up to 160, not to allocator\.budget=150"),
        ({"shape": 2468}, 27, r"27 layers make no 4 symmetric groups.*allocator\.groups=\[7, 7, 7, 6\]"),
        ({"shape": 2468}, 3, "4 counts for 3 layers"),
        ({"shape": [1, 2], "groups": [1, 2]}, 4, "hold 3 layers, the model has 4; give sizes"),
        ({"shape": [1, 2], "groups": [4]}, 4, "each of the 2 counts"),
        ({"shape": [1, 2], "groups": [4, 0]}, 4, "groups=0 is not allowed"),
        ({"shape": "2x"}, 4, "digits such as 2468"),
        ({"shape": 2048}, 32, r"allocator\.shape=0 is not allowed"),
        ({"shape": []}, 32, "is empty"),
    ],
)
def test_impossible_shapes_are_refused(settings, depth, message):
    with pytest.raises(ValueError, match=message):
        Shape(**settings)(SCORES, deep(depth))


# The map of OWL, DLP and LSA


@law
@given(
    layers=st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**9)), min_size=1, max_size=20),
    target=st.floats(0, 0.9),
    epsilon=st.floats(0, 1),
    max_sparsity=st.floats(0.9, 1, exclude_max=True),
)
def test_shifted_sparsities_meet_any_target_within_bounds_and_keep_the_order(layers, target, epsilon, max_sparsity):
    scores, numel = map(list, zip(*layers, strict=True))
    sparsities = to_sparsity(scores, numel, target, epsilon=epsilon, max_sparsity=max_sparsity, rule="shifted")
    assert math.fsum(s * d for s, d in zip(sparsities, numel, strict=True)) / sum(numel) == pytest.approx(
        target, abs=1e-6
    )
    assert all(0 <= sparsity <= max_sparsity for sparsity in sparsities)
    for (one, s), (other, t) in itertools.combinations(zip(scores, sparsities, strict=True), 2):
        assert (one - other) * (s - t) >= 0


def test_shifted_sparsities_without_clipping_are_lsas_formula():
    errors, beta, target = [3.0, 1.0, 2.0, 5.0], 0.07, 0.6
    importance = [1 - error / sum(errors) for error in errors]
    low, high = min(importance), max(importance)
    d = [(each - low) / (high - low) * 2 * beta for each in importance]
    expected = [target + sum(d) / 4 - each for each in d]
    layers = LayerMap(NAMES[:4], LAYERS.params[:4], (7,) * 4)
    scores = LayerScores(NAMES[:4], tuple(importance), "important", "lsa", "f")
    allocation = Sparsity(target=target, epsilon=beta, smoothing=False, rule="shifted")(scores, layers)
    assert allocation.values == pytest.approx(expected, abs=1e-12)
    assert max(allocation.values) == allocation.values[3]


def test_shifted_sparsities_without_clipping_are_owls_formula():
    outliers, numel, target, owl_lambda = [3.0, 1.0, 2.0, 5.0], [1, 2, 3, 4], 0.6, 0.08
    x = [(d - 1) / 4 * 2 * owl_lambda for d in outliers]  # min-max to [0, 2λ]
    mean = sum(a * d for a, d in zip(x, numel, strict=True)) / sum(numel)
    expected = [target - a + mean for a in x]
    layers = LayerMap(NAMES[:4], LAYERS.params[:4], tuple(numel))
    scores = LayerScores(NAMES[:4], tuple(outliers), "important", "outlier", "f")
    allocation = Sparsity(target=target, epsilon=owl_lambda, smoothing=False, rule="shifted")(scores, layers)
    assert allocation.values == pytest.approx(expected, abs=1e-12)


# Files: every allocator has its configuration


ALLOCATORS = {
    "experts": Experts,
    "rank": Rank,
    "sparsity": Sparsity,
    "file": SavedAllocation,
    "shape": Shape,
    "bits": Bits,
    "knapsack": Knapsack,
    "depth": Depth,
    "water_filling": WaterFilling,
    "blocks": Blocks,
    "layers": Layers,
    "position": Position,
}


@pytest.mark.parametrize("stem", ALLOCATORS)
def test_every_allocator_has_a_yaml_that_binds_with_every_field(stem):
    cls = ALLOCATORS[stem]
    config = OmegaConf.load(CONF / f"{stem}.yaml")
    assert [str(key) for key in config] == ["_target_", *(field.name for field in fields(cls))]
    given = {"file": {"path": "allocation.json"}, "shape": {"shape": 2468}}.get(stem, {})
    config.update(given)
    root = OmegaConf.load(CONF.parent / "config.yaml")
    assert instantiate(OmegaConf.create({"allocator": config, "recipe": root.recipe}).allocator) == cls(**given)


def test_every_yaml_is_an_allocator():
    files = {file.stem: OmegaConf.load(file) for file in CONF.glob("*.yaml")}
    assert sorted(stem for stem, config in files.items() if "_target_" in config) == sorted(ALLOCATORS)
    for config in files.values():  # or a variant of one
        if "_target_" not in config:
            base = ALLOCATORS[config.defaults[0]]
            assert set(map(str, config)) - {"defaults"} <= {field.name for field in fields(base)}
