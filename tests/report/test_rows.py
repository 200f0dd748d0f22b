"""The report of a sweep shows how well harm found planted wrong answers, for runs of method=rows alone."""

from __future__ import annotations

from layerif.record.record import RunRecord
from layerif.report.arms import runs_of
from layerif.report.tables import influence_of_rows
from tests.records import choices_of, config_of, record


def of_rows(estimator: str, **metrics: float) -> RunRecord:
    found = {"harmful": 0.25, **metrics}
    choices, config = choices_of(estimator, method="rows"), config_of(estimator, settings={"method": {}})
    return RunRecord(name="x", seed=0, choices=choices, config=config, overrides=[], metrics=found)


def test_runs_of_rows_stand_in_a_table_of_their_own():
    flipped = {"mislabel_auc": 0.7, "mislabel_auc_low": 0.42, "mislabel_auc_high": 0.9, "mislabel_found": 0.5}
    jobs = [of_rows("datainf", **flipped), of_rows("cosine")]
    table = influence_of_rows(runs_of(jobs, None))
    assert list(table["run"]) == ["rows by datainf", "rows by cosine"]
    assert table["AUC of wrong answers"].tolist()[0] == "0.700 (0.420 to 0.900)"
    assert "fidelity" not in list(table)
    assert len(influence_of_rows(runs_of([record("exact", [True])], None))) == 0
