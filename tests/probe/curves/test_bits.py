"""Curves of number formats equal their definition, are kept, and leave out formats that change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from layerif.allocate.curves import Curves, Knapsack
from layerif.decide import Decider
from layerif.estimators.bits_curve import BitsCurve
from layerif.formats import FORMATS, formats_called
from layerif.models.blocks import layer_map
from layerif.models.pretrained import LocalModel
from layerif.probe.curves import formats as of_formats
from layerif.probe.curves.formats import Quantisation, kept_formats
from layerif.probe.curves.measure import measure_loss_curves
from layerif.pruning.calibration import Calibration
from tests.probe.curves.test_measure import LENGTHS, dense, gradients_of_copies, loss_text, sum_of
from tests.tiny import tiny_model, tiny_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TEXT = " ".join(f"the {number} answers of row {number * 7 % 31} are cities or cats" for number in range(60))


@pytest.mark.parametrize("form", ["exact", "diagonal"])
@pytest.mark.parametrize("granularity", ["matrix", "block"])
@pytest.mark.usefixtures("softmax_in_the_models_dtype")
def test_they_are_the_definition_with_the_change_that_a_format_makes(form, granularity):
    model: Any = tiny_model(num_hidden_layers=2, **SIZES).double()
    params = layer_map(model, scope="all").matrices
    changes = Quantisation(formats_called(["Q4_0", "INT3_ASYM", "Q8_0"]))
    assert changes.levels() == (3.5, 4.5, 8.5)
    found = measure_loss_curves(
        model, params, changes, loss_text(), changes.levels(), form=form, granularity=granularity, is_stepped=True
    )
    assert (found.kind, found.sense, found.levels, found.is_stepped) == ("bits", "cost", (3.5, 4.5, 8.5), True)
    made = {}
    for param in params:
        weight = model.get_parameter(param).detach()
        made[param] = torch.stack([each(weight) - weight for each in changes.formats])
    gradients = gradients_of_copies(model, params)
    terms = [dense(gradients, made, form, granularity, index) for index in range(len(LENGTHS))]
    assert found.units == tuple(terms[0])
    by_half = torch.stack([torch.stack([sum_of(unit, terms[half::2]) for unit in terms[0]]) for half in (0, 1)])
    assert found.by_half is not None
    torch.testing.assert_close(found.by_half, by_half, rtol=1e-8, atol=0)
    torch.testing.assert_close(found.costs, by_half.sum(0), rtol=1e-8, atol=0)
    numel = torch.tensor([model.get_parameter(param).numel() for param in params], dtype=torch.float64)
    if granularity == "matrix":
        torch.testing.assert_close(found.sizes, numel[:, None] * torch.tensor(found.levels, dtype=torch.float64))
    assert bool((found.costs[:, 0] > found.costs[:, 2]).all())


@pytest.fixture
def text(tmp_path) -> Calibration:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return Calibration(text=str(file), num_windows=4, window=16, batch_size=2)


def decider_of(decider: Decider, folder, model: Any, **settings: Any) -> Decider:
    """The decider of a model whose rows every format divides."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    estimator = BitsCurve(tokens=1.0, **settings)
    return replace(decider, model=LocalModel(path=str(folder)), estimator=estimator, allocator=Knapsack(target=5.2))


def with_(decider: Decider, **settings: Any) -> Decider:
    estimator: Any = decider.estimator
    return replace(decider, estimator=replace(estimator, **settings))


def taken(decider: Decider) -> tuple[Curves, bool]:
    return decider.estimator.needs.take(decider, decider.model.load)


def test_a_decision_spends_them_in_steps_and_the_store_keeps_them(decider, tmp_path, text):
    asked = decider_of(decider, tmp_path / "m", tiny_model(**SIZES), calibration=text)
    decision = asked()
    curves, reused = taken(asked)
    assert reused
    assert decision.allocation == Knapsack(target=5.2)(curves)
    assert decision.allocation.kind == "bits"
    assert {*decision.allocation.values} <= {each.bits for each in formats_called("gguf")}
    assert len({*decision.allocation.values}) > 1
    assert 5.0 < decision.allocation.budget <= 5.2
    assert decision.allocation.source.keys() == {"model", "formats", "calibration", "loss_text"}
    assert decision.allocation.source["formats"] == "MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0"
    assert decision.notes == ()
    assert decision.reliability is not None
    kinds = {file.parent.name for file in asked.store.files(curves.fingerprint)}  # type: ignore[union-attr]
    assert kinds == {"loss_curves"}
    for other in ({"formats": "all"}, {"form": "diagonal"}, {"granularity": "block"}, {"loss_text": "task"}):
        assert not taken(with_(asked, **other))[1], other


def test_a_format_whose_grid_the_weights_stand_on_is_left_out_and_named(decider, tmp_path, text, monkeypatch):
    model = tiny_model(**SIZES)
    with torch.no_grad():
        for param in layer_map(model, scope="all").matrices:
            weight = model.get_parameter(param)
            weight.copy_(FORMATS["Q4_1"](weight))
    asked = decider_of(decider, tmp_path / "m", model, calibration=text)
    decision = asked()
    assert isinstance(decision.curves, Curves)
    assert decision.curves.levels == (4.25, 4.5, 5.5, 6.0, 8.5)
    assert 5.0 not in decision.allocation.values
    (note,) = (note for note in decision.notes if note.startswith("left out"))
    assert note.startswith("left out: Q4_1 (5) reproduces the weights of this model to 1e-4, because")
    again = asked(lambda: pytest.fail("it was loaded"))  # errors and curves are in the store
    assert again.allocation == decision.allocation
    assert again.notes == decision.notes
    monkeypatch.setattr(of_formats, "relative_error", lambda *_: pytest.fail("it was measured again"))
    fewer = formats_called(["Q4_1", "Q5_0"])  # another choice of formats finds the errors of each
    assert kept_formats(asked, fewer, asked.model.load) == (FORMATS["Q5_0"],)
    monkeypatch.undo()
    alone = replace(with_(asked, formats=["Q4_1"]), allocator=Knapsack(target=5.0))
    with pytest.raises(
        ValueError, match=r"the weights stand on the grid of Q4_1, so that there is nothing to quantise"
    ):
        alone()


def test_rows_that_a_format_does_not_divide_are_refused_before_anything_is_measured(decider, text, monkeypatch):
    monkeypatch.setattr(LocalModel, "load", lambda self: pytest.fail("it was loaded"))
    asked = replace(decider, estimator=BitsCurve(calibration=text), allocator=Knapsack(target=5.0))
    with pytest.raises(
        ValueError, match=r"MXFP4 has blocks of 32 weights, which do not divide the 48 weights in a row of"
    ):
        asked.preview()


def test_a_target_outside_the_formats_is_refused_before_anything_is_measured(decider, tmp_path, text):
    asked = decider_of(decider, tmp_path / "m", tiny_model(**SIZES), calibration=text)
    for target in (4.0, 9.0, 0.5):
        with pytest.raises(ValueError, match=rf"target={target} is outside the feasible range 4\.25 to 8\.5 bits"):
            replace(asked, allocator=Knapsack(target=target)).preview()
    assert {*asked.preview().values} <= {5.0, 5.5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"formats": ["Q4_K"]}, r"estimator\.formats='Q4_K' is not allowed; allowed: MXFP4, Q4_0, .*\(did you mean"),
        ({"formats": ["INT4", "MXFP4"]}, r"names (INT4|MXFP4) and (INT4|MXFP4), which both take 4\.25 bits; give one"),
        ({"loss_text": "rows"}, r"estimator\.loss_text='rows' is not allowed"),
        ({"tokens": 0.0}, r"estimator\.tokens=0\.0 is not allowed"),
        ({"form": "kfac"}, r"estimator\.form='kfac' is not allowed"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        BitsCurve(**settings)
