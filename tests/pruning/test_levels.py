"""Masks at several levels are those of the pruner itself, nested and of exact count; what is skipped stays dense."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerif.layers import LayerMap, check_named, is_named
from layerif.models.blocks import blocks, layer_map
from layerif.pruning import Pruner, name_of_pruner, pruner_called
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.mask import lowest, lowest_at_counts, lowest_per_row, lowest_per_row_at_counts, num_removed
from layerif.pruning.sparsegpt import SparseGPT
from layerif.pruning.targets import matrices, targets
from layerif.pruning.walk import Walk
from layerif.pruning.wanda import Wanda
from tests.tiny import VOCAB_SIZE, tiny_model

LEVELS = (0.0, 0.13, 0.2, 0.5, 0.505, 0.77, 0.9, 1.0)
PRUNERS = [Magnitude(), Wanda(), Wanda(compare="cumulative"), SparseGPT(block_size=8), Wanda(swaps=True)]
OF_M = [Magnitude(m=4), Wanda(m=8), SparseGPT(m=4), Wanda(n=2, m=4), Magnitude(m=4, swaps=True)]


def called(pruner: Pruner) -> str:
    return pruner.called


def problem(pruner: Pruner, outputs: int = 12, inputs: int = 16) -> tuple[Tensor, Any]:
    """A weight, and what the pruner makes of its inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)
    input_TI = torch.randn(50, inputs, dtype=torch.float64, generator=generator)
    input_TI *= torch.rand(inputs, dtype=torch.float64, generator=generator) * 5
    return weight, pruner.prepare(pruner.observe(None, input_TI), 5, name="a") if pruner.needs_inputs else None


@pytest.mark.parametrize("pruner", PRUNERS, ids=called)
def test_several_levels_are_the_pruner_at_each_of_them(pruner):
    weight, shared = problem(pruner)
    before = weight.clone()
    found = list(pruner.at_levels(weight, shared, LEVELS))
    assert torch.equal(weight, before)
    assert len(found) == len(LEVELS)
    for level, pruned in zip(LEVELS, found, strict=True):
        assert torch.equal(pruned, pruner(weight, shared, level, None))
        assert int((pruned == 0).sum()) == int(level * 192 + 0.5)


@pytest.mark.parametrize("pruner", OF_M, ids=lambda pruner: f"{pruner.called} n={pruner.n}")
def test_levels_of_m_are_the_pruner_at_each_n(pruner):
    weight, shared = problem(pruner)
    levels = pruner.levels()
    kept = [2] if pruner.n else list(range(pruner.m - 1, 0, -1))
    assert levels == tuple(1 - n / pruner.m for n in kept)
    for n, pruned in zip(kept, pruner.at_levels(weight, shared, levels), strict=True):
        assert torch.equal(pruned, pruner(weight, shared, None, n))
        assert bool(((pruned != 0).view(12, -1, pruner.m).sum(2) == n).all())


def test_without_m_any_level_can_be_had():
    assert all(pruner.levels() == () for pruner in PRUNERS)


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), Wanda(compare="cumulative"), Wanda(m=8)], ids=called)
def test_a_higher_level_removes_what_a_lower_one_does(pruner):
    weight, shared = problem(pruner)
    removed = [pruned == 0 for pruned in pruner.at_levels(weight, shared, pruner.levels() or LEVELS)]
    assert all(bool((higher | ~lower).all()) for lower, higher in itertools.pairwise(removed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pruner", [Magnitude(), Wanda()], ids=called)
def test_counts_are_exact_among_equal_weights(pruner, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(1, 4, (12, 16), generator=generator).to(dtype)
    for level, pruned in zip(LEVELS, pruner.at_levels(weight, torch.ones(16), LEVELS), strict=True):
        per_row = (pruned == 0).sum(1)
        assert pruned.dtype == dtype
        assert int(per_row.sum()) == int(level * 192 + 0.5)
        if isinstance(pruner, Wanda):
            assert int(per_row.max() - per_row.min()) <= 1


# The masks of a metric

sizes = {"rows": st.integers(1, 7), "columns": st.integers(1, 9), "seed": st.integers(0, 99)}
shares = st.lists(st.floats(0, 1), min_size=1, max_size=5)


def metric(rows: int, columns: int, seed: int, *, ties: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(3, (rows, columns), generator=generator).double()
    return torch.randperm(rows * columns, generator=generator).view(rows, columns).double()


@given(shares=shares, ties=st.booleans(), **sizes)
def test_one_sorting_of_a_matrix_gives_the_masks_of_every_count(rows, columns, seed, ties, shares):
    values = metric(rows, columns, seed, ties=ties)
    counts = [round(share * values.numel()) for share in shares]
    for count, mask in zip(counts, lowest_at_counts(values, counts), strict=True):
        assert torch.equal(mask, lowest(values, count))


@given(shares=shares, **sizes)
def test_one_sorting_of_the_rows_gives_the_masks_of_every_count(rows, columns, seed, shares):
    values = metric(rows, columns, seed, ties=False)
    counts = [round(share * values.numel()) for share in shares]
    for count, mask in zip(counts, lowest_per_row_at_counts(values, counts), strict=True):
        assert torch.equal(mask, lowest_per_row(values, count))


@given(shares=shares, **sizes)
def test_among_equal_entries_rows_still_lose_their_lowest_in_exact_number(rows, columns, seed, shares):
    values = metric(rows, columns, seed, ties=True)
    counts = [round(share * values.numel()) for share in shares]
    for count, mask in zip(counts, lowest_per_row_at_counts(values, counts), strict=True):
        per_row, alone = mask.sum(1), lowest_per_row(values, count)
        assert int(per_row.sum()) == count
        assert int(per_row.max() - per_row.min()) <= 1
        assert float(values[mask].sum()) == float(values[alone].sum())
        for row, removed in zip(values, mask, strict=True):
            if removed.any() and not removed.all():
                assert row[removed].max() <= row[~removed].min()


# What stays dense

EVERY = [Magnitude, Wanda, SparseGPT]
SKIPPED = ("down_proj", "model.layers.1", "model.layers.0.self_attn.q_proj")


def is_skipped(name: str) -> bool:
    return name.endswith("down_proj") or ".1." in name or name == SKIPPED[2]


@pytest.mark.parametrize("settings", [{}, {"n": 2, "m": 4}], ids=["any", "2:4"])
@pytest.mark.parametrize("kind", EVERY)
def test_what_is_skipped_stays_dense_to_the_bit_and_the_budget_counts_the_others_only(kind, settings):
    model, pruner = tiny_model(), kind(skip=SKIPPED, **settings)
    before = {name: module.weight.detach().clone() for name, module in matrices(model).items()}
    sparsity = 0.5 if settings else 0.37
    wanted = targets(model, dict.fromkeys(blocks(model), sparsity), pruner)
    window = torch.randint(VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
    walk = Walk(model, pruner, wanted, [window] if pruner.needs_inputs else [], None)
    for index in range(3):
        walk(index)
    after = {name: module.weight for name, module in matrices(model).items()}
    dense = {name for name in before if torch.equal(before[name], after[name])}
    assert dense == {name for name in before if is_skipped(name)}
    others = [name for name in before if name not in dense]
    assert len(others) == 2 * 5 + 1  # two of three blocks without down_proj, and one of these without q_proj
    removed = sum(int((after[name] == 0).sum()) for name in others)
    assert abs(removed - Fraction(sparsity) * sum(before[name].numel() for name in others)) <= Fraction(1, 2)


@pytest.mark.parametrize("kind", EVERY)
def test_skipped_matrices_need_no_sparsity_and_change_no_other(kind):
    model, pruner = tiny_model(), kind(skip=["model.layers.1"])
    found = targets(model, {"model.layers.0": 0.3, "model.layers.2": 0.6}, pruner)
    assert {target.sparsity for target in found["model.layers.1"].values()} == {0.0}
    named = targets(model, {"model.layers.0": 0.3, "model.layers.1": 0.9, "model.layers.2": 0.6}, pruner)
    assert named == found


def small() -> LayerMap:
    return LayerMap(
        ("layers.1", "layers.12"),
        (("layers.1.mlp.up.weight", "layers.1.mlp.down.weight"), ("layers.12.mlp.up.weight",)),
        (30, 5),
        (10, 20, 5),
    )


def test_layers_without_some_matrices_count_the_others():
    layers = small()
    assert layers.without(()) is layers
    left = layers.without(["down"])
    assert (left.names, left.numel, left.matrix_numel) == (("layers.1", "layers.12"), (10, 5), (10, 5))
    assert left.matrices == ("layers.1.mlp.up.weight", "layers.12.mlp.up.weight")
    left = layers.without(["layers.1"])  # and not layers.12
    assert (left.names, left.params) == (("layers.12",), (("layers.12.mlp.up.weight",),))
    assert left.matrix_numel == (5,)
    with pytest.raises(ValueError, match=r"pruner\.skip=\['up', 'down'\] leaves no matrix; name fewer"):
        layers.without(["up", "down"])


def test_layers_of_a_model_without_matrices_are_those_that_are_pruned():
    model = tiny_model()
    left = layer_map(model, scope="all").without(SKIPPED)
    wanted = targets(model, dict.fromkeys(blocks(model), 0.5), Magnitude(skip=SKIPPED))
    pruned = {f"{block}.{name}.weight" for block, of in wanted.items() for name, each in of.items() if each.sparsity}
    assert {*left.matrices} == pruned
    assert left.numel == tuple(sum(model.get_parameter(param).numel() for param in of) for of in left.params)


@pytest.mark.parametrize(
    ("pattern", "is_meant"),
    [
        ("model.layers.1.mlp.down_proj", True),
        ("mlp.down_proj", True),
        ("down_proj", True),
        ("model.layers.1.mlp", True),
        ("model.layers.1", True),
        ("proj", False),
        ("p.down_proj", False),
        ("model.layers.1.mlp.down", False),
        ("model.layers.10", False),
        ("mlp", False),
        ("weight", False),
        ("", False),
    ],
)
def test_a_name_means_a_matrix_an_end_of_its_name_or_what_holds_it(pattern, is_meant):
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj"):
        assert is_named(name, [pattern]) == is_meant
        assert is_named(name, ["other", pattern]) == is_meant
    assert not is_named("model.layers.12.mlp.down_proj.weight", ["model.layers.1"])


def test_an_unknown_name_is_refused_with_the_nearest():
    params = small().matrices
    check_named(params, ["up", "layers.1", "mlp.down"])
    words = (
        r"pruner\.skip names 'dwon', and the model has no such matrix \(did you mean 'down'\?\); name a matrix, the "
    )
    for refused in (lambda: check_named(params, ["up", "dwon"]), lambda: small().without(["dwon"])):
        with pytest.raises(ValueError, match=words + r"end of its name \(down, up\) or a block"):
            refused()
    with pytest.raises(ValueError, match=r"pruner\.skip names 'down_porj'.*\(did you mean 'down_proj'"):
        targets(tiny_model(), {"model.layers.0": 0.5}, Magnitude(skip=["down_porj"]))


# Names of pruners


def test_a_pruner_is_made_from_the_name_of_its_file():
    for pruner in (Magnitude(), Wanda(), SparseGPT()):
        assert pruner_called(name_of_pruner(pruner)) == pruner
    assert pruner_called("wanda", m=4, skip=("up",)) == Wanda(m=4, skip=("up",))
    with pytest.raises(ValueError, match=r"pruner='wnda' is not allowed; .*\(did you mean 'wanda'"):
        pruner_called("wnda")


def test_a_pruner_is_called_by_what_its_masks_depend_on():
    assert Wanda(skip=["down_proj"], paper_epsilon=0.3).called == Wanda().called == "wanda(compare=row)"
    assert Wanda(compare="cumulative").called != Wanda().called
    assert SparseGPT(damping=0.1).called != SparseGPT().called
    assert Magnitude(m=4).called == "magnitude(m=4)"


def test_the_number_removed_is_rounded_half_up():
    assert [num_removed(level, 10) for level in (0.0, 0.04, 0.05, 0.25, 1.0)] == [0, 0, 1, 3, 10]
