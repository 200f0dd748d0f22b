"""A swap is the best one of its row, never makes a row worse, and changes no count; checked against whole outputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from layerif.models.blocks import blocks, linears
from layerif.pruning.magnitude import Magnitude, magnitude_mask
from layerif.pruning.sparsegpt import SparseGPT
from layerif.pruning.swaps import MaskPruner, swapped
from layerif.pruning.targets import matrices, targets
from layerif.pruning.walk import Walk
from layerif.pruning.wanda import Wanda, wanda_mask
from tests.pruning.test_walk import walked, weights, windows
from tests.tiny import tiny_model

INPUTS = ["independent", "alike", "fewer tokens than inputs", "dead"]


def problem(kind: str = "alike", outputs: int = 6, inputs: int = 24, dtype: torch.dtype = torch.float64):
    """A weight and the inputs of tokens, in the dtype, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(INPUTS.index(kind))
    tokens = 10 if kind == "fewer tokens than inputs" else 60
    drawn = torch.randn(tokens, inputs, dtype=torch.float64, generator=generator)
    if kind == "alike":  # a few directions hold most of every input, so that the bound of the search is loose
        drawn = drawn * 0.3 + drawn[:, :3] @ torch.randn(3, inputs, dtype=torch.float64, generator=generator)
    if kind == "dead":
        drawn[:, ::5] = 0
    weight = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)
    return weight.to(dtype), drawn.to(dtype)


def errors(weight: Tensor, mask: Tensor, inputs: Tensor) -> Tensor:
    """The squared error of every row's output, in float64 from the outputs themselves."""
    return (inputs.double() @ (weight.double() * mask).t()).square().sum(0)


def best_swap(weight: Tensor, mask: Tensor, inputs: Tensor, m: int | None = None) -> tuple[float, Tensor]:
    """The lowest error of one row that a swap reaches, and its mask: every swap is tried."""
    found = float(errors(weight[None], mask[None], inputs)), mask
    for kept, removed in itertools.product((~mask).nonzero()[:, 0].tolist(), mask.nonzero()[:, 0].tolist()):
        if m is None or kept // m == removed // m:
            other = mask.clone()
            other[kept], other[removed] = True, False
            found = min(found, (float(errors(weight[None], other[None], inputs)), other), key=lambda each: each[0])
    return found


@pytest.mark.parametrize("m", [None, 4, 12])
@pytest.mark.parametrize("kind", INPUTS)
def test_one_swap_is_the_best_of_all(kind, m):
    weight, inputs = problem(kind)
    norms, gram = inputs.square().sum(0), inputs.t() @ inputs
    mask = wanda_mask(weight, norms, 0.6) if m is None else wanda_mask(weight, norms, n=m // 2, m=m)
    found = swapped(weight, mask, gram, most=1, m=m)
    assert not torch.equal(found, mask)
    for row in range(len(weight)):
        _, expected = best_swap(weight[row], mask[row], inputs, m)
        assert torch.equal(found[row], expected)


@pytest.mark.parametrize("m", [None, 4])
@pytest.mark.parametrize("kind", INPUTS)
def test_every_swap_lowers_the_error_until_none_does_and_changes_no_count(kind, m):
    weight, inputs = problem(kind)
    gram = inputs.t() @ inputs
    mask = wanda_mask(weight, gram.diagonal(), 0.55) if m is None else wanda_mask(weight, gram.diagonal(), n=1, m=m)
    before, groups = errors(weight, mask, inputs), (len(weight), -1, m or 24)
    for most in itertools.count(1):
        found = swapped(weight, mask, gram, most=most, m=m)
        after = errors(weight, found, inputs)
        assert torch.equal(found.view(groups).sum(2), mask.view(groups).sum(2))
        if torch.equal(found, swapped(weight, mask, gram, most=most - 1, m=m)):
            break
        assert bool((after <= before).all())
        assert bool((after < before).any())
        assert bool(((found & ~mask).sum(1) <= most).all())
        before = after
    for row in range(len(weight)):
        lowest, _ = best_swap(weight[row], found[row], inputs, m)
        assert lowest >= float(after[row]) * (1 - 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [None, 8])
def test_no_row_gets_worse_in_lower_precision(dtype, m):
    weight, inputs = problem("alike", outputs=40, inputs=64, dtype=dtype)
    gram = MaskPruner.observe(Wanda(), None, inputs)
    assert gram.dtype == torch.float32
    mask = magnitude_mask(weight, 0.5) if m is None else magnitude_mask(weight, n=4, m=8)
    before, after = (
        torch.einsum("oi,ij,oj->o", *(weight.double() * each, gram.double(), weight.double() * each))
        for each in (mask, swapped(weight, mask, gram, most=1000, m=m))
    )
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.5 * float(before.sum())


@pytest.mark.parametrize("m", [None, 6])
def test_the_tile_changes_nothing(m):
    weight, inputs = problem(outputs=23)
    gram = inputs.t() @ inputs
    mask = wanda_mask(weight, gram.diagonal(), 0.5) if m is None else wanda_mask(weight, gram.diagonal(), n=3, m=6)
    expected = swapped(weight, mask, gram, most=5, m=m)
    for tile in (1, 7, 23, 100):
        assert torch.equal(swapped(weight, mask, gram, most=5, m=m, tile=tile), expected)


def test_rows_without_a_choice_and_weights_that_are_zero_stay_as_they_are():
    weight, inputs = problem(outputs=6)
    gram = inputs.t() @ inputs
    weight[2, ::2] = weight[3, 5:] = 0  # 12 and 19 zeros where 14 are removed
    mask = wanda_mask(weight, gram.diagonal(), 14 / 24)
    mask[0], mask[1] = True, False
    found = swapped(weight, mask, gram, most=10)
    assert torch.equal(found[:2], mask[:2])
    assert torch.equal((weight * ~found == 0).sum(1), (weight * ~mask == 0).sum(1))
    weight[4:] = 0
    assert torch.equal(swapped(weight, mask, gram, most=10)[4:], mask[4:])
    assert torch.equal(swapped(weight, mask, torch.zeros_like(gram), most=10), mask)


def test_shapes_that_do_not_fit_are_refused():
    weight, mask = torch.ones(3, 8), torch.ones(3, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs a mask of its shape and a gram of 8×8"):
        swapped(weight, mask, torch.eye(7), most=1)
    with pytest.raises(ValueError, match="use an m that divides it"):
        swapped(weight, mask, torch.eye(8), most=1, m=3)
    with pytest.raises(ValueError, match="whole number of at least 1"):
        Wanda(swaps=True, most_swaps=0)


PRUNERS = {
    "wanda": (Wanda(), Wanda(swaps=True)),
    "cumulative": (Wanda(compare="cumulative"), Wanda(compare="cumulative", swaps=True)),
    "n:4": (Wanda(m=4), Wanda(m=4, swaps=True)),
    "magnitude": (Magnitude(), Magnitude(swaps=True)),
}


def test_only_pruners_that_leave_kept_weights_alone_have_swaps():
    assert not Magnitude().needs_inputs
    assert all(with_swaps.needs_inputs for _, with_swaps in PRUNERS.values())
    assert not hasattr(SparseGPT(), "swaps")


@pytest.mark.parametrize("name", PRUNERS)
def test_a_model_keeps_its_counts_per_row_and_its_first_block_comes_nearer_to_the_dense_one(tmp_path, name):
    dense = tiny_model()
    outputs, found = [first_block(dense)], []
    for pruner in PRUNERS[name]:
        model = walked(tiny_model(), pruner, tmp_path / str(len(outputs)))
        outputs.append(first_block(model))
        found.append(matrices(model))
    wanted, without, with_swaps = outputs
    assert float((with_swaps - wanted).square().sum()) < 0.9 * float((without - wanted).square().sum())
    for path in found[0]:
        masks = [each[path].weight == 0 for each in found]
        assert int(masks[0].sum()) == int(masks[1].sum())
        kept = matrices(dense)[path].weight[~masks[1]]
        assert torch.equal(found[1][path].weight[~masks[1]], kept)
        if name == "n:4":
            assert torch.equal(*(mask.view(len(mask), -1, 4).sum(2) for mask in masks))
        elif path.startswith("model.layers.0.self_attn.q_proj"):  # whose inputs are dense
            assert torch.equal(*(mask.sum(1) for mask in masks))
            assert not torch.equal(*masks)


def first_block(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.cat(windows()), output_hidden_states=True, use_cache=False).hidden_states[1]


@pytest.mark.parametrize("killed_after", [1, 2])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, killed_after):
    pruner = Wanda(swaps=True, most_swaps=3)
    whole = weights(walked(tiny_model(), pruner, tmp_path / "whole"))
    walked(tiny_model(), pruner, tmp_path / "killed", num_blocks=killed_after)
    found = weights(walked(tiny_model(), pruner, tmp_path / "killed"))
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_without_swaps_the_statistic_and_the_mask_are_the_plain_ones():
    weight, inputs = problem(dtype=torch.float32)
    plain, gram = Wanda().observe(None, inputs), Wanda(swaps=True).observe(None, inputs)
    assert torch.equal(plain, inputs.square().sum(0))
    torch.testing.assert_close(gram.diagonal(), plain)
    torch.testing.assert_close(gram, inputs.t() @ inputs)
    both = [Wanda(swaps=swaps).mask(weight, shared, 0.5, None) for swaps, shared in ((False, plain), (True, gram))]
    assert torch.equal(*both)
    assert torch.equal(Wanda()(weight, plain, 0.5, None), weight.masked_fill(both[0], 0))


def test_every_row_of_the_first_layer_gets_nearer():
    """The law in a model: on the inputs that the swaps saw, the error of no row rises."""
    model = tiny_model()
    block = next(iter(blocks(model)))
    name, linear = next(iter(linears(blocks(model)[block])))
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in windows():
            model(input_ids=batch, use_cache=False)
    inputs, dense, masks = torch.cat(seen), linear.weight.detach().clone(), []
    for pruner in PRUNERS["wanda"]:
        model = tiny_model()
        walk = Walk(model, pruner, targets(model, dict.fromkeys(blocks(model), 0.6), pruner), windows(), None)
        walk(0)
        masks.append(matrices(model)[f"{block}.{name}"].weight == 0)
    before, after = (errors(dense, mask, inputs) for mask in masks)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < 0.9 * float(before.sum())
