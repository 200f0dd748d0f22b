"""Wanda equals its definition, row by row, and its variant the bisection that it replaces."""

from __future__ import annotations

import pytest
import torch

from layerif.pruning.wanda import Wanda, wanda_mask


def problem(outputs: int = 12, inputs: int = 16, tokens: int = 50):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)
    scale = torch.rand(inputs, dtype=torch.float64, generator=generator) * 5
    return weight, torch.randn(tokens, inputs, dtype=torch.float64, generator=generator) * scale


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_each_row_loses_the_weights_of_least_size_times_input_norm(sparsity):
    weight, inputs = problem()
    mask = wanda_mask(weight, inputs.square().sum(0), sparsity)
    for row in range(12):
        metric = [abs(float(weight[row, j])) * float(torch.linalg.vector_norm(inputs[:, j])) for j in range(16)]
        lowest = sorted(range(16), key=metric.__getitem__)[: int(16 * sparsity)]
        assert sorted(lowest) == mask[row].nonzero()[:, 0].tolist()


def test_a_sparsity_that_rows_cannot_meet_is_met_by_the_matrix():
    weight, inputs = problem()
    for hundredths in range(101):
        mask = wanda_mask(weight, inputs.square().sum(0), hundredths / 100)
        assert int(mask.sum()) == int(hundredths / 100 * 192 + 0.5)
        assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_n_of_every_m_stay_whatever_the_unit_of_the_norms(n, m):
    weight, inputs = problem()
    norms = inputs.square().sum(0)
    mask = wanda_mask(weight, norms, n=n, m=m)
    assert bool((mask.view(12, -1, m).sum(2) == m - n).all())
    metric = (weight.abs() * norms.sqrt()).view(12, -1, m)
    kept = metric.masked_fill(mask.view(12, -1, m), float("inf")).amin(2)
    assert bool((kept >= metric.masked_fill(~mask.view(12, -1, m), 0).amax(2)).all())
    assert torch.equal(mask, wanda_mask(weight, 7 * norms, n=n, m=m))


def test_the_variant_is_the_limit_of_the_bisection_over_alpha():
    """Remove, in every row, the lowest weights whose running sum is at most α of the row's; bisect α to the target."""
    weight, inputs = problem()
    norms, target = inputs.square().sum(0), 0.5
    metric = weight.abs() * norms.sqrt()
    ascending, order = metric.sort(dim=1)
    low, high, removed = 0.0, 1.0, torch.zeros_like(metric, dtype=torch.bool)
    for _ in range(100):
        alpha = (low + high) / 2
        fits = ascending.cumsum(1) <= alpha * ascending.sum(1, keepdim=True)
        removed = torch.zeros_like(fits).scatter(1, order, fits)
        low, high = (alpha, high) if removed.double().mean() < target else (low, alpha)
        if int(removed.sum()) == 96:
            break
    mask = wanda_mask(weight, norms, target, compare="cumulative")
    assert int(mask.sum()) == 96
    assert torch.equal(mask, removed)
    assert not torch.equal(mask, wanda_mask(weight, norms, target))


def test_the_statistic_is_the_sum_of_squares_over_batches():
    _, inputs = problem()
    statistic = None
    for part in inputs.split([20, 30]):
        statistic = Wanda().observe(statistic, part)
    assert statistic is not None
    torch.testing.assert_close(statistic, inputs.square().sum(0))
    assert Wanda().observe(None, inputs.bfloat16()).dtype == torch.float32


def test_bad_settings_are_refused():
    weight, inputs = problem()
    with pytest.raises(ValueError, match="one entry for each of the weight's 16 inputs"):
        wanda_mask(weight, inputs.square().sum(0)[:-1], 0.5)
    with pytest.raises(ValueError, match="did you mean 'row'"):
        Wanda(compare="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compare=row"):
        Wanda(compare="cumulative", n=2, m=4)
