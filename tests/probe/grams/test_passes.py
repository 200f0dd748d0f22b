"""The arrangement of a measurement: the cheaper form, passes that fit the budget, and the place of factors."""

from __future__ import annotations

import pytest
import torch

from layerif.probe.grams import products
from layerif.probe.grams.passes import Choice, Matrix, Workload, passes

WIDTHS = ((64, 32), (16, 32), (16, 32), (32, 64), (128, 32), (32, 128))  # q, k, v, o, up, down
READS = (0, 0, 0, 3, 4, 5)


def workload(num_blocks: int = 4, **sizes) -> Workload:
    names = [[f"{block}.{number}" for number in range(len(WIDTHS))] for block in range(num_blocks)]
    matrices = tuple(
        Matrix(block[number], *WIDTHS[number], block[READS[number]]) for block in names for number in range(len(WIDTHS))
    )
    return Workload(matrices, **{"num_train": 6, "num_val": 3, "num_tokens": 90, "longest": 10, **sizes})


@pytest.mark.parametrize("form", products.FORMS)
@pytest.mark.parametrize(
    ("num_train", "num_val", "num_tokens", "num_out", "num_in"),
    [(5, 3, 4, 6, 7), (130, 9, 3, 8, 5), (4, 0, 3, 2, 2), (3, 2, 1, 4, 4), (1, 1, 2, 1, 1)],
)
@pytest.mark.parametrize("tile_bytes", [1, 200, 1e6])
def test_every_form_and_tile_gives_the_inner_products(
    form, num_train, num_val, num_tokens, num_out, num_in, tile_bytes
):
    generator = torch.Generator().manual_seed(0)
    num_samples = num_train + num_val
    input_STI = torch.randn(num_samples, num_tokens, num_in, dtype=torch.float64, generator=generator)
    delta_SOT = torch.randn(num_samples, num_out, num_tokens, dtype=torch.float64, generator=generator)
    gradients_SP = torch.einsum("sot,sti->soi", delta_SOT, input_STI).flatten(1)
    gram_SN, square_M = products.gram(form, input_STI, delta_SOT, num_train, tile_bytes)
    torch.testing.assert_close(gram_SN, gradients_SP @ gradients_SP[:num_train].T)
    torch.testing.assert_close(square_M, gradients_SP[num_train:].square().sum(1))
    assert torch.equal(gram_SN[:num_train], gram_SN[:num_train].T)


def test_few_short_samples_are_taken_pairwise_and_many_materialised():
    assert products.cheaper(8, 4, 8, 4096, 4096) == "pairwise"
    assert products.cheaper(300, 50, 128, 4096, 4096) == "materialised"
    assert products.cheaper(300, 50, 128, 8, 4096) == "materialised"  # LoRA's A


def test_an_input_that_several_matrices_read_is_kept_once():
    load = workload(1)
    numbers = sum(num_out for num_out, _ in WIDTHS) + 32 + 64 + 32 + 128
    assert load.kept_bytes(load.matrices) == load.num_tokens * 4 * numbers


@pytest.mark.parametrize("tile_bytes", [1e3, 1e4, 1.6e7])
@pytest.mark.parametrize("form", ["auto", *products.FORMS])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.2, 0.0])
def test_passes_keep_within_the_budget_and_cover_every_matrix_once(share, form, tile_bytes):
    load = workload()
    least = _least(load, form)
    # One pass needs all factors, and the largest matrix with the smallest tile.
    one = load.kept_bytes(load.matrices) + max(
        load.piece_bytes(matrix) + load.least_tile_bytes(matrix, load.form(matrix, form)) for matrix in load.matrices
    )
    memory = least + share * (one * (1 + 1e-9) - least)
    found = passes(load, memory, form=form, tile_bytes=tile_bytes)
    assert [matrix for group in found.groups for matrix in group] == list(load.matrices)
    assert found.device_bytes <= memory * (1 + 1e-9)
    for matrix in load.matrices:
        least_tile = load.least_tile_bytes(matrix, found.forms[matrix.name])
        assert min(least_tile, tile_bytes) * (1 - 1e-9) <= found.tile_bytes[matrix.name] <= tile_bytes
    assert (len(found.groups) == 1) == (share == 1.0)


def test_less_memory_never_means_fewer_passes():
    load = workload()
    budgets = [_least(load) * factor for factor in (1.001, 1.5, 2, 4, 8, 100)]
    counts = [len(passes(load, memory).groups) for memory in budgets]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1


def test_too_small_a_budget_says_the_least_that_does():
    load = workload()
    with pytest.raises(ValueError, match=r"1e-06 GB for the probe .* few: \d\.\d alone needs .* at least (\S+),"):
        passes(load, 1e3)
    assert len(passes(load, _least(load)).groups) > 1


def test_factors_move_to_main_memory_only_where_that_saves_passes():
    load = workload()
    least = _least(load)
    everything = load.kept_bytes(load.matrices)
    assert passes(load, 1e9, host_memory=1e9).offload == "none"
    moved = passes(load, least, host_memory=everything)
    assert (moved.offload, len(moved.groups)) == ("cpu", 1)
    assert moved.device_bytes <= least
    assert passes(load, least, host_memory=0).offload == "none"
    with pytest.raises(ValueError, match="nowhere to go"):
        passes(load, least, offload="cpu")
    assert len(passes(load, least, offload="disk").groups) == 1


def test_processes_share_the_factors():
    assert workload(num_processes=2).kept_bytes(workload().matrices) == workload().kept_bytes(workload().matrices) / 2


def _least(load: Workload, form: Choice = "auto") -> float:
    with pytest.raises(ValueError, match="too few") as caught:
        passes(load, 0.0, form=form)
    return float(str(caught.value).partition("at least ")[2].partition(",")[0]) * 1e9
