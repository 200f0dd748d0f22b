"""Fusion chooses and fits on train rows alone, and gains where two models know other things."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerif.app.methods._fusion import Arm, Seen, accuracies, answered, arms, differences
from layerif.app.methods.fusion import FUSION, _on_validation
from layerif.data.task import Splits
from layerif.record.record import RunRecord
from tests.tiny import tiny_model

ROWS = 120


def told(signal: torch.Tensor, *, layer: int, seed: int) -> torch.Tensor:
    """Noise of three layers (L×R×H), one of which holds a signal."""
    noise = torch.randn((3, len(signal), 4), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    noise[layer, :, 0] = signal + 0.1 * noise[layer, :, 0]
    return noise


def pair(seed: int) -> dict[str, Seen]:
    """Two models that know one half of the answer each: four classes of two bits."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (2, ROWS), generator=generator).double()
    labels = [f"{int(one)}{int(other)}" for one, other in bits.T]
    return {
        name: Seen(told(2 * bit, layer=layer, seed=seed + layer), labels, list(range(ROWS)))
        for name, bit, layer in zip(("model", "other"), bits, (1, 2), strict=True)
    }


def test_two_halves_of_an_answer_make_a_whole():
    train, held_out = pair(0), pair(10)
    of_layer = {name: accuracies(seen, folds=3) for name, seen in train.items()}
    assert [np.argmax(values) for values in of_layer.values()] == [1, 2]
    *alone, fused = arms(train, held_out, of_layer, num_layers=1)
    assert [one.name for one in alone] == ["best of model", "best of other", "2 of model", "2 of other"]
    assert fused.layers == {"model": (1,), "other": (2,)}
    assert fused.accuracy > 0.95
    assert all(one.accuracy < 0.7 for one in alone)
    for row in differences([*alone, fused]):
        assert row["low"] > 0.2
        assert row["p Holm"] < 0.01


def test_held_out_rows_choose_no_layer_and_fit_nothing():
    train, held_out = pair(0), pair(10)
    of_layer = {name: accuracies(seen, folds=3) for name, seen in train.items()}
    first = arms(train, held_out, of_layer, num_layers=1)
    half = {name: Seen(seen.features[:, :60], seen.labels[:60], seen.samples[:60]) for name, seen in held_out.items()}
    second = arms(train, half, of_layer, num_layers=1)
    assert [one.layers for one in first] == [one.layers for one in second]
    assert [one.right[:60] for one in first] == [one.right for one in second]
    wrong = {name: replace(seen, labels=["00"] * ROWS) for name, seen in held_out.items()}
    assert [one.layers for one in arms(train, wrong, of_layer, num_layers=1)] == [one.layers for one in first]


def test_a_model_fused_with_itself_gains_nothing_that_counts():
    train, held_out = pair(0), pair(10)
    same, tested = ({"model": seen["model"], "other": seen["model"]} for seen in (train, held_out))
    of_layer = dict.fromkeys(same, accuracies(same["model"], folds=3))
    found = arms(same, tested, of_layer, num_layers=1)
    assert all(row["low"] <= 0 <= row["high"] for row in differences(found)[:2])


def test_a_sample_of_two_rows_is_right_where_its_right_output_is_the_likelier():
    odds = np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.5, 0.5]])
    labels, samples = ["right", "right", "wrong", "wrong"], [0, 1, 0, 1]
    assert answered(odds, ["right", "wrong"], labels, samples) == [True, False]
    assert answered(odds[:2], ["a", "b"], ["a", "a"], [0, 1]) == [True, False]


def test_an_arm_has_wilsons_interval():
    row = Arm(name="one", layers={"model": (3,), "other": ()}, right=(True,) * 5 + (False,) * 5).row()
    assert row["layers"] == {"model": [3]}
    assert (row["accuracy"], row["low"], row["high"]) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)


@pytest.fixture
def second(tmp_path, model_folder):
    folder = tmp_path / "second"
    tiny_model("llama", seed=1, num_hidden_layers=2).save_pretrained(folder)
    for file in model_folder.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return ["method=fusion", "+model@method.other=local", f"method.other.path={folder}", "method.folds=2"]


def test_a_run_leaves_accuracies_and_differences_and_never_sees_evaluated_rows(setup_of, second, tmp_path):
    found = []
    for test in ("as it is", "other rows"):
        setup = setup_of(*second, "probe.num_train=16", "probe.num_validation=8", f"store={tmp_path / test}")
        if test == "other rows":
            splits = replace(setup.decider.splits, test=())
            setup.decider, setup.splits = replace(setup.decider, splits=splits), splits
        record, folder = RunRecord(name="test", seed=0, config={}, overrides=[]), tmp_path / f"run {test}"
        folder.mkdir()
        setup.method.check(setup)
        setup.method.run(setup, record, folder)
        found.append((json.loads((folder / FUSION).read_text()), record.metrics))
    assert found[0] == found[1]
    content, metrics = found[0]
    assert content["rows"] == {"train": 16, "validation": 8}
    assert [len(values) for values in content["accuracy of each layer on train rows"].values()] == [3, 2]
    assert metrics["fused_accuracy_low"] <= metrics["fused_accuracy"] <= metrics["fused_accuracy_high"]
    difference = metrics["fused_accuracy"] - metrics["best_model_accuracy"]
    assert metrics["fused_minus_best_model"] == pytest.approx(difference)
    assert "method.other.weights" in setup.inputs()


def test_rows_that_are_judged_are_the_validation_rows_of_the_probe(setup_of, second):
    decider = setup_of(*second, "probe.num_validation=8").decider
    moved = _on_validation(decider)
    assert moved.chosen("train") == decider.chosen("validation")
    assert isinstance(moved.splits, Splits)
    assert not moved.splits.validation + moved.splits.test
    assert not {row.id for row in moved.chosen("train")} & {row.id for row in decider.chosen("train")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=fusion"], r"needs a second model; add one with \+model@method\.other=local"),
        (["evaluation.before=true"], r"never looks at evaluated rows"),
        (["method.num_layers=3"], r"method\.num_layers=3 is more than the 2 blocks of method\.other"),
        (["probe.num_validation=3"], r"judges on validation rows, and 3 are too few"),
        (["method.classes=answer", "method.folds=9"], r"the class '\w' has \d train rows, fewer than method\.folds=9"),
    ],
)
def test_what_cannot_be_fused_is_refused_before_any_work(overrides, message, setup_of, second):
    given = overrides if overrides == ["method=fusion"] else [*second, "probe.num_validation=8", *overrides]
    setup = setup_of(*given)
    with pytest.raises(ValueError, match=message):
        setup.method.check(setup)
