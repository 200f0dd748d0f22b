"""Counts are exact: of a matrix, of rows, of groups, and of all matrices together."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerif.pruning.mask import counts, kept_of_m, lowest, lowest_per_group, lowest_per_row


def metric(rows: int, columns: int, seed: int, *, ties: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(3, (rows, columns), generator=generator).double()
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64)


sizes = {"rows": st.integers(1, 7), "columns": st.integers(1, 9), "seed": st.integers(0, 99), "ties": st.booleans()}


@given(share=st.floats(0, 1), **sizes)
def test_the_lowest_of_a_matrix_are_exactly_as_many_as_asked_for(rows, columns, seed, ties, share):
    values = metric(rows, columns, seed, ties=ties)
    count = round(share * values.numel())
    mask = lowest(values, count)
    assert int(mask.sum()) == count
    if 0 < count < values.numel():
        assert values[mask].max() <= values[~mask].min()


@given(share=st.floats(0, 1), **sizes)
def test_rows_lose_their_lowest_as_evenly_as_whole_numbers_allow(rows, columns, seed, ties, share):
    values = metric(rows, columns, seed, ties=ties)
    count = round(share * values.numel())
    mask = lowest_per_row(values, count)
    per_row = mask.sum(dim=1)
    assert int(per_row.sum()) == count
    assert int(per_row.max() - per_row.min()) <= 1
    for row, removed in zip(values, mask, strict=True):
        if removed.any() and not removed.all():
            assert row[removed].max() <= row[~removed].min()


def test_what_does_not_divide_by_rows_goes_where_the_next_weight_is_lowest():
    values = torch.tensor([[1.0, 9.0, 9.5], [2.0, 3.0, 9.0], [1.5, 8.0, 9.0]])
    assert lowest_per_row(values, 4).tolist() == [[True, False, False], [True, True, False], [True, False, False]]


@given(n=st.integers(0, 4), groups=st.integers(1, 3), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_groups_keep_their_n_highest(n, groups, rows, seed):
    values = metric(rows, 4 * groups, seed)
    mask = lowest_per_group(values, n, 4).view(rows, groups, 4)
    assert bool(((~mask).sum(dim=2) == n).all())
    for removed, group in zip(mask.flatten(0, 1), values.view(-1, 4), strict=True):
        if 0 < n < 4:
            assert group[removed].max() < group[~removed].min()


def test_a_width_that_the_group_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="10 inputs cannot be cut into groups of m=4"):
        lowest_per_group(torch.zeros(2, 10), 2, 4)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=20))
def test_all_matrices_together_lose_the_rounded_total(given_matrices):
    sparsities = {str(i): sparsity for i, (sparsity, _) in enumerate(given_matrices)}
    numel = {str(i): size for i, (_, size) in enumerate(given_matrices)}
    found = counts(sparsities, numel)
    exact = sum(Fraction(sparsities[name]) * numel[name] for name in numel)
    assert abs(sum(found.values()) - exact) <= Fraction(1, 2)
    for name, count in found.items():
        assert abs(count - Fraction(sparsities[name]) * numel[name]) <= 1
        assert 0 <= count <= numel[name]


@given(st.lists(st.floats(0.1, 0.85), min_size=1, max_size=32))
def test_mixed_groups_of_equal_blocks_meet_the_mean_to_half_a_weight_of_a_group(sparsities):
    named = {str(i): sparsity for i, sparsity in enumerate(sparsities)}
    kept = kept_of_m(named, dict.fromkeys(named, 1000), 8)
    removed = [8 - n for n in kept.values()]
    assert abs(sum(removed) - 8 * sum(sparsities)) <= 0.5 + 1e-6
    assert all(abs(count - 8 * sparsity) < 1 + 1e-6 for count, sparsity in zip(removed, sparsities, strict=True))


def test_mixed_groups_of_exact_eighths_are_those_eighths_and_never_empty():
    assert kept_of_m({"a": 0.5, "b": 0.625, "c": 0.25}, {"a": 3, "b": 5, "c": 7}, 8) == {"a": 4, "b": 3, "c": 6}
    assert kept_of_m({"a": 0.99, "b": 0.99}, {"a": 1, "b": 1}, 8) == {"a": 1, "b": 1}
