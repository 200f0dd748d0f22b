"""Number formats: true bits, rounding by its definition, the packages' own round trip, and what is refused."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from layerif.formats import (
    FORMATS,
    check_rows,
    format_of,
    formats_called,
    gguf_bytes,
    relative_error,
    reproduces,
    rounded_to_nearest,
)

law = settings(deadline=None, max_examples=30)
GROUPS = [name for name in FORMATS if name.startswith("INT")]


def weight_of(seed: int, rows: int = 5, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


# True bits


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.is_gguf])
def test_the_bits_and_blocks_of_the_package_are_those_of_its_table_and_of_what_it_writes(name):
    block, size = GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (FORMATS[name].block, FORMATS[name].bits) == (block, 8 * size / block)
    weight = weight_of(0)
    assert 8 * gguf_bytes(weight, name).nbytes == FORMATS[name].bits * weight.numel()


@pytest.mark.parametrize(("name", "bits"), [("INT3", 3.25), ("INT3_ASYM", 3.5), ("INT2", 2.25), ("INT6_ASYM", 6.5)])
def test_groups_of_64_pay_16_bits_for_a_scale_and_16_for_a_least_value(name, bits):
    assert (FORMATS[name].bits, FORMATS[name].block) == (bits, 64)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_holds_no_more_values_than_its_bits_can_tell_apart(name):
    each = FORMATS[name]
    for group in each(weight_of(1)).view(-1, 64):
        assert len(group.unique()) <= 2**each.whole


# Rounding


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_its_definition_value_by_value(bits, symmetric):
    weight, steps = weight_of(2, 2), 2**bits - 1
    found = rounded_to_nearest(weight, bits, symmetric=symmetric)
    for row, rounded in zip(weight.view(-1, 64), found.view(-1, 64), strict=True):
        least = 0.0 if symmetric else float(row.min().half())
        scale = float((2 * row.abs().max() / steps if symmetric else (row.max() - least) / steps).half())
        places = range(-(2 ** (bits - 1)), 2 ** (bits - 1)) if symmetric else range(steps + 1)
        values = torch.tensor([least + scale * place for place in places])
        nearest = values[(row[:, None] - values).abs().argmin(1)]
        torch.testing.assert_close((rounded - row).abs(), (nearest - row).abs(), rtol=1e-5, atol=1e-6)


@law
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 10**6))
def test_rows_of_zeros_stay_zero_and_rows_do_not_touch_one_another(name, seed):
    weight = weight_of(seed, 4)
    weight[2] = 0
    found = FORMATS[name](weight)
    assert not found[2].any()
    assert bool(found.isfinite().all())
    assert torch.equal(FORMATS[name](weight[[3, 0]]), found[[3, 0]])
    assert float((found - weight).norm() / weight.norm()) < (0.8 if FORMATS[name].whole == 2 else 0.4)


@pytest.mark.parametrize("name", FORMATS)
def test_the_dtype_stays_and_the_weight_is_left_as_it_was(name):
    weight = weight_of(3).double()
    before = weight.clone()
    found = FORMATS[name](weight)
    assert (found.dtype, found.shape) == (torch.float64, weight.shape)
    assert torch.equal(weight, before)
    assert FORMATS[name](weight.bfloat16()).dtype == torch.bfloat16


def test_more_bits_of_one_kind_make_a_smaller_error():
    for suffix in ("", "_ASYM"):
        errors = [relative_error([weight_of(4)], FORMATS[f"INT{bits}{suffix}"]) for bits in (2, 3, 4, 6)]
        assert errors == sorted(errors, reverse=True)


# Weights on a grid


def test_a_format_reproduces_weights_that_went_through_it_and_no_other():
    weights = [FORMATS["Q4_1"](weight_of(seed)) for seed in (5, 6)]
    formats = formats_called("gguf")
    assert [each.name for each in formats if reproduces(relative_error(weights, each))] == ["Q4_1"]
    total = sum(float((FORMATS["Q5_0"](each) - each).double().square().sum()) for each in weights)
    norm = sum(float(each.double().square().sum()) for each in weights)
    assert relative_error(weights, FORMATS["Q5_0"]) == pytest.approx((total / norm) ** 0.5)


# Names


def test_settings_name_formats_in_the_order_of_their_bits_each_number_of_bits_once():
    assert [each.name for each in formats_called("gguf")] == ["MXFP4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    every = formats_called("all")
    bits = [each.bits for each in every]
    assert bits == sorted({*bits})
    assert {*FORMATS} - {each.name for each in every} == {
        "INT4",
        "INT4_ASYM",
    }  # the package writes others of those bits
    assert [each.name for each in formats_called(["Q8_0", "INT4_ASYM", "Q8_0"])] == ["INT4_ASYM", "Q8_0"]
    assert formats_called("Q4_0") == (FORMATS["Q4_0"],)
    for each in every:
        assert format_of(each.bits, every) == each
    assert format_of(4.6, every) is None


def test_a_format_that_does_not_divide_a_row_is_refused_by_name():
    check_rows(formats_called("all"), {"a": 128})
    with pytest.raises(ValueError, match=r"MXFP4 has blocks of 32 weights, which do not divide the 56 weights in a"):
        check_rows(formats_called("gguf"), {"a": 64, "mlp.down_proj": 56})
    with pytest.raises(ValueError, match=r"INT2 has blocks of 64 .* the 96 weights in a row of a; give formats whose"):
        check_rows(formats_called("all"), {"a": 96})
