"""`method=plan` prints the passes of a probe, and the probe then takes them."""

from __future__ import annotations

import json
import re

import pytest

from layerif.models.pretrained import LocalModel
from layerif.record.record import RunRecord
from tests.command import layerif_here


def test_the_plan_is_what_the_probe_does(tiny_overrides, tmp_path):
    small = [*tiny_overrides, "probe.num_train=8", "probe.num_validation=4", "probe.memory_gb=6e-4"]
    planned = layerif_here([*small, "method=plan", f"hydra.run.dir={tmp_path / 'plan'}"], tmp_path)
    assert planned.returncode == 0, planned.stderr
    strategies = json.loads((tmp_path / "plan" / "plan.json").read_text())
    (chosen,) = [strategy for strategy in strategies if strategy["chosen"]]
    assert chosen["name"] == "several passes"
    assert chosen["passes"] > 1
    assert chosen["device_gb"] <= 6e-4
    assert chosen["seconds"] > 0
    one = next(strategy for strategy in strategies if strategy["name"] == "one pass")
    assert one["device_gb"] > 6e-4
    assert one["pass_operations"] < chosen["pass_operations"]
    assert one["product_operations"] == chosen["product_operations"]
    assert "gradient pass" not in planned.stderr + planned.stdout
    assert not list(tmp_path.rglob("*.safetensors"))

    done = layerif_here([*small, "method=none", f"hydra.run.dir={tmp_path / 'run'}"], tmp_path)
    assert done.returncode == 0, done.stderr
    log = done.stdout + done.stderr
    assert int(re.search(r"(\d+) passes", log)[1]) == chosen["passes"]  # type: ignore[index]


def test_too_small_a_budget_is_refused_with_the_least(tiny_overrides, tmp_path):
    done = layerif_here([*tiny_overrides, "method=none", "probe.memory_gb=1e-7"], tmp_path)
    assert done.returncode == 1
    assert re.search(r"layerif: 1e-07 GB for the probe .* are too few: model\.layers\.\d\S+ alone needs", done.stderr)


@pytest.mark.parametrize("form", ["exact", "diagonal"])
def test_the_plan_of_loss_curves_is_what_their_measurement_does(form, tiny_overrides, model_folder, tmp_path):
    calibration = "estimator.calibration={_target_:layerif.pruning.calibration.Calibration,num_windows:8,window:16}"
    small = [*tiny_overrides, "estimator=loss_curve", calibration, f"estimator.form={form}", "probe.memory_gb=4e-4"]
    planned = layerif_here([*small, "method=plan", f"hydra.run.dir={tmp_path / 'plan'}"], tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "prices of all levels" in planned.stdout
    assert "inner products" not in planned.stdout
    strategies = json.loads((tmp_path / "plan" / "plan.json").read_text())
    (chosen,) = [strategy for strategy in strategies if strategy["chosen"]]
    assert chosen["name"] == "several passes"
    assert chosen["device_gb"] <= 4e-4
    assert chosen["seconds"] > 0
    num_positions, num_products = 8 * 7, 8 if form == "exact" else 1  # 7 of 16 tokens
    num_weights = sum(LocalModel(path=str(model_folder)).layers().numel)
    assert chosen["product_operations"] == 2 * num_positions * num_products * num_weights
    assert not list(tmp_path.rglob("*.safetensors"))

    done = layerif_here([*small, "method=none", f"hydra.run.dir={tmp_path / 'run'}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"(\d+) passes", done.stdout + done.stderr)[1]) == chosen["passes"]  # type: ignore[index]


def test_the_plan_of_gains_is_what_their_measurement_does(tiny_overrides, model_folder, tmp_path):
    small = [*tiny_overrides, "estimator=gain_curve", "probe.num_train=6", "probe.num_validation=3"]
    small += ["estimator.r_max=4", "probe.memory_gb=6e-4"]
    planned = layerif_here([*small, "method=plan", f"hydra.run.dir={tmp_path / 'plan'}"], tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "mean gradients and their directions" in planned.stdout
    (chosen,) = [each for each in json.loads((tmp_path / "plan" / "plan.json").read_text()) if each["chosen"]]
    assert chosen["name"] == "several passes"
    assert chosen["device_gb"] <= 6e-4
    longest = int(re.search(r"the longest (\d+)", planned.stdout)[1])  # type: ignore[index]
    shapes = LocalModel(path=str(model_folder)).layers().matrix_shapes or ()
    of_gradients = sum(2 * 6 * longest * outputs * inputs for outputs, inputs in shapes)
    assert chosen["product_operations"] == of_gradients + sum(2 * 9 * longest * sum(shape) * 4 for shape in shapes)

    done = layerif_here([*small, "method=none", f"hydra.run.dir={tmp_path / 'run'}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"(\d+) passes", done.stdout + done.stderr)[1]) == chosen["passes"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (["estimator=dlp"], "no plan: the evidence of estimator=dlp is neither Grams, curvature, loss curves nor"),
        (["estimator=measured_loss"], "no plan: the evidence of estimator=measured_loss is neither"),
        (["estimator=uniform"], "nothing to plan: estimator=uniform measures nothing"),
        (["allocator=depth"], "nothing to plan: the allocator spends neither scores nor curves"),
    ],
)
def test_evidence_of_another_kind_gets_no_plan_of_grams(choices, said, tiny_overrides, tmp_path):
    planned = layerif_here([*tiny_overrides, *choices, "method=plan", f"hydra.run.dir={tmp_path / 'plan'}"], tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert said in planned.stdout
    assert "GFLOP" not in planned.stdout
    assert json.loads((tmp_path / "plan" / "plan.json").read_text()) == []


def test_a_plan_prints_the_law_where_the_tokens_are_given(setup_of, tmp_path, capsys):
    for given in ([], ["method.training_tokens=2e12"]):
        setup = setup_of("method=plan", "estimator=uniform", *given)
        setup.method.check(setup)
        setup.method.run(setup, RunRecord(name="test", seed=0, config={}, overrides=[]), tmp_path)
    said = capsys.readouterr().out
    assert said.count("MMLU expected of fewer layers") == 1
    assert "a fit on ten models" in said
    assert "it tells nothing about this model" in " ".join(said.split())
    assert json.loads((tmp_path / "performance_law.json").read_text())["rows"][0]["change"] == 0
    with pytest.raises(ValueError, match=r"method\.training_tokens=-1 is not allowed"):
        setup_of("method=plan", "method.training_tokens=-1")
