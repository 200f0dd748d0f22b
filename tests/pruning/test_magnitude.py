"""Magnitude pruning equals sorting the weights."""

from __future__ import annotations

import pytest
import torch

from layerif.pruning.magnitude import Magnitude, magnitude_mask


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_the_smallest_weights_of_the_matrix_go(sparsity):
    weight = torch.randn(13, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = magnitude_mask(weight, sparsity)
    order = weight.abs().flatten().sort().indices[: round(sparsity * 130)]
    assert sorted(order.tolist()) == mask.flatten().nonzero()[:, 0].tolist()
    pruned = Magnitude()(weight, None, sparsity, None)
    assert torch.equal(pruned, torch.where(mask, 0, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_many_equal_weights_and_still_the_exact_count(dtype):
    weight = torch.randint(-3, 4, (40, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert int(magnitude_mask(weight, 0.37).sum()) == 592


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_n_of_every_m_stay(n, m):
    weight = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = magnitude_mask(weight, n=n, m=m)
    for row, removed in zip(weight.abs(), mask, strict=True):
        for start in range(0, 16, m):
            group = row[start : start + m]
            expected = group < group.sort(descending=True).values[n - 1]
            assert torch.equal(removed[start : start + m], expected)
    assert torch.equal(Magnitude(n=n, m=m)(weight, None, None, n), weight.masked_fill(mask, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a sparsity, or n and m"),
        ({"n": 2}, "give a sparsity, or n and m"),
        ({"sparsity": 1.2}, "allowed: a number from 0 to 1"),
        ({"sparsity": 0.6, "n": 2, "m": 4}, "is not the 0.5 of 2:4"),
        ({"n": 5, "m": 4}, "cannot be kept"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        magnitude_mask(torch.zeros(4, 8), **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"n": 2}, r"needs pruner\.m"), ({"n": 4, "m": 4}, r"pruner\.n=4 must be below pruner\.m=4")],
)
def test_impossible_patterns_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Magnitude(**settings)
