"""Published numbers stand labelled beside their runs, and are never held against another model or task."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from layerif.record.names import UNTOUCHED
from layerif.report import main, write_report
from layerif.report.arms import runs_of
from layerif.report.expected import Expected, meets
from layerif.report.tables import grid, results
from tests.records import failure, record, with_before, written

pytestmark = pytest.mark.usefixtures("undrawn")

PAPER: dict[str, Any] = {
    "source": "A paper, table 1",
    "metric": "accuracy",
    "of": {"model": "mistral_7b", "allocator.beta": 2.5},
    "arms": {
        "uniform": {"estimator": "uniform"},
        "layerif": {"estimator": "datainf", "estimator.damping": "0.1"},
    },
    "columns": {"countries": {"task": "capital"}, "others": {"task": "region"}},
    "values": {"layerif": {"countries": 0.9}},
}
MISTRAL = {"model": {"name": "mistralai/Mistral-7B-v0.1"}}


def expected(folder: Path, **changes: Any) -> Path:
    file = folder / "expected.json"
    file.write_text(json.dumps(PAPER | changes))
    return file


def runs(**options: Any):
    return [record("uniform", [True, False], **options), record("datainf", [True] * 3 + [False], **options)]


def test_conditions_are_those_of_the_command_line():
    job = failure("datainf", settings={"allocator.budget": 160})
    assert meets(job, {"estimator": "datainf", "task": "capital", "model": "smollm2", "method": "lora_moe"})
    assert meets(job, {"allocator.budget": "160", "estimator.damping": 0.1})
    for other in ({"estimator": "uniform"}, {"task": "region"}, {"model": "mistral_7b"}, {"allocator.budget": 80}):
        assert not meets(job, other)
    assert not meets(job, {"allocator.shape": "2468"})
    assert meets(failure("datainf", choices={"method": "none"}, settings={"method": {}}), {"method": "none"})
    assert not meets(job, {"method": "none"})
    pruned = failure("datainf", choices={"method": "prune"})
    for pruner in ({"pruner": "wanda"}, {"pruner.n": None}):  # this key is in every configuration
        assert meets(pruned, pruner)
        assert not meets(job, pruner)


@pytest.mark.parametrize(
    ("model", "is_it"),
    [
        (("mistral_7b", {"name": "mistralai/Mistral-7B-v0.1"}), True),
        (("mistral_7b", {"name": "mistralai/another"}), False),
        (("hub", {"name": "mistralai/mistral-7b-v0.1"}), True),
        (("local", {"path": "/models/Mistral-7B-v0.1"}), True),
        (("hub", {"name": "else/Mistral-7B-v0.1"}), False),
        (("local", {"path": "/models/Mistral-7B-v0.1/pruned"}), False),
        (("smollm2", {}), False),
    ],
)
def test_a_model_is_the_same_from_the_hub_and_from_a_folder(tmp_path, model, is_it):
    choice, where = model
    job = failure("datainf", choices={"model": choice}, settings={"model": where})
    assert meets(job, {"model": "mistral_7b"}) == is_it
    assert Expected.read(expected(tmp_path)).is_of(job) == is_it


def test_a_choice_counts_as_those_it_starts_from_and_not_the_other_way_round():
    gemma, experts = (failure("datainf", choices={"allocator": name}) for name in ("experts_gemma", "experts"))
    assert meets(gemma, {"allocator": "experts"})
    assert meets(gemma, {"allocator": "experts_gemma"})
    assert not meets(experts, {"allocator": "experts_gemma"})
    other = failure("datainf", choices={"model": "mistral_7b"}, settings={"model.name": "org/other"})
    assert meets(other, {"model": "hub", "model.name": "org/other"})
    own = failure("my_estimator", choices={"method": "my_method"})  # its YAML lies in a folder of the user's
    assert meets(own, {"estimator": "my_estimator"})
    assert not meets(own, {"method": "lora_moe"})


def test_the_papers_number_and_the_difference_to_it_are_shown_for_its_model_and_task(tmp_path):
    paper = Expected.read(expected(tmp_path))
    cells = results(runs_of(runs(settings=MISTRAL), paper), "accuracy", paper).cells
    assert cells["layerif", "countries"].paper == 0.9
    assert cells["layerif", "countries"].to_paper == pytest.approx(0.75 - 0.9)
    assert cells["uniform", "countries"].paper is None
    assert any("inside our interval" in line for line in cells["layerif", "countries"].lines())


@pytest.mark.parametrize("settings", [{}, MISTRAL | {"small": True}, MISTRAL | {"allocator.beta": 3.0}])
def test_no_difference_is_taken_to_another_model_of_a_small_variant_or_in_other_settings(tmp_path, settings):
    paper = Expected.read(expected(tmp_path))
    cell = results(runs_of(runs(settings=settings), paper), "accuracy", paper).cells["layerif", "countries"]
    assert (cell.paper, cell.to_paper) == (0.9, None)
    write_report(
        written(tmp_path / "sweep", runs(settings=settings)), Console(quiet=True), expected=tmp_path / "expected.json"
    )
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "A paper, table 1, accuracy of mistralai/Mistral-7B-v0.1 with allocator.beta=2.5." in page
    assert "Differences from them are shown only for such runs at full size" in page
    assert "to the paper" not in page
    assert ("small variants, which stand in for runs of full size" in page) == ("small" in settings)


def test_of_a_mixture_the_page_says_how_many_runs_are_small(tmp_path):
    mixed = [*runs(), *runs(seed=1, settings={"small": True})[:1]]
    write_report(written(tmp_path / "sweep", mixed), console := Console(record=True, width=200))
    assert "; 1 of 3 are small variants, which stand in for runs of full size." in console.export_text()


def test_published_cells_that_were_never_run_are_missing_of_the_papers_model_at_full_size(tmp_path):
    paper = Expected.read(expected(tmp_path))  # it has one number, and names of more arms and columns
    found = grid(runs_of(runs(seed=3, settings=MISTRAL)[:1], paper), paper)
    assert found == [("layerif", "countries", "3")]
    for settings in ({}, MISTRAL | {"small": True}, MISTRAL | {"allocator.beta": 3.0}):
        assert grid(runs_of(runs(settings=settings)[:1], paper), paper) == []


def test_an_experiment_without_published_numbers_says_so_and_names_its_arms(tmp_path):
    write_report(
        written(tmp_path / "sweep", runs()),
        console := Console(record=True, width=200),
        expected=expected(tmp_path, source="a first of its kind", values={}),
    )
    said = console.export_text()
    assert "No published numbers: a first of its kind." in said
    assert "The paper's" not in said
    assert "layerif" in said


def test_numbers_of_other_tasks_are_named_and_not_shown(tmp_path):
    file = expected(tmp_path, columns={"mrpc": {"task": "mrpc"}}, values={"layerif": {"mrpc": 0.8}})
    console = Console(record=True, width=200)
    write_report(written(tmp_path / "sweep", runs()), console, expected=file)
    said = console.export_text()
    assert "They are for mrpc; these runs are on capital, so none is shown here." in said
    assert "paper 0.8" not in (tmp_path / "sweep" / "report.html").read_text()
    assert "datainf experts" in said


def test_a_metric_that_was_not_measured_is_named(tmp_path):
    write_report(
        written(tmp_path / "sweep", runs()),
        console := Console(record=True, width=200),
        expected=expected(tmp_path, metric="f1"),
    )
    assert "These runs did not measure f1 (they measured accuracy)" in console.export_text()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("source",), None, "has no 'source'"),
        (("metric",), 3, "metric is 3; it must be a text"),
        (("of",), None, "has no 'of'; it needs source, metric, of, .*such as .*mistral_7b"),
        (
            ("of",),
            "mistral_7b",
            'of is "mistral_7b"; it must be an object of conditions.*such as',
        ),
        (
            ("of",),
            {"method": "lora_moe"},
            "of is .*lora_moe.*; it must be an object.* the model's, such as",
        ),
        (("of", "model"), "org/x", "of: model=org/x is not a choice of the group 'model'; available: .*mistral_7b"),
        (("of", "model"), 7, "of.model is 7; it must be the name of a choice"),
        (
            ("model",),
            "org/x",
            r'model \("org/x"\) is not a key of its own; name it in .of.,.* such as "of"',
        ),
        (("arms",), [], r"arms is \[\]; it must be an object"),
        (("arms", "layerif"), "datainf", 'arms.layerif is "datainf"; it must be an object'),
        (("arms", "layerif", "estimator"), "datainv", "arms.layerif: estimator=datainv is not a choice.*datainf"),
        (("values", "layerif", "countries"), 90.1, "values.layerif.countries is 90.1; it must be a fraction"),
        (("values", "layerif", "countries"), "high", "values.layerif.countries is .high.; it must be a finite number"),
        (("values", "layerif", "mrpc"), 0.5, "values.layerif.mrpc is 0.5; it must be of a column: countries, others"),
        (("values", "owl"), {}, "values.owl is {}; it must be of an arm: uniform, layerif"),
        (("metrics",), "accuracy", "metrics is not known.*metric"),
    ],
)
def test_a_malformed_file_is_refused_by_its_key(tmp_path, path, value, said):
    content = deepcopy(PAPER)
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    if value is None:
        del node[path[-1]]
    (tmp_path / "expected.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        Expected.read(tmp_path / "expected.json")


def test_the_command_says_what_is_wrong_and_fails(tmp_path, capsys):
    folder = written(tmp_path / "sweep", runs())
    (tmp_path / "expected.json").write_text("{")
    with pytest.raises(SystemExit, match="1"):
        main([str(folder), "--expected", str(tmp_path / "expected.json")])
    assert "expected.json cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "nothing")])
    assert "give the folder of a run or a sweep" in capsys.readouterr().err


def test_a_published_mean_over_runs_is_stated_and_held_against_no_single_one(tmp_path):
    file = expected(tmp_path, columns={"mean of two": {}}, values={"layerif": {"mean of two": 0.8}})
    console = Console(record=True, width=200)
    budgets = [one for budget in (80, 160) for one in runs(settings=MISTRAL | {"allocator.budget": budget})]
    write_report(written(tmp_path / "sweep", budgets), console, expected=file)
    said = console.export_text()
    assert "The paper gives only a mean for mean of two, so no run is held against it: layerif 0.800." in said
    assert "layerif allocator.budget=80" in said
    assert "to the paper" not in said
    paper = Expected.read(file)
    found = results(runs_of(budgets, paper), "accuracy", paper)
    assert found.arms == [f"{arm} allocator.budget={size}" for arm in ("uniform", "layerif") for size in (80, 160)]
    assert found.columns == ["capital"]
    assert {cell.paper for cell in found.cells.values()} == {None}
    assert found.count("missing") == 0


def test_an_arm_in_two_settings_has_the_papers_number_in_both_and_no_row_without_runs(tmp_path):
    paper = Expected.read(expected(tmp_path, values={"layerif": {"countries": 0.9, "others": 0.7}}))
    both = [one for r in (8, 16) for one in runs(settings=MISTRAL | {"method.r": r})]
    found = results(runs_of(both, paper), "accuracy", paper)
    names = [f"layerif method.r={r}" for r in (8, 16)]
    assert found.arms == [*(f"uniform method.r={r}" for r in (8, 16)), *names]
    for name in names:
        here, there = (found.cells[name, column] for column in ("countries", "others"))
        assert (here.paper, here.to_paper) == (0.9, pytest.approx(0.75 - 0.9))
        assert (there.mean, there.paper, there.to_paper, there.missing) == (None, 0.7, None, ("0",))
    untold = results(runs_of([with_before(one, [True]) for one in both], paper), "accuracy", paper)
    assert untold.cells[UNTOUCHED, "countries"].paper is None


def test_a_run_of_another_size_is_beside_the_papers_number_and_not_held_against_it(tmp_path):
    paper = Expected.read(expected(tmp_path, of={"model": "mistral_7b", "method": "lora_moe", "allocator.budget": 160}))
    sizes = [one for size in (32, 160) for one in runs(settings=MISTRAL | {"allocator.budget": size})]
    cells = results(runs_of(sizes, paper), "accuracy", paper).cells
    found = {size: cells[f"layerif allocator.budget={size}", "countries"].to_paper for size in (32, 160)}
    assert found == {32: None, 160: pytest.approx(0.75 - 0.9)}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["uniform", "layerif"]),
        (
            {
                "columns": {"mrpc": {"task": "mrpc"}},
                "values": {"layerif": {"mrpc": 0.8}},
            },  # these belong to other tasks
            ["uniform experts", "datainf experts"],
        ),
    ],
)
def test_the_file_for_spreadsheets_calls_every_run_as_the_page_does(tmp_path, changes, names):
    folder = written(tmp_path / "sweep", runs())
    write_report(folder, Console(quiet=True), expected=expected(tmp_path, **changes))
    assert pd.read_csv(folder / "report.csv")["run"].tolist() == names
    rows = [line.split(" | ")[0].removeprefix("| ") for line in (folder / "report.md").read_text().splitlines()]
    assert [row for row in rows if row.endswith(tuple(names))][:2] == names


def test_an_arm_that_ran_in_two_settings_is_two_rows_and_not_missing(tmp_path):
    paper = Expected.read(expected(tmp_path, columns={"countries": {"task": "capital"}}))
    both = [one for budget in (80, 160) for one in runs(settings={"allocator.budget": budget})]
    found = runs_of(both, paper)
    assert [run.arm for run in found] == [
        f"{a} allocator.budget={b}" for a in ("uniform", "layerif") for b in (80, 160)
    ]
    assert not grid(found, paper)


def test_what_a_column_decides_is_no_part_of_an_arms_name_but_its_size_is(tmp_path):
    paper = Expected.read(expected(tmp_path))

    def run(name: str, task: str, **settings: object):
        given = {f"allocator.{key}": value for key, value in settings.items()}
        return record(name, [True, False], task=task, settings=given)

    def arms(*jobs: Any) -> list[str]:
        return sorted({one.arm for one in runs_of(jobs, paper)})

    uniform = run("uniform", "capital", beta=2.0)
    assert arms(uniform, run("datainf", "capital", beta=2.5), run("datainf", "region", beta=3.0)) == [
        "layerif",
        "uniform",
    ]
    assert arms(*(run("datainf", "capital", beta=beta) for beta in (2.5, 3.0))) == [
        "layerif allocator.beta=2.5",
        "layerif allocator.beta=3.0",
    ]
    assert arms(run("datainf", "capital", budget=80), run("datainf", "region", budget=160)) == [
        "layerif allocator.budget=160",
        "layerif allocator.budget=80",
    ]
