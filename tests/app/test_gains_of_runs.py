"""Ranks and experts by matrix on the command line: told before the work, kept by the run, spent again from its file."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
from peft import PeftModel

from tests.command import layerif_here, run_layerif
from tests.tiny import tiny_model

FEW = ["probe.num_train=8", "probe.num_validation=4", "evaluation.metrics=[options]", "logger=none"]
GAIN = [*FEW, "estimator=gain_curve"]


@pytest.mark.usefixtures("undrawn")
def test_gains_become_ranks_that_are_kept_by_matrix_and_spent_again(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, *GAIN, "method=lora", "method.init=gradient"]
    dry = layerif_here([*overrides, "dry_run=true"], tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "rank, budget 168 over 21 matrices of 3 layers; equal curves would give 8 for each of 21" in dry.stdout

    record: Any = run_layerif(overrides, tmp_path)
    given, curves = record.decision.allocation, record.decision.curves
    assert (given.kind, len(given.units), given.budget) == ("rank", 21, sum(given.values))
    assert record.parameters["trainable"] == curves["parameters"]
    assert [entry["kind"] for entry in record.measurements] == ["gains", "gains"]
    assert [entry["reused"] for entry in record.measurements] == [False, True]
    layers = pd.read_csv(tmp_path / "run" / "layers.csv")
    assert (layers["layer"] + "." + layers["matrix"]).tolist() == given.units
    assert layers["rank"].tolist() == given.values
    loaded: Any = PeftModel.from_pretrained(tiny_model(attn_implementation="sdpa"), tmp_path / "run" / "adapter")
    ranks = {name: layer.r["default"] for name, layer in loaded.get_base_model().named_modules() if hasattr(layer, "r")}
    assert ranks == {unit: value for unit, value in zip(given.units, given.values, strict=True) if value}

    again = tmp_path / "again"
    again.mkdir()
    file = ["allocator=file", "allocator.kind=rank", f"allocator.path={tmp_path / 'run' / 'record.json'}"]
    spent = run_layerif([*tiny_overrides, *FEW, "method=lora", *file], again)
    assert spent.decision.allocation.values == given.values
    assert spent.parameters == record.parameters
    refused = layerif_here(
        [*tiny_overrides, *FEW, "method=lora", *file, "method.target_modules=[q_proj]", "dry_run=true"], tmp_path
    )
    assert "has a rank but is not a linear layer that method.target_modules gives an adapter" in refused.stderr


@pytest.mark.usefixtures("undrawn")
def test_gains_become_experts_of_matrices(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, *GAIN, "method=lora_moe", "method.r=2", "method.init=gradient", "allocator.floor=0"]
    record: Any = run_layerif(overrides, tmp_path)
    given = record.decision.allocation
    assert (given.kind, len(given.units)) == ("experts", 21)
    assert record.parameters["trainable"] == record.decision.curves["parameters"]
    assert all(sum(usage["load"]) == pytest.approx(1) for usage in record.routing.values())
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["num_experts"] == {
        unit: value for unit, value in zip(given.units, given.values, strict=True) if value
    }


@pytest.mark.usefixtures("undrawn")
def test_scores_become_ranks_of_matrices(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, *FEW, "method=lora", "allocator.matrices=score", "allocator.budget=50"]
    refused = layerif_here([*overrides, "dry_run=true"], tmp_path)
    assert "allocator.matrices=score needs the score of every matrix with an adapter" in refused.stderr
    other = layerif_here([*overrides, "estimator=block_influence", "dry_run=true"], tmp_path)
    assert "the evidence of estimator=block_influence keeps blocks alone apart" in other.stderr
    record = run_layerif([*overrides, "probe.scope=all"], tmp_path)
    assert len(record.decision.scores.layers) == len(record.decision.allocation.units) == 21
    assert sum(record.decision.allocation.values) == 50
    assert record.decision.reliability is not None
    by_size = layerif_here([*tiny_overrides, *FEW, "method=lora", "allocator.matrices=size", "dry_run=true"], tmp_path)
    assert "rank, budget 168 over 21 matrices" in by_size.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lora", "allocator.budget=10"], "allocator.budget=10 parameters are below one step"),
        (["method=lora", "estimator.r_max=33"], "estimator.r_max=33 is above the rank of"),
        (["method=lora", "method.target_modules=[norm]"], "holds 'norm', which is not a linear layer"),
        (["method=prune"], "estimator=gain_curve prices rank, and method=prune spends sparsity"),
        (["method=lora", "estimator.kind=experts"], "estimator=gain_curve prices experts, and method=lora spends rank"),
        (["method=lora", "allocator=rank"], "estimator=gain_curve gives curves, and this allocator spends scores"),
        (["method=prune", "estimator=loss_curve", "method.recover=lora", "method.adapter.init=gradient"], "recovery"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tiny_overrides, tmp_path, overrides, message):
    done = layerif_here([*tiny_overrides, *GAIN, *overrides, "dry_run=true"], tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
