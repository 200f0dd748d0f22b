"""The report: what the records say and nothing more, and files that are foreign are named, not swallowed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from layerif.record import RunRecord
from layerif.report import bootstrap_interval, comparisons, correlations, read, table, write

LAYERS = ["block.0", "block.1", "block.2", "block.3"]


def record(
    estimator: str, right: list[bool], *, scores=(1.0, 3.0, 2.0, 4.0), task="capital", seed=0, **options
) -> RunRecord:
    config = {
        "task": {"name": task},
        "estimator": {"_target_": f"layerif.estimators.{estimator}.X"},
        "method": {"_target_": "layerif.modules.LoRAMoEModule"},
    }
    accuracy = float(np.mean(right))
    return RunRecord(
        name="test",
        seed=seed,
        config=config,
        overrides=[],
        layers=LAYERS,
        scores=list(scores),
        higher_means="undertrained",
        source=estimator,
        allocation={"kind": "experts", "values": [1, 2, 3, 2], "budget": 8, "layers": LAYERS},
        metrics={"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1},
        questions={"options": {f"q{number}": bool(answer) for number, answer in enumerate(right)}},
        **options,
    )


def test_a_difference_is_called_real_only_where_its_interval_excludes_zero():
    rng = np.random.default_rng(0)
    weak = list(rng.random(200) < 0.5)
    strong = [answer or rng.random() < 0.5 for answer in weak]
    alike = list(rng.permutation(weak))
    pairs = comparisons([record("uniform", weak), record("datainf", strong), record("exact", alike)])
    found = {(row["from"], row["to"]): row for _, row in pairs.iterrows()}
    real = found["uniform experts", "datainf experts"]
    assert "higher than" in real["finding"]
    assert real["difference"] == pytest.approx(np.mean(strong) - np.mean(weak))
    assert "not distinguishable" in found["uniform experts", "exact experts"]["finding"]


def test_only_questions_both_answered_are_paired():
    first, second = record("uniform", [True] * 10), record("datainf", [False] * 12)
    ((_, row),) = comparisons([first, second]).iterrows()
    assert row["questions"] == 10
    assert "lower than" in row["finding"]


def test_other_tasks_and_seeds_are_not_paired():
    assert comparisons([record("a", [True] * 4), record("b", [True] * 4, task="region")]).empty
    assert comparisons([record("a", [True] * 4), record("b", [True] * 4, seed=1)]).empty


def test_the_bootstrap_interval_is_that_of_the_mean():
    differences = np.random.default_rng(0).normal(0.3, 1, 400)
    low, high = bootstrap_interval(differences, seed=0)
    half = 1.96 * differences.std() / 20
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.02)
    assert bootstrap_interval(differences, seed=0) == (low, high)
    assert bootstrap_interval(np.zeros(5), seed=0) == (0.0, 0.0)


def test_profiles_are_correlated_by_rank_and_constant_ones_left_out():
    found = correlations(
        [
            record("datainf", [True], scores=(1, 2, 3, 4)),
            record("datainf", [True], scores=(10, 30, 20, 40), task="region", reliability=0.5),
            record("uniform", [True], scores=(1, 1, 1, 1)),
        ]
    )
    assert found["Spearman"].tolist() == pytest.approx([0.8, 0.5])


def test_baselines_come_first_and_untouched_models_get_their_own_row(tmp_path):
    before = {"before/accuracy": 0.25, "before/accuracy_low": 0.1, "before/accuracy_high": 0.4}
    for number, one in enumerate([record("datainf", [True] * 4), record("uniform", [True] * 4)]):
        (tmp_path / str(number)).mkdir()
        one.metrics |= before
        one.questions["before/options"] = {"q0": False, "q1": True}
        one.write(tmp_path / str(number))
    rows = table(read(tmp_path, Console(quiet=True)))
    assert rows["run"].tolist() == ["before fine-tuning", "uniform experts", "datainf experts"]
    assert rows["accuracy"].tolist() == [0.25, 1.0, 1.0]
    assert rows["questions"].tolist() == [2, 4, 4]


def test_a_record_is_written_whole_and_read_back_equal(tmp_path):
    one = record("datainf", [True, False])
    one.write(tmp_path)
    assert RunRecord.read(tmp_path) == one
    with pytest.raises(ValueError, match=r"Out of range float values"):
        record("datainf", [True], reliability=float("nan")).write(tmp_path)
    assert RunRecord.read(tmp_path) == one
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_half_written_and_foreign_records_are_named_and_left_out(tmp_path):
    for name, content in (("half", '{"name": "x", "se'), ("foreign", '{"hello": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(content)
    with pytest.raises(ValueError, match="none of the 2 records"):
        write(tmp_path, Console(quiet=True))
    (tmp_path / "good").mkdir()
    record("datainf", [True] * 3).write(tmp_path / "good")
    console = Console(record=True, width=200)
    write(tmp_path, console)
    said = console.export_text()
    assert said.count("left out:") == 2
    assert len(pd.read_csv(tmp_path / "report.csv")) == 1


def test_a_folder_without_records_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"holds no record\.json: give the folder of a run or a sweep"):
        write(tmp_path, Console(quiet=True))
