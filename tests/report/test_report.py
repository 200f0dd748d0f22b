"""The report says what the records say and nothing more, and it names the files that it leaves out."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from markupsafe import escape
from rich.console import Console

from layerif.record.names import UNTOUCHED
from layerif.record.record import Failure, RunRecord
from layerif.record.text import print_run
from layerif.report import comparisons as compare
from layerif.report import report, write_report
from layerif.report.arms import distinct, runs_of
from layerif.report.page import breakable
from layerif.report.plots import plot_routing
from layerif.report.reading import read_jobs
from layerif.report.tables import correlations, cost, grid, in_full, loads, results
from layerif.stats import t_interval
from tests.records import failure, from_file, record, with_before, written

pytestmark = pytest.mark.usefixtures("undrawn")


def comparisons(records: Sequence[RunRecord]) -> pd.DataFrame:
    return compare.comparisons(runs_of(records), "accuracy")[0]


def table(records: Sequence[RunRecord | Failure]) -> pd.DataFrame:
    return in_full(runs_of(records))


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
    settings = {"allocator.beta": 1.0}
    rank = record("datainf", [True] * 2, settings=settings, choices={"allocator": "rank"}, decision={"kind": "rank"})
    before = record("uniform", [True] * 2, settings={"evaluation.before": True})
    runs = [before, record("datainf", [True] * 2), exact, rank]
    assert table(runs)["run"].tolist() == ["uniform experts", "datainf experts", "exact experts", "datainf rank"]


def test_the_same_job_run_twice_is_two_rows():
    runs = [record("datainf", [True] * 4), record("datainf", [True] * 3 + [False])]
    assert table(runs)["run"].tolist() == ["datainf experts (1)", "datainf experts (2)"]
    assert comparisons(runs)["difference"].tolist() == [-0.25]
    assert len(table([runs[0], runs[0]])) == 2


def test_other_models_are_rows_of_their_own_and_not_paired():
    runs = [
        with_before(
            record("datainf", [True] * 4, settings={"model.name": f"org/{name}"}, choices={"model": "hub"}),
            [True, False],
        )
        for name in ("large", "small")
    ]
    rows = table(runs)
    assert rows["model"].tolist() == ["large", "large", "small", "small"]
    assert rows["run"].tolist() == [UNTOUCHED, "datainf experts"] * 2
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
    assert rows["run"].tolist() == [UNTOUCHED, "uniform experts", "datainf experts", "datainf experts"]
    assert rows["seed"].tolist() == ["any", "0", "0", "1"]
    short = with_before(record("exact", [True] * 4, settings={"evaluation.num_questions": 1}), [True])
    names = table([twice, short])["run"].tolist()
    assert names[:2] == [f"{UNTOUCHED} evaluation.num_questions={number}" for number in ("null", 1)]


def test_a_run_that_only_measures_is_its_untouched_model_and_no_arm():
    ours = {"method": {"_target_": "layerif.app.methods.none.ScoresOnly"}}  # as in `conf/method/none.yaml`
    measured = record("datainf", [], choices={"method": "none"}, settings=ours, metrics={}, answers={})
    trained = record("datainf", [True] * 4)
    runs = runs_of([with_before(measured, [True, False]), trained])
    assert [(run.arm, run.is_trained) for run in runs] == [(UNTOUCHED, False), ("datainf experts", True)]
    assert grid(runs) == []
    assert runs_of([measured])[0].arm == UNTOUCHED


def test_runs_without_a_common_question_are_named_and_skipped():
    first, second = record("uniform", [True] * 4), record("datainf", [True] * 4)
    second.answers = {"options": {"other": True}}
    found, remarks = compare.comparisons(runs_of([first, second, record("exact", [True] * 4)]), "accuracy")
    assert found["to"].tolist() == ["exact experts"]
    assert remarks[0] == "capital: datainf experts and uniform experts share no question, not compared"
    assert len(remarks) == 2


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
    assert pd.read_csv(tmp_path / "layers.csv").columns.tolist() == ["depth", "layer", "experts"]
    assert (tmp_path / "allocation.png").exists()
    assert not (tmp_path / "scores.png").exists()


def test_profiles_are_correlated_by_rank_and_constant_ones_left_out():
    found = correlations(
        [
            record("datainf", [True], decision={"scores": (1, 2, 3, 4)}),
            record("datainf", [True], task="region", decision={"scores": (10, 30, 20, 40), "reliability": 0.5}),
            record("uniform", [True], decision={"scores": (1, 1, 1, 1)}),
        ]
    )
    assert found["Spearman"].tolist() == pytest.approx([0.8, 0.5])


def test_every_distinct_profile_is_kept():
    def rolled(shift: int, **options: Any) -> RunRecord:
        return record("datainf", [True], decision={"scores": np.roll([1.0, 2, 3, 4], shift).tolist()}, **options)

    dampings = [{"estimator.damping": damping} for damping in (0.001, 0.1, 100)]
    runs = [rolled(shift, settings=settings) for shift, settings in enumerate(dampings)]
    runs.append(rolled(0, settings=dampings[0]))  # as if of another budget
    found = correlations(runs)
    names = [f"capital datainf estimator.damping={damping}" for damping in ("0.001", "0.1", "100")]
    assert list(zip(found["profile"], found["and"], strict=True)) == list(itertools.combinations(names, 2))
    seeds = [rolled(seed, seed=seed) for seed in (0, 1)]
    assert correlations(seeds)["and"].tolist() == ["capital datainf seed=1"]


def test_profiles_of_other_models_are_not_correlated():
    runs = [
        record("datainf", [True], settings={"model.name": f"org/{name}"}, decision={"reliability": 0.5})
        for name in "ab"
    ]
    assert correlations(runs)["profile"].tolist() == ["a capital datainf", "b capital datainf"]
    assert set(correlations(runs)["and"]) == {"itself, on disjoint halves of its samples"}


def test_baselines_come_first_and_untouched_models_get_their_own_row(tmp_path):
    for number, one in enumerate([record("datainf", [True] * 4), record("uniform", [True] * 4)]):
        (tmp_path / str(number)).mkdir()
        with_before(one, [False, True]).write(tmp_path / str(number))
    rows = table(read_jobs(tmp_path).records)
    assert rows["run"].tolist() == [UNTOUCHED, "uniform experts", "datainf experts"]
    assert rows["accuracy"].tolist() == [0.5, 1.0, 1.0]
    assert rows["questions"].tolist() == [2, 4, 4]


def test_a_record_is_written_whole_and_read_back_equal(tmp_path):
    one = record("datainf", [True, False])
    one.write(tmp_path)
    assert RunRecord.read(tmp_path) == one
    with pytest.raises(ValueError, match=r"Out of range float values"):
        record("datainf", [True], decision={"reliability": float("nan")}).write(tmp_path)
    assert RunRecord.read(tmp_path) == one
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_record_of_an_estimator_that_nobody_ships_is_read_and_named(tmp_path):
    write_report(written(tmp_path, [record("nosuch", [True] * 3), record("uniform", [True] * 3)]), Console(quiet=True))
    assert "| nosuch experts |" in (tmp_path / "report.md").read_text()
    assert set(pd.read_csv(tmp_path / "report.csv")["run"]) == {"uniform experts", "nosuch experts"}


def test_half_written_and_foreign_records_are_named_and_left_out(tmp_path):
    for name, content in (("half", '{"name": "x", "se'), ("foreign", '{"hello": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(content)
    with pytest.raises(ValueError, match="none of the 2 records"):
        write_report(tmp_path, Console(quiet=True))
    (tmp_path / "good").mkdir()
    record("datainf", [True] * 3).write(tmp_path / "good")
    console = Console(record=True, width=200)
    write_report(tmp_path, console)
    said = console.export_text()
    assert said.count("left out:") == 2
    assert len(pd.read_csv(tmp_path / "report.csv")) == 1


def test_what_is_wrong_with_a_file_says_what_to_do(tmp_path):
    for content, said in (('{"name"', "if its job was killed"), ("[]", "it holds a list"), ("{}", "it lacks name")):
        (tmp_path / "record.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            RunRecord.read(tmp_path)
    (tmp_path / "failure.json").write_text('{"name": 1}')
    with pytest.raises(ValueError, match=r"readable failure of layerif: name='1': input should be a valid string"):
        Failure.read(tmp_path)


def test_what_is_no_folder_names_the_nearest(tmp_path):
    (tmp_path / "sweeps" / "table1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"tabel1' is not a folder \(did you mean 'table1'\?\); .*' holds table1"):
        read_jobs(tmp_path / "sweeps" / "tabel1")
    with pytest.raises(ValueError, match=r"is not a folder \(did you mean 'sweeps'\?\)"):
        read_jobs(tmp_path / "sweep" / "table1")
    (tmp_path / "report.md").touch()
    with pytest.raises(ValueError, match=rf"is a file: give the folder that holds it, '{tmp_path}'"):
        read_jobs(tmp_path / "report.md")


def test_the_report_is_written_before_it_is_printed(tmp_path, monkeypatch):
    written(tmp_path, [record("datainf", [True] * 3)])

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    console = Console(quiet=True)
    monkeypatch.setattr(console, "print", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, console)
    assert all((tmp_path / f"report.{kind}").stat().st_size for kind in ("html", "md", "csv"))


def test_who_reads_only_the_first_line_gets_no_error(tmp_path, monkeypatch):
    written(tmp_path, [record("datainf", [True] * 3)])
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        report.main([str(tmp_path)])
    assert (tmp_path / "report.csv").exists()


@pytest.mark.slow
def test_a_process_whose_reader_is_gone_ends_well(tmp_path):
    written(tmp_path, [record("datainf", [True] * 3)])
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "layerif.report", str(tmp_path)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.csv").exists()


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "no space is left on the disk; free some and give the"),
    ],
)
def test_an_end_before_the_end_has_no_traceback(tmp_path, monkeypatch, capsys, raised, code, said):
    def ended(*_, **__):
        raise raised

    monkeypatch.setattr(report, "write_report", ended)
    with pytest.raises(SystemExit) as left_with:
        report.main([str(tmp_path)])
    assert left_with.value.code == code
    assert said in capsys.readouterr().err


def test_a_folder_in_the_reports_place_is_said_so(tmp_path, capsys):
    written(tmp_path, [record("datainf", [True] * 3)])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert f"the report cannot be written there: [Errno 21] Is a directory: '{tmp_path / 'report.html'}'" in said


def test_a_model_that_was_never_given_has_no_name_of_question_marks(tmp_path):
    jobs = [
        failure("datainf", seed=seed, choices={"model": "local"}, settings={"model.path": path})
        for seed, path in enumerate(("???", "/m/tiny"))
    ]
    console = Console(record=True, width=200)
    write_report(written(tmp_path, jobs), console)
    said = console.export_text()
    assert "???" not in said.replace("model.path=???", "")
    assert "local, tiny on capital" in said


def test_jobs_that_began_and_did_not_end_are_named(tmp_path):
    record("datainf", [True] * 3).write(tmp_path)
    for name, overrides in ((".", ""), ("killed", "- seed=1"), ("tried", "- dry_run=True")):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text(overrides)
    assert read_jobs(tmp_path).unfinished == ["killed"]
    console = Console(record=True, width=200)
    write_report(tmp_path, console)
    assert "1 run started and did not end: killed, or still at work." in console.export_text()
    assert "## Unfinished\n\n- killed" in (tmp_path / "report.md").read_text()


def test_a_folder_without_records_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"holds no record\.json: give the folder of a run or a sweep"):
        write_report(tmp_path, Console(quiet=True))


def test_seeds_of_an_arm_are_one_cell_with_students_interval():
    runs = [
        record("datainf", [True] * right + [False] * (10 - right), seed=seed) for seed, right in enumerate((5, 6, 7))
    ]
    cell = results(runs_of(runs), "accuracy").cells["datainf experts", "capital"]
    assert cell.mean == pytest.approx(0.6)
    assert cell.basis == "t over 3 seeds"
    assert (cell.low, cell.high) == pytest.approx((0.6 - 0.2484, 0.6 + 0.2484), abs=1e-4)
    single = results(runs_of(runs[:1]), "accuracy").cells["datainf experts", "capital"]
    assert single.basis == "Wilson over 10 questions, 1 seed"
    assert (single.low, single.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_seeds_are_paired_with_their_like():
    rng = np.random.default_rng(0)
    answers = {(name, seed): list(rng.random(40) < 0.5) for name in ("uniform", "datainf") for seed in range(3)}
    runs = [record(name, right, seed=seed) for (name, seed), right in answers.items()]
    (row,) = comparisons(runs).to_dict("records")
    means = [np.mean(answers["datainf", seed]) - np.mean(answers["uniform", seed]) for seed in range(3)]
    assert row["seeds"] == 3
    assert row["difference"] == pytest.approx(np.mean(means))
    won = sum(
        b and not a
        for seed in range(3)
        for a, b in zip(answers["uniform", seed], answers["datainf", seed], strict=True)
    )
    assert row["won"] == won


def test_a_seed_of_one_part_alone_tells_repetitions_apart():
    settings = [{"probe.seed": number} for number in (0, 1, 2)]
    runs = runs_of([record("datainf", [True, False], settings=one) for one in settings])
    assert [run.arm for run in runs] == ["datainf experts"] * 3
    assert [run.seed for run in runs] == ["0", "1", "2"]


def test_a_metric_without_questions_is_paired_by_seed_in_logarithms():
    runs = []
    for seed in range(3):
        for name, perplexity in (("uniform", 20.0 + seed), ("datainf", (2 + seed) * (20.0 + seed))):
            runs.append(record(name, [True], seed=seed, metrics={"perplexity_256": perplexity}, answers={}))
    (row,) = compare.comparisons(runs_of(runs), "perplexity_256")[0].to_dict("records")
    assert row["difference"] == pytest.approx(np.log([2, 3, 4]).mean())
    assert (row["low"], row["high"]) == pytest.approx(t_interval(np.log([2, 3, 4])))
    assert row["seeds"] == 3


def test_a_run_that_no_seed_touches_is_no_evidence_however_often_it_is_repeated():
    def once(name: str, seed: int) -> RunRecord:
        perplexity = {"uniform": 505.4, "datainf": 505.1}.get(name, 30.0 + seed)
        metrics = {"accuracy": 0.4, "perplexity_256": perplexity}
        return record(name, [True, False] * 5, seed=seed, metrics=metrics)

    runs = runs_of([once(name, seed) for seed in range(3) for name in ("uniform", "datainf", "random")])
    table, _ = compare.comparisons(runs, "perplexity_256")
    alike = table.query("to == 'datainf experts'").to_dict("records")[0]
    assert np.isnan([alike["p"], alike["low"], alike["smallest found"]]).all()
    assert "each of 3 seeds, which decides nothing" in alike["finding"]
    assert any("after Holm's correction of 2" in text for text in table["finding"])
    cells = results(runs, "perplexity_256").cells
    assert cells["datainf experts", "capital"].basis == "3 seeds alike, no interval"
    assert np.isnan(cells["datainf experts", "capital"].low)
    assert results(runs, "accuracy").cells["datainf experts", "capital"].basis.startswith("Wilson over 10 questions, 3")
    assert len(distinct(runs)) == 1 + 1 + 3
    (found,) = compare.analyses(runs, "perplexity_256")
    assert (found.where, found.text.split(";")[0]) == ("capital", "capital: 5 runs, 3 arms")
    assert found.variance.df == 2
    assert found.mixed == "there is 1 task, and the spread of tasks needs at least 3"


def test_only_arms_that_differ_in_one_thing_are_compared():
    runs = []
    for budget in (8, 16):
        for name in ("uniform", "datainf"):
            size: dict[str, Any] = {"settings": {"allocator.budget": budget}, "decision": {"budget": budget}}
            runs.append(record(name, [True] * 4, **size))
    pairs = comparisons(runs)
    assert len(pairs) == 4
    assert all(
        ("uniform" in a) == ("uniform" in b) or a[-1] == b[-1] for a, b in zip(pairs["from"], pairs["to"], strict=True)
    )


def test_failed_and_missing_cells_are_shown_as_such(tmp_path):
    jobs = [record(name, [True, False], seed=seed) for name in ("uniform", "datainf") for seed in (0, 1)]
    jobs = [*jobs[:3], failure("datainf", seed=1, error="<b>out of memory</b>"), record("uniform", [True], seed=2)]
    found = read_jobs(written(tmp_path, jobs))
    runs = runs_of([*found.records, *found.failures])
    cell = results(runs, "accuracy").cells["datainf experts", "capital"]
    assert (cell.failed, cell.missing) == (("1",), ("2",))
    assert grid(runs) == [("datainf experts", "capital", "2")]
    assert cell.mean == 0.5
    write_report(tmp_path, Console(quiet=True))
    page = (tmp_path / "report.html").read_text().replace("<wbr>", "")
    assert "failed: 1" in page
    assert "missing: 2" in page
    assert "&lt;b&gt;out of memory&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "1 run failed" in page


def test_a_record_takes_the_place_of_a_failure_in_its_folder(tmp_path):
    written(tmp_path, [failure("datainf")])
    record("datainf", [True]).write(tmp_path / "0")
    assert not read_jobs(tmp_path).failures


def test_a_folder_of_failures_alone_is_a_report_too(tmp_path):
    write_report(written(tmp_path, [failure("datainf"), failure("uniform")]), Console(quiet=True))
    assert "2 runs failed" in (tmp_path / "report.html").read_text()


def test_the_page_is_self_contained(tmp_path):
    runs = [
        record(name, [True] * (5 + seed) + [False] * 5, seed=seed) for name in ("uniform", "datainf") for seed in (0, 1)
    ]
    runs[0].notes.append("a <note>")
    write_report(written(tmp_path, runs), Console(quiet=True))
    page = (tmp_path / "report.html").read_text().replace("<wbr>", "")
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert 'src="data:image/svg+xml' in page
    assert page.count("<caption>") == page.count("<table>")
    assert page.count("alt=") == page.count("<img ")
    for said in (
        "t over 2 seeds",
        "p Holm",
        "Analysis of variance",
        "Tukey",
        "layerif estimator=uniform",
        "a &lt;note&gt;",
    ):
        assert said in page
    markdown = (tmp_path / "report.md").read_text()
    assert "| uniform experts | 0.523; " in markdown
    assert "not distinguishable" in markdown
    csv = pd.read_csv(tmp_path / "report.csv")
    assert csv["accuracy"].tolist() == pytest.approx([5 / 10, 6 / 11] * 2)


def test_texts_of_others_are_neither_html_nor_links_in_markdown(tmp_path):
    runs = [record("uniform", [True] * 5), failure("datainf")]
    evil = "<script>x</script> <img src=x onerror=y> ![a](http://others) 1<2"
    runs[0].notes.append(evil)
    runs[1].error = evil
    write_report(written(tmp_path, runs), Console(quiet=True))
    text = (tmp_path / "report.md").read_text()
    assert text.count("&lt;script>x&lt;/script> &lt;img src=x onerror=y> ![a]\\(http://others) 1<2") >= 2
    assert "<script" not in text


def test_the_same_folder_gives_the_same_page(tmp_path):
    written(tmp_path, [record(name, [True, False] * 5) for name in ("uniform", "datainf")])
    pages = []
    for _ in range(2):
        write_report(tmp_path, Console(quiet=True))
        pages.append((tmp_path / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_what_came_from_the_store_is_counted_as_saved():
    taken = [{"kind": "grams", "key": "f", "reused": reused, "seconds": 29.5} for reused in (False, True, True)]
    taken[2]["seconds"] = None  # the store did not say how many
    runs = [record("a", [True], measurements=taken[:1]), record("b", [True], measurements=taken[1:])]
    found = dict(cost(runs).to_numpy().tolist())
    assert found["measurements taken from the store"] == 2
    assert found["seconds that this saved"] == pytest.approx(29.5)
    assert "seconds that this saved" not in dict(cost(runs[:1]).to_numpy().tolist())


@pytest.mark.parametrize("text", ["out of memory", "a=0.5  b=<x>", "a" * 60, "", "x=", "/a/b.json ok."])
def test_places_to_break_change_no_text(text):
    found = str(breakable(text))
    assert found.replace("<wbr>", "") == str(escape(text))
    assert max(map(len, found.replace("<wbr>", " ").split()), default=0) <= 30


def test_how_evenly_routers_spread_is_shown_where_the_record_has_it():
    one = record("datainf", [True])
    assert plot_routing(runs_of([one])) is None
    assert loads(runs_of([one])).empty
    even, collapsed = {"load": [0.5, 0.5], "entropy": np.log(2)}, {"load": [1.0, 0.0], "entropy": 0.1 * np.log(2)}
    one.routing = {"block.0": even, "block.2": collapsed}
    plot = plot_routing(runs_of([with_before(one, [False])]))
    assert plot is not None
    assert plot.alt == "capital datainf experts seed 0: lowest 0.10"
    (row,) = loads(runs_of([one])).to_dict("records")
    assert (row["least"], row["in"], row["most"], row["and in"]) == (0.0, "block.2", 2.0, "block.2")


def test_arms_by_scores_of_another_task_are_called_after_it():
    def of(task: str, path: str | None = None) -> dict[str, object]:
        return {"score_task": {"name": task, "path": path, "pattern": task}}

    runs = [record("datainf", [True] * 4, settings=of(task)) for task in ("cola", "region")]
    runs.append(record("datainf", [True] * 4))
    names = ["datainf experts by scores of cola", "datainf experts by scores of region", "datainf experts"]
    assert table(runs)["run"].tolist() == names
    assert len(comparisons(runs)) == 3
    folders = [record("datainf", [True] * 4, settings=of("jsonl", path)) for path in ("/a", "/b")]
    assert table(folders)["run"].tolist() == [
        f"datainf experts by scores of jsonl score_task.path=/{name}" for name in "ab"
    ]


def test_perplexities_are_averaged_by_their_logarithms():
    runs = [record("datainf", [True], seed=n, metrics={"perplexity_256": 10.0**n}, answers={}) for n in range(3)]
    cell = results(runs_of(runs), "perplexity_256").cells["datainf experts", "capital"]
    assert cell.mean == pytest.approx(10)
    assert cell.low > 0
    assert cell.low * cell.high == pytest.approx(100)


def test_a_run_that_failed_when_run_again_is_named_beside_its_record(tmp_path):
    written(tmp_path, [record("datainf", [True])])
    failure("datainf").write(tmp_path / "0")
    found = read_jobs(tmp_path)
    assert (len(found.records), found.failures, found.left_out) == (1, [], [])
    assert found.failed_again == ["0: out of memory"]
    console = Console(record=True, width=200)
    write_report(tmp_path, console)
    said = console.export_text()
    assert "1 run failed when run again; the numbers are from the run before, and the errors are below." in said
    assert "Failed when run again:\n  0: out of memory" in said
    for text in (said, (tmp_path / "report.md").read_text()):
        assert "readable" not in text
    assert "## Failed when run again\n\n- 0: out of memory" in (tmp_path / "report.md").read_text()


def test_a_run_that_failed_again_beside_an_unreadable_record_is_a_failed_one(tmp_path):
    written(tmp_path, [failure("datainf")])
    (tmp_path / "0" / "record.json").write_text("{")
    found = read_jobs(tmp_path)
    assert (len(found.failures), found.failed_again, len(found.left_out)) == (1, [], 1)
