"""An allocation by matrix on the command line: told before the work, kept by the run, and spent again from its file."""

from __future__ import annotations

import pandas as pd
import pytest

from tests.command import layerif_here, run_layerif

CURVES = [
    "method=prune",
    "estimator=loss_curve",
    "allocator.target=0.6",
    "method.calibration.num_windows=4",
    "method.calibration.window=32",
    "method.save=false",
    "evaluation.metrics=[options]",
    "logger=none",
]


@pytest.mark.usefixtures("undrawn")
def test_what_curves_decided_is_kept_by_matrix_and_spent_again_from_its_file(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, *CURVES]
    dry = layerif_here([*overrides, "dry_run=true"], tmp_path)
    assert dry.returncode == 0, dry.stderr
    said = "sparsity, budget 0.6 over 21 matrices of 3 layers; equal curves would give 0.600 for each of 21 matrices\n"
    assert f"allocation    {said}" in dry.stdout

    record = run_layerif(overrides, tmp_path)
    given = record.decision.allocation
    assert len(given.units) == 21
    layers = pd.read_csv(tmp_path / "run" / "layers.csv")
    assert (layers["layer"] + "." + layers["matrix"]).tolist() == given.units == list(record.sparsity)
    assert layers["sparsity"].tolist() == pytest.approx(given.values)

    again = tmp_path / "again"
    again.mkdir()
    file = ["allocator=file", "allocator.kind=sparsity", f"allocator.path={tmp_path / 'run' / 'record.json'}"]
    overrides = [*tiny_overrides, *(setting for setting in CURVES if setting != "allocator.target=0.6"), *file]
    shown = layerif_here([*overrides, "dry_run=true"], tmp_path)
    assert "budget 0.6 over 21 matrices of 3 layers; the allocator gives [" in shown.stdout
    spent = run_layerif(overrides, again)
    assert spent.sparsity == record.sparsity
    assert spent.decision.allocation.source == given.source != {}
    refused = layerif_here([*overrides, "pruner=magnitude", "dry_run=true"], tmp_path)
    assert refused.returncode == 1
    assert "the allocation was made by curves of another pruner" in refused.stderr
