"""The report: what the records say and nothing more, and files that are foreign are named, not swallowed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from layerif.record import RunRecord
from layerif.report import bootstrap_interval, comparisons, correlations, print_run, read, table, write

LAYERS = ["block.0", "block.1", "block.2", "block.3"]


def record(
    estimator: str,
    right: list[bool],
    *,
    scores=(1.0, 3.0, 2.0, 4.0),
    task="capital",
    seed=0,
    settings: Mapping[str, object] | None = None,
    **options,
) -> RunRecord:
    """settings: `section.key` of the configuration -> value."""
    config: dict[str, Any] = {
        "model": {"_target_": "layerif.models.Embedded", "cache": "outputs/store/models", "dtype": "float32"},
        "task": {"_target_": "layerif.data.task.Task", "name": task, "path": None, "num_train": None, "seed": seed},
        "estimator": {"_target_": f"layerif.estimators.{estimator}.X"},
        "allocator": {"_target_": "layerif.allocate.Experts", "budget": None, "beta": 2.5},
        "method": {"_target_": "layerif.modules.LoRAMoEModule", "r": 8, "seed": seed},
        "probe": {"_target_": "layerif.probe.Probe", "scope": "attention", "num_train": 100},
        "evaluation": {"_target_": "layerif.evaluate.Evaluation", "before": False, "num_questions": None},
        "seed": seed,
    }
    if estimator != "uniform":
        config["estimator"]["damping"] = 0.1
    for key, value in (settings or {}).items():
        section, name = key.split(".")
        config[section][name] = value
    config["method"]["model"] = config["model"]
    accuracy = float(np.mean(right))
    fields: dict[str, Any] = {
        "name": "test",
        "seed": seed,
        "config": config,
        "overrides": [],
        "layers": LAYERS,
        "scores": list(scores),
        "higher_means": "undertrained",
        "source": estimator,
        "allocation": {"kind": "experts", "values": [1, 2, 3, 2], "budget": 8, "layers": LAYERS},
        "metrics": {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1},
        "questions": {"options": {f"q{number}": bool(answer) for number, answer in enumerate(right)}},
    }
    return RunRecord(**(fields | options))


def with_before(one: RunRecord, right: list[bool]) -> RunRecord:
    one.metrics |= {"before/accuracy": float(np.mean(right)), "before/accuracy_low": 0.1, "before/accuracy_high": 0.4}
    one.questions["before/options"] = {f"q{number}": answer for number, answer in enumerate(right)}
    return one


def from_file(path: str, right: list[bool], **options) -> RunRecord:
    settings = {"allocator._target_": "layerif.fixed.File", "allocator.path": path}
    return record("datainf", right, scores=(), settings=settings, source=f"file({path})", higher_means="", **options)


def test_a_difference_is_called_real_only_where_its_interval_excludes_zero():
    rng = np.random.default_rng(0)
    weak = list(rng.random(200) < 0.5)
    strong = [answer or rng.random() < 0.5 for answer in weak]
    alike = list(rng.permutation(weak))
    pairs = comparisons([record("uniform", weak), record("datainf", strong), record("exact", alike)])
    found = {(row["from"], row["to"]): row for row in pairs.to_dict("records")}
    real = found["uniform experts", "datainf experts"]
    assert "higher than" in real["finding"]
    assert real["difference"] == pytest.approx(np.mean(strong) - np.mean(weak))
    assert "not distinguishable" in found["uniform experts", "exact experts"]["finding"]


def test_only_questions_both_answered_are_paired():
    first, second = record("uniform", [True] * 10), record("datainf", [False] * 12)
    (row,) = comparisons([first, second]).to_dict("records")
    assert row["questions"] == 10
    assert "lower than" in row["finding"]


def test_other_tasks_and_seeds_are_not_paired():
    assert comparisons([record("a", [True] * 4), record("b", [True] * 4, task="region")]).empty
    assert comparisons([record("a", [True] * 4), record("b", [True] * 4, seed=1)]).empty


def test_what_differs_between_runs_is_in_their_names_and_none_is_lost():
    runs = [
        record(name, [True] * 4, settings={"allocator.budget": budget})
        for name in ("uniform", "datainf")
        for budget in (6, 9)
    ]
    names = [f"{name} experts allocator.budget={budget}" for name in ("uniform", "datainf") for budget in (6, 9)]
    assert table(runs)["run"].tolist() == names
    assert len(comparisons(runs)) == 6


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("estimator.damping", (0.1, 10.0)),
        ("allocator.beta", (2.5, 3.0)),
        ("method.r", (8, 16)),
        ("probe.scope", ("attention", "mlp")),
        ("task.num_train", (50, None)),
    ],
)
def test_every_setting_tells_runs_apart(key, values):
    runs = [record("datainf", [True, False], settings={key: value}) for value in values]
    (pair,) = comparisons(runs).to_dict("records")
    spelled = ["null" if value is None else str(value) for value in values]
    assert [pair["from"], pair["to"]] == [f"datainf experts {key}={value}" for value in spelled]


def test_what_follows_from_a_choice_is_not_in_the_names():
    exact = record("exact", [True] * 2, settings={"estimator.damping": 0.5})
    rank = record(
        "datainf", [True] * 2, settings={"allocator._target_": "layerif.allocate.Rank", "allocator.beta": 1.0}
    )
    rank.allocation["kind"] = "rank"
    cached = record("uniform", [True] * 2, settings={"model.cache": "/elsewhere", "evaluation.before": True})
    runs = [cached, record("datainf", [True] * 2), exact, rank]
    assert table(runs)["run"].tolist() == ["uniform experts", "datainf experts", "exact experts", "datainf rank"]


def test_the_same_job_run_twice_is_two_rows():
    runs = [record("datainf", [True] * 4), record("datainf", [True] * 3 + [False])]
    assert table(runs)["run"].tolist() == ["datainf experts (1)", "datainf experts (2)"]
    assert comparisons(runs)["difference"].tolist() == [-0.25]
    assert len(table([runs[0], runs[0]])) == 2


def test_other_models_are_rows_of_their_own_and_not_paired():
    models = [{"model.name": f"org/{name}", "model._target_": "layerif.models.Hub"} for name in ("large", "small")]
    runs = [with_before(record("datainf", [True] * 4, settings=model), [True, False]) for model in models]
    rows = table(runs)
    assert rows["model"].tolist() == ["large", "large", "small", "small"]
    assert rows["run"].tolist() == ["before fine-tuning", "datainf experts"] * 2
    pairs = comparisons(runs)
    assert pairs["model"].tolist() == ["large", "small"]
    assert all(
        finding.startswith(f"{name} capital: ") for name, finding in zip(pairs["model"], pairs["finding"], strict=True)
    )
    assert "model" not in table(runs[:1])


def test_tasks_of_one_name_in_other_folders_are_not_paired():
    runs = [record("datainf", [True] * 4, task="jsonl", settings={"task.path": path}) for path in ("/a", "/b")]
    assert table(runs)["task"].tolist() == ["jsonl path=/a", "jsonl path=/b"]
    assert comparisons(runs).empty


def test_an_untouched_model_is_one_row_unless_it_answered_otherwise():
    seeds = [with_before(record("datainf", [True] * 4, seed=seed), [True, False]) for seed in (0, 1)]
    twice = with_before(record("uniform", [True] * 4), [True, False])
    rows = table([twice, *seeds])
    assert rows["run"].tolist() == ["before fine-tuning", "uniform experts", "datainf experts", "datainf experts"]
    assert rows["seed"].tolist() == ["0, 1", 0, 0, 1]
    short = with_before(record("exact", [True] * 4, settings={"evaluation.num_questions": 1}), [True])
    names = table([twice, short])["run"].tolist()
    assert names[:2] == [f"before fine-tuning evaluation.num_questions={number}" for number in ("null", 1)]


def test_runs_without_a_common_question_are_named_and_skipped():
    first, second = record("uniform", [True] * 4), record("datainf", [True] * 4)
    second.questions = {"options": {"other": True}}
    console = Console(record=True, width=200)
    assert comparisons([first, second, record("exact", [True] * 4)], console)["to"].tolist() == ["exact experts"]
    said = console.export_text()
    assert "capital: datainf experts and uniform experts share no question and are not compared" in said
    assert len(said.splitlines()) == 2


def test_an_allocation_from_a_file_is_called_so_and_needs_no_scores(tmp_path):
    one = from_file("/a.json", [True] * 4)
    pairs = comparisons([record("uniform", [True] * 4), one])
    assert pairs["to"].tolist() == ["allocation from file"]
    both = table([one, from_file("/b.json", [False] * 4)])["run"].tolist()
    assert both == [f"allocation from file allocator.path=/{name}.json" for name in "ab"]
    console = Console(record=True, width=140)
    print_run(one, tmp_path, console)
    said = console.export_text()
    assert "file(/a.json)" in said
    assert "datainf" not in said
    assert pd.read_csv(tmp_path / "layers.csv").columns.tolist() == ["layer", "experts"]
    assert (tmp_path / "allocation.png").exists()
    assert not (tmp_path / "scores.png").exists()


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


def test_every_distinct_profile_is_kept():
    runs = [
        record("datainf", [True], scores=np.roll([1.0, 2, 3, 4], shift), settings={"estimator.damping": damping})
        for shift, damping in enumerate((0.001, 0.1, 100))
    ]
    runs.append(
        record("datainf", [True], scores=runs[0].scores, settings={"estimator.damping": 0.001})
    )  # a budget, say
    found = correlations(runs)
    names = [f"capital datainf estimator.damping={damping}" for damping in ("0.001", "0.1", "100")]
    assert list(zip(found["profile"], found["and"], strict=True)) == list(itertools.combinations(names, 2))
    seeds = [record("datainf", [True], scores=np.roll([1.0, 2, 3, 4], seed), seed=seed) for seed in (0, 1)]
    assert correlations(seeds)["and"].tolist() == ["capital datainf seed=1"]


def test_profiles_of_other_models_are_not_correlated():
    runs = [record("datainf", [True], settings={"model.name": f"org/{name}"}, reliability=0.5) for name in "ab"]
    assert correlations(runs)["profile"].tolist() == ["a capital datainf", "b capital datainf"]
    assert set(correlations(runs)["and"]) == {"itself, on disjoint halves of its samples"}


def test_baselines_come_first_and_untouched_models_get_their_own_row(tmp_path):
    for number, one in enumerate([record("datainf", [True] * 4), record("uniform", [True] * 4)]):
        (tmp_path / str(number)).mkdir()
        with_before(one, [False, True]).write(tmp_path / str(number))
    rows = table(read(tmp_path, Console(quiet=True)))
    assert rows["run"].tolist() == ["before fine-tuning", "uniform experts", "datainf experts"]
    assert rows["accuracy"].tolist() == [0.5, 1.0, 1.0]
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
