"""SparseGPT equals optimal brain surgery written out with dense inverses, in float64."""

from __future__ import annotations

import pytest
import torch

from layerif.pruning.sparsegpt import SparseGPT, inverse_factor, sparsegpt


def problem(outputs: int = 10, inputs: int = 24, tokens: int = 80, dead: tuple[int, ...] = ()):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)
    mixing = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    samples = torch.randn(tokens, inputs, dtype=torch.float64, generator=generator) @ mixing
    samples[:, list(dead)] = 0
    return weight, 2 * samples.T @ samples / 4, samples


def textbook(weight, hessian, *, sparsity=None, n=None, m=None, block_size, damping):
    """Column by column: the rest of the row makes up for a removed weight, by the inverse of what is left of H."""
    weight, hessian = weight.clone(), hessian.clone()
    outputs, inputs = weight.shape
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    left = [torch.linalg.inv(hessian[j:, j:]) for j in range(inputs)]  # [H_{j:,j:}]⁻¹
    removed = torch.zeros(outputs, inputs, dtype=torch.bool)
    for start in range(0, inputs, block_size):
        end = min(start + block_size, inputs)
        cost = torch.stack([weight[:, j] ** 2 / left[j][0, 0] for j in range(start, end)], dim=1)
        if m is None:
            count = int(sparsity * outputs * end + 0.5) - int(sparsity * outputs * start + 0.5)
            order = cost.flatten().argsort()[:count]
            chosen = torch.zeros(cost.numel(), dtype=torch.bool)
            chosen[order] = True
            removed[:, start:end] = chosen.view_as(cost)
        for j in range(start, end):
            if m is not None and j % m == 0:
                cost = torch.stack([weight[:, k] ** 2 / left[k][0, 0] for k in range(j, j + m)], dim=1)
                order = cost.argsort(dim=1)[:, : m - n]
                removed[:, j : j + m] = torch.zeros_like(cost, dtype=torch.bool).scatter(1, order, True)
            error = torch.where(removed[:, j], weight[:, j] / left[j][0, 0], 0)
            weight[:, j:] -= error[:, None] * left[j][0][None, :]
            weight[removed[:, j], j] = 0
    return weight


@pytest.mark.parametrize("dead", [(), (3, 17)])
@pytest.mark.parametrize("block_size", [8, 16, 128])
@pytest.mark.parametrize("request_", [{"sparsity": 0.5}, {"sparsity": 0.37}, {"n": 2, "m": 4}, {"n": 3, "m": 8}])
def test_it_equals_the_dense_textbook_reference(request_, block_size, dead):
    weight, hessian, _ = problem(dead=dead)
    ours = sparsegpt(weight, hessian, **request_, block_size=block_size, damping=0.01)
    expected = textbook(weight, hessian, **request_, block_size=block_size, damping=0.01)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(ours == 0, expected == 0)


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, hessian, _ = problem()
    factor, is_dead = inverse_factor(hessian, damping=0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor, expected, rtol=1e-8, atol=1e-12)
    assert not bool(is_dead.any())


def test_the_count_is_exact_and_the_hessian_stays_as_it_was():
    weight, hessian, _ = problem()
    before = hessian.clone()
    for hundredths in range(0, 101, 7):
        pruned = sparsegpt(weight, hessian, hundredths / 100, block_size=8)
        assert int((pruned == 0).sum()) == int(hundredths / 100 * 240 + 0.5)
    assert torch.equal(hessian, before)
    assert torch.equal(sparsegpt(weight, hessian, 0.0), weight)


def test_it_loses_less_of_the_output_than_masking_alone():
    weight, hessian, samples = problem()
    pruned = sparsegpt(weight, hessian, 0.5)
    masked = weight.masked_fill(pruned == 0, 0)
    lost = [float((samples @ (weight - other).T).square().sum()) for other in (pruned, masked)]
    assert lost[0] < 0.8 * lost[1]


def test_float32_is_near_and_half_precision_comes_back_as_it_was():
    weight, hessian, _ = problem()
    exact = sparsegpt(weight, hessian, 0.5)
    torch.testing.assert_close(sparsegpt(weight.float(), hessian.float(), 0.5).double(), exact, rtol=1e-3, atol=1e-3)
    assert sparsegpt(weight.bfloat16(), hessian.float(), 0.5).dtype == torch.bfloat16


def test_the_statistic_is_twice_the_sum_of_outer_products_over_the_samples():
    _, _, samples = problem()
    pruner = SparseGPT(damping=0.0)
    statistic = None
    for part in samples.split([30, 50]):
        statistic = pruner.observe(statistic, part)
    assert statistic is not None
    factor, _ = pruner.prepare(statistic, 4, name="x")
    torch.testing.assert_close(torch.linalg.inv(factor.T @ factor), 2 * samples.T @ samples / 4)
    assert pruner.observe(None, samples.bfloat16()).dtype == torch.float32


def test_a_hessian_that_is_not_positive_definite_names_its_matrix_and_the_damping_to_try():
    weight, hessian, _ = problem(tokens=5)
    broken = hessian - 0.1 * torch.eye(24, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"Hessian of layers\.0\.q_proj .*pruner\.damping=1e-06; try pruner\.damping=0\.001"
    ):
        sparsegpt(weight, broken, 0.5, damping=1e-6, name="layers.0.q_proj")
    with pytest.raises(ValueError, match=r"try pruner\.damping=0\.1"):
        inverse_factor(-hessian, damping=0.01)


def test_a_slab_holds_whole_groups():
    with pytest.raises(ValueError, match=r"block_size=12 must be a multiple of pruner\.m=8"):
        SparseGPT(block_size=12, m=8, n=4)
