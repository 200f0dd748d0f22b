"""The paper's tables as data: every sweep composes in full and small, says what it compares, and runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, reduce
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from layerif.allocate import Allocation
from layerif.allocate.curves import equal_curves
from layerif.app.main import main
from layerif.app.messages import first_of
from layerif.app.overrides import with_size
from layerif.app.schema import check, from_conf, register
from layerif.app.setup import check_unseen
from layerif.data.render import Example
from layerif.data.task import Splits
from layerif.files import conf_folder
from layerif.layers import LayerMap
from layerif.record.job import folder_name
from layerif.record.record import FILE, Failure, RunRecord
from layerif.report.arms import runs_of
from layerif.report.expected import Expected
from layerif.report.reading import read_jobs
from layerif.report.sections import summary
from layerif.scores import LayerScores
from tests.tiny import tiny_model, tiny_tokenizer

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TABLES = (
    "ablation_damping",
    "ablation_estimator",
    "ablation_samples",
    "ablation_smoothing",
    "expert_budget_80_160_224",
    "sparsity_curve_20_to_50",
    "table1_experts_gemma",
    "table1_experts_mistral",
    "table2_pruning_50",
    "table3_pruning_70_reversed",
    "task_specificity",
)
DEPTHS = {"google/gemma-7b": 28, "mistralai/Mistral-7B-v0.1": 32}  # the embedded model has 30 blocks
GROUPS = ("model", "task", "estimator", "allocator", "pruner", "method")


@pytest.fixture(autouse=True)
def hydra(monkeypatch) -> Iterator[None]:
    register()
    GlobalHydra.instance().clear()
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@cache  # composing takes longest
def jobs(experiment: str, *overrides: str) -> list[DictConfig]:
    """Jobs of the sweep's first seed, composed as Hydra would: the first, and those that differ from it along one axis.

    Every combination of expected columns is there, and every arm; of another axis only the last value.
    """
    given = with_size([f"experiment={experiment}", "outputs=/nowhere", "logger=none", *overrides])
    parameters = compose("config", given, return_hydra_config=True).hydra.sweeper.params
    axes = [f"{key}={value}" for key, value in parameters.items()]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(axes + given), None)
    columns = expected_of(experiment).get("columns", {}).values()
    free = {axis for conditions in columns for axis in conditions}

    def differing(job: Sequence[str]) -> set[str]:
        return {override.split("=")[0] for override, first in zip(job, batch[0], strict=True) if override != first}

    def is_kept(job: Sequence[str]) -> bool:
        changed = differing(job)
        if len(changed) != 1:
            return changed <= free
        (axis,) = changed
        (override,) = set(job) - set(batch[0])
        return axis != "seed" and (axis in free | {"arm"} or override in batch[-1])

    return [compose("config", list(job), return_hydra_config=True) for job in batch if is_kept(job)]


def expected_of(experiment: str, name: str = "expected.json") -> dict[str, Any]:
    file = EXPERIMENTS / experiment / name
    return json.loads(file.read_text()) if file.exists() else {}


def plain(job: DictConfig) -> dict[str, Any]:
    """The job's resolved configuration. Jobs that `jobs` keeps are resolved once."""
    HydraConfig.instance().set_config(job)
    if id(job) not in RESOLVED:
        values = {str(key): job[key] for key in job if key != "hydra"}
        resolved = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in values.items()
        }
        RESOLVED[id(job)] = job, resolved  # the job stays, so that no other gets its id
    return RESOLVED[id(job)][1]


RESOLVED: dict[int, tuple[DictConfig, dict[str, Any]]] = {}


def as_record(job: DictConfig) -> Failure:
    """The job as the report sees it."""
    choices = {group: choice for group, choice in job.hydra.runtime.choices.items() if not group.startswith("hydra/")}
    return Failure(name="", seed=0, config=plain(job), choices=choices, overrides=[], error="", traceback="")


@cache
def choice(group: str, name: str) -> tuple[Any, Any]:
    return identity(compose("config", [f"{group}={name}", "outputs=/nowhere", "logger=none"])[group])


def identity(section: Mapping[str, Any]) -> tuple[Any, Any]:
    return section.get("_target_"), section.get("name")


def meets(config: Mapping[str, Any], conditions: Mapping[str, Any]) -> bool:
    """Tells if a configuration meets the conditions of `expected.json`, written down a second time."""
    for key, wanted in conditions.items():
        if key in GROUPS:
            if identity(config[key] or {}) != choice(key, wanted):
                return False
        elif reduce(lambda node, name: (node or {}).get(name), key.split("."), config) != wanted:
            return False
    return True


@cache
def built(section: str) -> Any:
    """The object of a section of a configuration, given as JSON; many jobs share a section."""
    return instantiate(json.loads(section), _convert_="all")


def equal_scores(depth: int) -> tuple[LayerScores, LayerMap]:
    names = tuple(f"model.layers.{number}" for number in range(depth))
    scores = LayerScores(names, (1.0,) * depth, "undertrained", "equal", "none")
    return scores, LayerMap(names, tuple((f"{name}.weight",) for name in names), (1,) * depth)


# The full ablations and the curve share the arms of the tables, and run in `make test-all`.
SIZES = [
    pytest.param(
        name, small, marks=[pytest.mark.slow] * (small == "false" and name.startswith(("ablation", "sparsity")))
    )
    for name in TABLES
    for small in ("true", "false")
]


@pytest.mark.parametrize(("experiment", "small"), SIZES)
def test_every_job_binds_and_spends_its_budget_in_a_folder_of_its_own(experiment, small):
    found = jobs(experiment, f"small={small}")
    for job in found:
        config = OmegaConf.create(plain(job))
        check(config)
        is_embedded = config.model._target_.endswith("EmbeddedModel")
        assert is_embedded == (small == "true")
        sections = ("model", "task", "estimator", "allocator", "probe", "fit", "evaluation", "method")
        parts = {name: built(json.dumps(plain(job)[name])) for name in sections}
        scores, layers = equal_scores(30 if is_embedded else DEPTHS[config.model.name])
        allocation = spent(parts["allocator"], scores, layers)
        assert allocation.kind in (getattr(parts["method"], "allocates", None) or ["experts"])
        if config.allocator.get("budget"):
            assert allocation.budget == config.allocator.budget
        assert job.hydra.mode.name == "MULTIRUN"
        assert job.hydra.sweep.dir == f"/nowhere/sweeps/{experiment}" + ("_small" if is_embedded else "")
    assert str(found[0].hydra.sweeper.params.seed) in ("0,1,2", "0" if small == "true" else "0,1,2")
    names = {folder_name(job.hydra.overrides.task) for job in found}
    assert len(names) == len({str(plain(job)) for job in found}) == len(found) > 1
    assert not any("small" in name or "size" in name for name in names)


def spent(allocator: Any, scores: LayerScores, layers: LayerMap) -> Allocation:
    """Spends equal scores, or equal curves of the blocks."""
    if allocator.spends == "curves":
        return allocator(equal_curves(layers, "block", (0.0, 1.0)))
    return allocator(scores, layers)


@pytest.mark.parametrize("experiment", [name for name in TABLES if expected_of(name)])
def test_what_is_expected_names_every_job_once(experiment):
    expected = expected_of(experiment)
    assert list(expected) == ["source", "metric", "of", "arms", "columns", "values"]
    cells = []
    for job in (*jobs(experiment, "small=false"), *jobs(experiment, "small=true")):
        config = plain(job)
        found = [
            (arm, column)
            for arm, of_arm in expected["arms"].items()
            for column, of_column in expected["columns"].items()
            if meets(config, of_arm | of_column)
        ]
        assert len(found) == (job.hydra.runtime.choices["arm"] != "curves")  # which nobody has published
        assert meets(config, expected["of"]) == (not config["small"])
        assert Expected(**expected).is_of(as_record(job)) == (not config["small"])
        cells += found
    assert {arm for arm, _ in cells} == set(expected["arms"])
    assert {column for _, column in cells} == set(expected["columns"])
    assert set(expected["values"]) <= set(expected["arms"])
    for values in expected["values"].values():
        assert set(values) <= set(expected["columns"])
        assert all(0.3 < value < 1 for value in values.values())


def test_both_models_of_table_2_are_expected_in_the_same_cells():
    mistral, gemma = expected_of("table2_pruning_50"), expected_of("table2_pruning_50", "expected_gemma.json")
    assert (mistral["arms"], mistral["columns"]) == (gemma["arms"], gemma["columns"])
    assert {name: set(row) for name, row in mistral["values"].items()} == {
        name: set(row) for name, row in gemma["values"].items()
    }
    assert gemma["of"] == mistral["of"] | {"model": "gemma_7b"}


# What is printed beside or about the published rows, in percent.
AVERAGES = {
    "table1_experts_mistral": {
        "alphalora": 80.51,
        "mola_2468": 74.77,
        "mola_5555": 80.45,
        "mola_8642": 80.97,
        "layerif_positive": 81.76,
        "layerif_top25": 82.27,
        "layerif_all": 81.85,
    },
    # Those printed, 86.55, 87.47 and 87.81, are not of these rows; these are.
    "table1_experts_gemma": {"alphalora": 86.95, "mola_3578": 87.27, "layerif_positive": 87.41},
    "expert_budget_80_160_224": {"alphalora": 79.3, "mola": 78.97, "layerif": 82.28},
}
PRUNED = {  # by magnitude, Wanda and SparseGPT; no average is printed, so that these are the numbers once more
    ("table2_pruning_50", "expected.json"): {
        "uniform": (56.41, 58.71, 60.45),
        "alphapruning": (56.74, 58.48, 60.07),
        "owl": (56.16, 58.75, 59.99),
        "layerif": (56.89, 58.94, 60.61),
    },
    ("table2_pruning_50", "expected_gemma.json"): {
        "uniform": (32.21, 51.19, 49.92),
        "alphapruning": (34.21, 50.76, 51.39),
        "owl": (33.27, 47.15, 47.48),
        "layerif": (32.94, 53.01, 50.9),
    },
    ("table3_pruning_70_reversed", "expected.json"): {
        "layerif": (33.44, 32.5, 41.14),
        "layerif_reversed": (33.1, 32.02, 38.45),
    },
}
QUESTIONS = {"mrpc": 1725, "cola": 1043, "scienceqa": 2224, "commonsense_qa": 1221, "openbookqa": 500}


@pytest.mark.parametrize("experiment", AVERAGES)
def test_the_published_rows_have_the_printed_averages(experiment):
    values = expected_of(experiment)["values"]
    means = {arm: 100 * sum(row.values()) / len(row) for arm, row in values.items()}
    assert means == pytest.approx(AVERAGES[experiment], abs=0.00501)  # printed to two decimals
    if experiment.startswith("table1"):
        assert all(set(row) == set(QUESTIONS) for row in values.values())


def test_of_gemma_the_readme_names_both_averages():
    text = (EXPERIMENTS / "table1_experts_gemma" / "README.md").read_text()
    own = AVERAGES["table1_experts_gemma"].values()
    assert all(f"{mean:.2f}" in text for mean in own)
    assert "86.55, 87.47, 87.81" in text


@pytest.mark.parametrize(("experiment", "file"), PRUNED)
def test_the_published_accuracies_of_pruned_models(experiment, file):
    values = expected_of(experiment, file)["values"]
    found = {arm: tuple(100 * row[name] for name in ("magnitude", "wanda", "sparsegpt")) for arm, row in values.items()}
    assert found.keys() == PRUNED[experiment, file].keys()
    for arm, row in PRUNED[experiment, file].items():
        assert found[arm] == pytest.approx(row, abs=1e-9)


def test_every_published_number_is_checked_here():
    files = {(file.parent.name, file.name) for file in EXPERIMENTS.glob("*/expected*.json")}
    with_numbers = {(name, file) for name, file in files if expected_of(name, file)["values"]}
    assert with_numbers == {*PRUNED, *((name, "expected.json") for name in AVERAGES)}


def test_the_readme_says_how_far_sampling_alone_moves_the_published_accuracies():
    rows = expected_of("table1_experts_mistral")["values"].values()
    errors = [100 * sqrt(p * (1 - p) / QUESTIONS[task]) for row in rows for task, p in row.items()]
    text = (EXPERIMENTS / "table1_experts_mistral" / "README.md").read_text()
    assert f"by {min(errors):.2f} to {max(errors):.2f} points (one standard error)" in text


@pytest.mark.parametrize(("arm", "rounding"), [("layerif_all", "upstream"), ("mola_2468", None)])  # a shape has none
def test_the_released_recipe_is_an_addition(arm, rounding):
    names = ("table1_experts_mistral", "[table1_experts_mistral,upstream]")
    (ours,), (theirs,) = (jobs(name, "task=mrpc", f"arm={arm}") for name in names)
    mine, other = plain(ours), plain(theirs)
    assert (mine["method"]["warmup_steps"], other["method"]["warmup_steps"]) == (None, 100)
    assert (mine["data"]["drop_partial"], other["data"]["drop_partial"]) == (False, True)
    assert other["allocator"].get("rounding") == rounding
    assert mine["allocator"].get("rounding") == (rounding and "largest_remainder")
    assert other["evaluation"]["metrics"] == ["generation"]
    assert other["model"] == mine["model"]
    paper = Expected(**expected_of("table1_experts_mistral"))
    for job in (ours, theirs):
        assert paper.is_of(as_record(job))
        assert paper.value(as_record(job)) == paper.values[arm]["mrpc"]
    assert other["estimator"] == mine["estimator"]
    assert (mine["recipe"]["name"], other["recipe"]["name"]) == (None, "upstream")


FINE_TUNED = ("table1_experts_mistral", "table1_experts_gemma", "expert_budget_80_160_224", "task_specificity")


@pytest.mark.parametrize("experiment", TABLES)
def test_the_released_recipe_has_a_folder_of_its_own_or_is_refused_in_words(experiment):
    composed = compose("config", [f"experiment=[{experiment},upstream]", "outputs=/nowhere", "logger=none"], True)
    config = OmegaConf.create(plain(composed))
    if experiment in FINE_TUNED:
        check(config)
        assert composed.hydra.sweep.dir == f"/nowhere/sweeps/{experiment}_upstream"
    else:
        with pytest.raises(ValueError, match=r"the recipe upstream is a way to fine-tune, and method=.* does not"):
            check(config)


@pytest.mark.parametrize(("experiment", "beta"), [("table1_experts_mistral", 2.5), ("table1_experts_gemma", 3.0)])
@pytest.mark.parametrize("model", ["gemma_7b", "local model.path=/models/gemma-7b"])
def test_the_exponent_is_the_experiments_whatever_the_model_is_called(experiment, beta, model):
    given = ["task=mrpc", "outputs=/nowhere", "logger=none", *f"model={model}".split()]
    for name, arm in ((experiment, "layerif_positive"), (f"[{experiment},upstream]", "alphalora")):
        assert compose("config", [f"experiment={name}", f"arm={arm}", *given]).allocator.beta == beta


@pytest.mark.parametrize("file", [EXPERIMENTS / name / "README.md" for name in TABLES])
def test_every_sweep_of_a_readme_has_its_report_beside_it(file):
    blocks = re.findall(r"```\n(.*?)```", file.read_text(), flags=re.DOTALL)
    blocks = [block for block in blocks if "layerif-report outputs/sweeps/" in block]
    assert blocks
    for block in blocks:
        commands = [shlex.split(line, comments=True) for line in block.splitlines()]
        swept = [with_size(map(first_of, words[2:])) for words in commands if words[:2] == ["layerif", "-m"]]
        composed = [compose("config", given, True).hydra for given in swept]
        experiments = {hydra.sweep.dir: EXPERIMENTS / hydra.runtime.choices.experiment for hydra in composed}
        reports = {words[1]: words[2:] for words in commands if words[0] == "layerif-report"}
        assert reports.keys() == experiments.keys()
        for folder, rest in reports.items():
            published = [EXPERIMENTS.parent / word for word in rest if word != "--expected"]
            assert all(file.exists() and file.parent == experiments[folder] for file in published)
            assert bool(published) == (experiments[folder] / "expected.json").exists()


def test_an_arm_is_over_an_experiment_and_the_command_line_over_both():
    (job,) = jobs("table2_pruning_50", "small=true", "pruner=magnitude", "arm=owl")
    assert (job.allocator.rule, job.allocator.epsilon) == ("shifted", 0.08)
    for pruner, epsilon in (("magnitude", 0.3), ("wanda", 0.1)):  # the paper's
        (job,) = jobs("table2_pruning_50", "model=mistral_7b", f"pruner={pruner}", "arm=layerif_all")
        assert job.allocator.epsilon == epsilon
    (job,) = jobs("table1_experts_mistral", "task=mrpc", "arm=layerif_top25", "estimator=exact")
    assert job.estimator._target_.endswith("Exact")


@pytest.mark.parametrize(
    ("arm", "estimator", "allocator"),
    [
        ("dlp", "dlp", "sparsity"),
        ("lsa", "lsa", "sparsity"),
        ("mdl", "quadratic", "water_filling"),
        ("straight_line", "datainf", "depth"),
        ("first_block_spared", "datainf", "depth"),
    ],
)
def test_an_arm_brings_its_allocator_and_keeps_the_target_of_the_sweep(arm, estimator, allocator):
    given = ["experiment=sparsity_smollm2", f"arm={arm}", "allocator.target=0.6", "outputs=/nowhere", "logger=none"]
    job = compose("config", given, return_hydra_config=True)
    assert (job.hydra.runtime.choices.estimator, job.hydra.runtime.choices.allocator) == (estimator, allocator)
    layers = LayerMap(tuple(f"b.{l}" for l in range(8)), tuple((f"b.{l}.q",) for l in range(8)), (12,) * 8)
    scores = LayerScores(layers.names, tuple(0.1 * l for l in range(8)), "important", "test", "")
    allocation = instantiate(job.allocator)(scores, layers)
    assert (allocation.kind, allocation.budget) == ("sparsity", 0.6)
    if arm == "first_block_spared":
        assert allocation.values == pytest.approx((0.2, *[4.6 / 7] * 7))


def test_the_adapter_of_another_arm_is_the_one_of_the_same_sweep():
    trained, *_, tracin = jobs("ablation_estimator", "small=true")
    (checkpoint,) = plain(tracin)["estimator"]["checkpoints"]
    plain(trained)
    assert checkpoint == f"{trained.hydra.sweep.dir}/{trained.hydra.sweep.subdir}/adapter"


# What of each sweep is run here: its kinds of job, two steps each.
RUNS = {
    "ablation_damping": ["estimator.damping=0.1,10"],
    "ablation_estimator": ["arm=checkpoint,lissa,tracin"],
    "ablation_samples": ["arm=samples_30x5"],
    "ablation_smoothing": ["allocator.smoothing=false"],
    "expert_budget_80_160_224": ["arm=mola_rising", "allocator.budget=210"],
    "sparsity_curve_20_to_50": ["arm=uniform", "allocator.target=0.2"],
    "table1_experts_gemma": ["arm=alphalora"],
    "table1_experts_mistral": ["arm=mola_5555,layerif_all"],
    "table2_pruning_50": ["arm=owl", "pruner=sparsegpt"],
    "table3_pruning_70_reversed": ["arm=reversed", "pruner=magnitude"],
    "task_specificity": ["arm=scores_of_capital", "task=region"],
}
PRUNING = ["method.calibration.num_windows=2", "method.calibration.window=32", "evaluation.window=32"]


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory) -> Path:
    """A model as deep as the embedded one, so that budgets and shapes are those of the small variants."""
    folder = tmp_path_factory.mktemp("deep") / "Mistral-7B-v0.1"  # only small, and not another model than the paper's
    tiny_model("llama", num_hidden_layers=30, attn_implementation="sdpa").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


QUICK = ("task_specificity",)  # the others run in `make test-all`


@pytest.mark.parametrize(
    "experiment", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TABLES]
)
def test_every_question_runs_small_as_a_sweep(experiment, deep_model, tmp_path, monkeypatch):
    GlobalHydra.instance().clear()
    overrides = [f"experiment={experiment}", "small=true", "seed=0", *RUNS[experiment], f"outputs={tmp_path}"]
    overrides += ["model=local", f"model.path={deep_model}", "logger=none", "trainer.accelerator=cpu"]
    overrides += [f"task.num_{part}=8" for part in ("train", "validation", "test")] + ["data.batch_size=4"]
    overrides += ["trainer.max_steps=2", "trainer.enable_progress_bar=false", "evaluation.num_windows=2"]
    overrides += PRUNING if "prun" in experiment or "spars" in experiment or "smoothing" in experiment else []
    overrides += [f"hydra/{name}_logging=disabled" for name in ("hydra", "job")]
    monkeypatch.setattr(sys, "argv", ["layerif", *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # what `main` sets ends with this test
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    main()
    folders = sorted(file.parent for file in (tmp_path / "sweeps" / f"{experiment}_small").glob(f"*/{FILE}"))
    records = [RunRecord.read(folder) for folder in folders]
    arms = RUNS[experiment][0].partition("=")[2].split(",")
    assert len(records) == len(arms)
    for record in records:
        assert record.decision is not None
        assert len(record.decision.allocation.values) == 30
        assert record.metrics or record.choices["method"] == "none"
        assert record.config["small"] is True
        assert ("score_task" in record.config) == ("score_task" in record.inputs) == (experiment == "task_specificity")
    if experiment == "table1_experts_mistral":
        changes: dict[str, Any] = {"of": {"model": "mistral_7b", "method": "lora_moe"}, "metric": "accuracy"}
        paper = Expected(**expected_of(experiment) | changes)
        for record in records:
            assert not paper.is_of(record)
            assert paper.is_of(replace(record, config={**record.config, "small": False}))
        found = read_jobs(folders[0].parent)
        said = summary(found, runs_of(found.jobs, paper), paper)
        assert "; small variants, which stand in for runs of full size." in said[0]
        assert said[-1].startswith("Differences from them are shown only for such runs at full size")
    if experiment == "task_specificity":
        assert records[0].config["score_task"]["name"] == "capital"
        assert records[0].decision.samples["train"] > 8  # of all capitals, where eight regions are learned from


def test_scores_of_another_task_may_not_see_what_is_evaluated():
    def rows(*texts: str) -> tuple[Example, ...]:
        return tuple(Example(text, f"What is {text}?", ("a", "b"), ("a", "b"), 0) for text in texts)

    splits = Splits(train=rows("one"), validation=rows("two"), test=rows("three"))
    check_unseen(Splits(train=rows("four"), validation=rows("one", "two"), test=rows("three")), splits)
    with pytest.raises(ValueError, match="1 train or validation rows of score_task ask the same as test rows"):
        check_unseen(Splits(train=rows("five"), validation=rows("  THREE"), test=rows("six")), splits)


def test_scores_may_not_see_an_evaluated_question_with_its_options_in_another_order(tmp_path):
    def task(folder: str, options: list[str], question: str = "Which?") -> Splits:
        (tmp_path / folder).mkdir()
        for part, asked in (("train", question), ("validation", "Else?"), ("test", "Which?" if folder == "a" else "?")):
            row = {"question": asked, "options": options, "answer": 0}
            (tmp_path / folder / f"{part}.jsonl").write_text(json.dumps(row) + "\n")
        GlobalHydra.instance().clear()
        return from_conf("task=jsonl", f"task.path={tmp_path / folder}").load()

    splits = task("a", ["red", "green"], question="Other?")
    check_unseen(task("b", ["green", "blue"]), splits)
    with pytest.raises(ValueError, match="1 train or validation rows"):
        check_unseen(task("c", ["green", "red"]), splits)


@pytest.mark.parametrize(
    ("yaml", "messages"),
    [
        (
            "defaults:\n  - override /task: capitol\n",
            [
                "experiment=wrong names",
                "task=capitol is not a choice of the group 'task' (did you mean 'capital'?)",
                "mrpc",
            ],
        ),
        (
            "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      arm: uniform,layerif_al\n",
            [
                "experiment=wrong names",
                "arm=layerif_al is not a choice of the group 'arm' (did you mean 'layerif_all'?)",
            ],
        ),
        (
            "defaults:\n  - override /tsk: capital\n",
            ["'experiment/wrong'", "'tsk' is not a group (did you mean 'task'?)"],
        ),
        ("defaults:\n  - paperr\n", ["experiment=wrong names", "paperr", "did you mean 'paper'?"]),
    ],
)
def test_an_experiment_that_names_what_there_is_not_is_named(yaml, messages, tmp_path, monkeypatch, capsys):
    GlobalHydra.instance().clear()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "wrong.yaml").write_text(f"# @package _global_\n{yaml}")
    command = ["layerif", "experiment=wrong", f"hydra.searchpath=[file://{tmp_path}]", f"outputs={tmp_path}"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    for message in messages:
        assert message in said
    assert "Traceback" not in said
