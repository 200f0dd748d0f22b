"""Records that version 0.1.0 wrote for every method are read as today's and reported as it reported them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from layerif.record.record import FILE, Failure, RunRecord
from layerif.report import write_report

GOLDEN = Path(__file__).parents[1] / "golden" / "v0.1.0"
RUNS = sorted(file.parent for file in (GOLDEN / "runs").glob(f"*/{FILE}"))
OF_DECISION = ("layers", "samples", "scores", "higher_means", "source", "reliability", "fidelity", "allocation")
METHODS = {"shape": "none", "reversed": "none", "prune_recovered": "prune"}


@pytest.mark.parametrize("folder", RUNS, ids=[folder.name for folder in RUNS])
def test_a_record_of_0_1_0_equals_todays_shape_field_by_field(folder):
    old, new = json.loads((folder / FILE).read_text()), RunRecord.read(folder)
    read = asdict(new)
    assert read["answers"] == old["questions"]
    kept = old.keys() - {"questions", *OF_DECISION}
    assert {name: read[name] for name in kept} == {name: old[name] for name in kept}
    assert new.choices["method"] == METHODS.get(folder.name, folder.name)
    assert (new.choices["model"], new.choices["task"]) == ("local", "jsonl")
    if not old["allocation"]:  # of method=plan
        assert new.decision is None
        return
    decision = read["decision"]
    assert {name: decision[name] for name in ("source", "reliability", "fidelity", "samples")} == {
        name: old[name] for name in ("source", "reliability", "fidelity", "samples")
    }
    given, today = old["allocation"], decision["allocation"]
    assert (today["units"], today["sizes"]) == (given["layers"], given["numel"])
    assert {name: today[name] for name in ("kind", "values", "budget")} == {
        name: given[name] for name in ("kind", "values", "budget")
    }
    scores = {"layers": old["layers"], "values": old["scores"], "higher_means": old["higher_means"]}
    scores["intervals"] = None
    assert decision["scores"] == (scores if old["scores"] else None)


def test_a_failure_of_0_1_0_is_read():
    folder = GOLDEN / "runs" / "failed"
    old, new = json.loads((folder / "failure.json").read_text()), Failure.read(folder)
    assert {name: asdict(new)[name] for name in old} == old
    assert (new.choices["estimator"], new.choices["allocator"]) == ("datainf", "experts")


@pytest.mark.usefixtures("undrawn")
def test_runs_of_0_1_0_are_reported_as_it_reported_them(tmp_path):
    """Version 0.1.0 wrote `report.csv`, and called a run without a method `method=null`."""
    shutil.copytree(GOLDEN / "runs", tmp_path / "runs")
    write_report(tmp_path / "runs", Console(quiet=True))
    found, before = pd.read_csv(tmp_path / "runs" / "report.csv"), pd.read_csv(GOLDEN / "report.csv")
    before["run"] = before["run"].str.replace("method=null", "method=none")
    pd.testing.assert_frame_equal(found, before)
