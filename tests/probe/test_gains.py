"""Gains equal a dense computation, whatever the batches, the passes and the processes; the store keeps them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layerif.allocate.curves import Knapsack
from layerif.data.batches import batches
from layerif.decide import Decider
from layerif.estimators.gain_curve import GainCurve
from layerif.evidence import LayerGains, MatrixGains
from layerif.models.blocks import layer_map
from layerif.models.loss import per_sample_loss
from layerif.models.pretrained import LocalModel
from layerif.probe import gains as room
from layerif.probe.directions import leading_directions, squared_norms
from layerif.probe.gains import measure_gains
from tests.processes import Pair
from tests.tiny import tiny_model

NUM_TRAIN, NUM_VAL = 6, 5


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model().double()


def rows(number: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (number,), generator=generator).tolist()
    return [torch.randint(3, 256, (length,), generator=generator).tolist() for length in lengths]


TRAIN, VALIDATION = rows(NUM_TRAIN, 0), rows(NUM_VAL, 1)


def batch(some: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, some))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in some])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in some])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def cut(all_rows: list[list[int]], size: int) -> list[Any]:
    starts = range(0, len(all_rows), size)
    return [
        (list(range(start, min(start + size, len(all_rows)))), batch(all_rows[start : start + size]))
        for start in starts
    ]


def measured(model: Any, size: int = 4, **options: Any) -> LayerGains:
    layers = layer_map(model, scope="all")
    return measure_gains(model, layers, cut(TRAIN, size), cut(VALIDATION, size), **options)


def gradients(model: Any, some: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    found = []
    for row in some:
        parameters = {name: model.get_parameter(name) for name in layer_map(model, scope="all").matrices}
        loss = per_sample_loss(model, batch([row])).sum()
        found.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    return found


@pytest.mark.usefixtures("softmax_in_the_models_dtype")
def test_gains_equal_a_dense_computation_in_float64(model):
    found, train, validation = measured(model), gradients(model, TRAIN), gradients(model, VALIDATION)
    for param, each in found.gains.items():
        mean, seen = (sum(one[param] for one in part) / len(part) for part in (train, validation))
        left, strengths, right = torch.linalg.svd(mean, full_matrices=False)
        along = torch.einsum("or,oi,ri->r", left, seen, right)
        assert torch.allclose(each.strengths, strengths, rtol=1e-8, atol=1e-12 * strengths[0])
        first = strengths * along
        assert torch.allclose((each.strengths * each.products.sum(0))[:4], first[:4], rtol=1e-7, atol=1e-15)
        of_train = [torch.einsum("or,oi,ri->r", left, one[param], right).square() for one in train]
        curvature = torch.stack(of_train).mean(0)
        assert torch.allclose(each.curvatures[:4], curvature[:4], rtol=1e-7)
        square = sum(one[param].square().mean() for one in train) / NUM_TRAIN
        assert each.mean_square == pytest.approx(float(square), rel=1e-10)
        assert torch.allclose(each.rights[0].double().abs(), right[0].abs(), atol=2e-3)
        by_hand = first / (curvature + 0.1 * square)
        damped = GainCurve(form="preconditioned").gains(each).sum(0)
        assert torch.allclose(damped[:4], by_hand[:4], rtol=1e-6)
        assert torch.allclose(GainCurve().gains(each).sum(0)[:4], first[:4], rtol=1e-7, atol=1e-15)


def assert_same(found: LayerGains, expected: LayerGains) -> None:
    for param, each in expected.gains.items():
        for name in ("strengths", "products", "curvatures"):
            mine, theirs = getattr(found.gains[param], name)[..., :6], getattr(each, name)[..., :6]
            assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-14), (param, name)


def test_batches_passes_and_tiles_change_nothing(model, tmp_path):
    expected = measured(model)
    assert_same(measured(model, size=1), expected)
    few = 4e-4  # two or three matrices at a time
    assert_same(measured(model, memory_gb=few), expected)
    assert_same(measured(model, memory_gb=few, offload="disk", partial=tmp_path), expected)
    with pytest.raises(ValueError, match=r"too few: .* alone needs"):
        measured(model, memory_gb=1e-6)


def test_a_search_finds_the_leading_directions_of_a_large_matrix_and_norms_have_two_ways():
    generator = torch.Generator().manual_seed(0)
    basis = [torch.linalg.qr(torch.randn(side, 20, generator=generator)).Q for side in (150, 90)]
    strengths = 0.7 ** torch.arange(20.0)
    matrix = basis[0] * strengths @ basis[1].mT
    left, found, right = leading_directions(matrix, 5)
    assert left.shape == (150, 5)
    assert torch.allclose(found, strengths[:5], rtol=1e-3)
    assert torch.allclose((left * found) @ right, (basis[0][:, :5] * strengths[:5]) @ basis[1][:, :5].mT, atol=5e-3)
    assert all(torch.equal(*both) for both in zip(leading_directions(matrix, 5), (left, found, right), strict=True))
    for num_tokens, num_in, num_out in ((3, 20, 30), (40, 5, 6)):
        inputs = torch.randn(4, num_tokens, num_in, generator=generator)
        deltas = torch.randn(4, num_tokens, num_out, generator=generator)
        expected = (deltas.mT @ inputs).double().square().sum((1, 2))
        assert torch.allclose(squared_norms(inputs, deltas, 1.0), expected, rtol=1e-5)


# The estimator


def zeros_like(each: MatrixGains, *names: str) -> MatrixGains:
    return replace(each, **{name: torch.zeros_like(getattr(each, name)) for name in names})


def test_zero_gradients_are_refused_or_named(model):
    found = measured(model)
    for part, name in (("train", "strengths"), ("validation", "products")):
        nothing = replace(found, gains={param: zeros_like(each, name) for param, each in found.gains.items()})
        with pytest.raises(ValueError, match=rf"all {part} gradients are zero, so nothing tells"):
            GainCurve().curves(nothing)
    first = next(iter(found.gains))
    some = replace(found, gains={**found.gains, first: zeros_like(found.gains[first], "strengths", "curvatures")})
    some = replace(some, gains={**some.gains, first: replace(some.gains[first], mean_square=0.0)})
    for form in ("first_order", "preconditioned"):
        with pytest.warns(RuntimeWarning, match=rf"no rank gains anything, in {first} \(1 of 21"):
            assert not GainCurve(form=form).curves(some).costs[0].any()
    falling = {param: replace(each, products=-each.products.abs()) for param, each in found.gains.items()}
    with pytest.warns(RuntimeWarning, match="no direction of the train gradients lowers the loss of the validation"):
        assert len(set(Knapsack()(GainCurve().curves(replace(found, gains=falling))).values)) == 1


@pytest.fixture
def gaining(decider: Decider) -> Decider:
    return replace(decider, estimator=GainCurve(), allocator=Knapsack())


def test_a_decision_spends_gains_of_validation_rows_and_the_store_answers_the_next(gaining, monkeypatch):
    decision = gaining()
    assert (decision.allocation.kind, decision.num_samples) == ("rank", (8, 4))
    assert len(decision.allocation.units) == 21
    assert decision.reliability is not None
    summary = decision.record().curves
    assert summary is not None
    assert summary["sense"] == "gain"
    assert summary["source"]["form"] == "first_order"
    shapes = gaining.layers().matrix_shapes or ()
    of_rank_8 = sum(8 * sum(shape) for shape in shapes)
    assert of_rank_8 - 56 < summary["parameters"] <= of_rank_8
    monkeypatch.setattr(room, "measure_gains", lambda *args, **options: pytest.fail("measured again"))
    for estimator in (
        GainCurve(form="preconditioned"),
        GainCurve(granularity="block"),
        GainCurve(kind="experts", r=2, damping=0.5),
    ):
        again = replace(gaining, estimator=estimator)()
        assert again.reused
        assert again.allocation.kind == estimator.kind
    assert "upper bound" in again.record().curves["source"]["experts"]
    with pytest.raises(pytest.fail.Exception):
        replace(gaining, estimator=GainCurve(target_modules=["q_proj"]))()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r_max": 33}, r"estimator\.r_max=33 is above the rank of .*q_proj, which has 32 inputs and 48 outputs; use"),
        ({"target_modules": ["mlp"]}, r"method\.target_modules holds 'mlp', which is not a linear layer of the blocks"),
        ({"target_modules": ["q_prj"]}, r"did you mean 'q_proj'.*; they have down_proj, gate_proj"),
        ({"r_max": 0}, r"estimator\.r_max"),
    ],
)
def test_what_has_no_curve_is_refused_before_any_pass(gaining, settings, message):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        replace(gaining, estimator=GainCurve(**settings)).preview()


@pytest.fixture(scope="module")
def pair():
    found = Pair()
    yield found
    found.close()


def test_every_process_gets_all_gains_of_half_the_batches(model, pair, tmp_path):
    assert pair.run(save_gains, tmp_path, tmp_path) == ["", ""]
    expected = measured(model, 2)
    for rank in (0, 1):
        saved = torch.load(tmp_path / f"{rank}.pt")
        assert_same(replace(expected, gains={param: MatrixGains(**each) for param, each in saved.items()}), expected)


def save_gains(rank: int, folder: Path) -> None:
    found = measured(tiny_model().double(), 2)
    torch.save({param: vars(each) for param, each in found.gains.items()}, folder / f"{rank}.pt")


def test_a_row_whose_gradient_is_not_finite_is_named(decider):
    assert isinstance(decider.model, LocalModel)
    model: Any = decider.model.load()
    samples = list(batches(decider.samples()[0], 4, decider.pad_id))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"train sample \d is not finite, from block model\.layers\.1 on"):
        measure_gains(model, decider.layers(), samples, samples)
