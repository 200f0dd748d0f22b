"""The prices equal their dense definitions, and the chosen positions speak for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerif.models.loss import summed_loss
from layerif.probe.curves.prices import costs_of, diagonal_costs, effects
from layerif.probe.curves.text import LossText
from tests.probe.curves.test_measure import LENGTHS, WEIGHTS, loss_text, model_of

OUTPUTS, INPUTS, LEVELS = 5, 7, 3


def factors(seed: int = 0, positions: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs, output gradients, weights and halves of the positions, and the changes at all levels (K×O×I)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((positions, INPUTS), (positions, OUTPUTS), (LEVELS, OUTPUTS, INPUTS))
    input_VI, delta_VO, change_KOI = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    weights_V = torch.rand(positions, generator=generator, dtype=torch.float64)
    return input_VI, delta_VO, weights_V, torch.rand(positions, generator=generator) < 0.5, change_KOI


@pytest.mark.parametrize("rows", [1, 4, 23, 4096])
def test_the_effect_of_a_change_is_its_inner_product_with_each_positions_gradient(rows):
    input_VI, delta_VO, _, _, change_KOI = factors()
    expected_KV = torch.einsum("vo,koi,vi->kv", delta_VO, change_KOI, input_VI)
    torch.testing.assert_close(effects(input_VI, delta_VO, change_KOI, rows), expected_KV, rtol=1e-12, atol=1e-13)


def test_the_exact_form_squares_the_effect_and_the_diagonal_form_every_weights_part_of_it():
    input_VI, delta_VO, weights_V, is_second_V, change_KOI = factors()
    parts_KVOI = torch.einsum("vo,koi,vi->kvoi", delta_VO, change_KOI, input_VI)
    exact_KV, diagonal_KV = parts_KVOI.sum((2, 3)).square(), parts_KVOI.square().sum((2, 3))
    exact = costs_of(effects(input_VI, delta_VO, change_KOI), weights_V, is_second_V)
    diagonal = diagonal_costs(input_VI, delta_VO, weights_V, is_second_V, [each.clone() for each in change_KOI])
    for half, is_in in enumerate((~is_second_V, is_second_V)):
        torch.testing.assert_close(exact[half], (exact_KV * weights_V)[:, is_in].sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(diagonal[half], (diagonal_KV * weights_V)[:, is_in].sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradient", [1e-30, 1e-3, 1e20])
def test_squares_of_any_gradient_are_added_in_float32_without_loss(gradient):
    input_VI, delta_VO, weights_V, is_second_V, change_KOI = factors()

    def costs(dtype: torch.dtype) -> Tensor:
        change = [each.to(dtype) for each in change_KOI.clone()]
        weights = weights_V / gradient**2
        return diagonal_costs(input_VI.to(dtype), (gradient * delta_VO).to(dtype), weights, is_second_V, change)

    torch.testing.assert_close(costs(torch.float32), costs(torch.float64), rtol=1e-5, atol=0)


def test_gradients_of_zero_cost_nothing():
    input_VI, delta_VO, weights_V, is_second_V, change_KOI = factors()
    assert not diagonal_costs(input_VI, 0 * delta_VO, weights_V, is_second_V, change_KOI).any()
    assert not costs_of(effects(input_VI, 0 * delta_VO, change_KOI), weights_V, is_second_V).any()


# Positions


def test_as_many_tokens_count_as_the_loss_is_a_mean_of():
    text, model = loss_text(size=3), model_of(num_blocks=1)
    counted_S = torch.zeros(len(LENGTHS), dtype=torch.float64)
    for indices, batch in text.batches:
        counted_S[list(indices)] = summed_loss(model, batch)[1].double()
    assert torch.equal(text.counted(), counted_S)


def of_sample(places_V: Tensor, longest: int, index: int) -> Tensor:
    return (places_V // longest == index).nonzero()[:, 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("share", [0.01, 0.45, 0.5, 1.0])
def test_each_sample_gives_its_share_of_real_positions_which_weigh_as_much_as_all_of_them(share, side):
    text, longest = loss_text(size=4, side=side), max(LENGTHS)
    (_, batch), *_ = text.batches
    places_V, weights_V, is_second_V = text.positions(longest, share, seed=3)
    assert bool(batch["attention_mask"].flatten()[places_V].all())
    assert len(places_V) == len(places_V.unique())
    for index, length in enumerate(LENGTHS):
        mine = of_sample(places_V, longest, index)
        assert len(mine) == max(1, int(share * length + 0.5))
        assert bool((is_second_V[mine] == bool(index % 2)).all())
        total = 0.5 * WEIGHTS[index] * float(text.counted()[index]) * length
        torch.testing.assert_close(weights_V[mine], torch.full((len(mine),), total / len(mine), dtype=torch.float64))


def test_neither_batches_nor_padding_nor_other_samples_change_the_chosen_positions():
    def chosen(text: LossText, seed: int = 5) -> list[list[int]]:
        """The chosen tokens of each sample, counted from its first."""
        found: list[list[int]] = [[] for _ in LENGTHS]
        places_V, _, _ = text.positions(max(LENGTHS), 0.5, seed)
        for indices, batch in text.batches:
            for row, index in enumerate(indices):
                places = places_V[of_sample(places_V, max(LENGTHS), index)] % max(LENGTHS)
                before_T = batch["attention_mask"][row].cumsum(0) - 1
                found[index] = before_T[places].tolist()
        return found

    reference = chosen(loss_text(size=1))
    assert chosen(loss_text(size=4)) == chosen(loss_text(size=4, side="right")) == reference
    assert chosen(loss_text(size=2, order=[2, 0, 3, 1])) == reference
    assert chosen(loss_text(size=1), seed=6) != reference


@pytest.mark.parametrize("share", [0.1, 0.45, 0.9])
def test_over_seeds_a_share_of_the_positions_costs_what_all_of_them_do(share):
    """The sum over all positions is the mean over draws, within three standard errors in either half."""
    text, longest = loss_text(), max(LENGTHS)
    effects_A = torch.randn(len(LENGTHS) * longest, generator=torch.Generator().manual_seed(2)).double()

    def costs(share: float, seed: int) -> Tensor:
        places_V, weights_V, is_second_V = text.positions(longest, share, seed)
        return costs_of(effects_A[places_V][None], weights_V, is_second_V)[:, 0]

    draws_N2 = torch.stack([costs(share, seed) for seed in range(400)])
    error_2 = draws_N2.std(0) / len(draws_N2) ** 0.5
    assert bool((error_2 < 0.1 * costs(1.0, 0)).all())  # so that the next line could fail
    assert bool(((draws_N2.mean(0) - costs(1.0, 0)).abs() <= 3 * error_2).all())
