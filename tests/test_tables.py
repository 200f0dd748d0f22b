"""The paper's tables as data: every sweep composes in full and small, says what it compares, and runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
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

from layerif.config import check, conf_folder, register
from layerif.layers import LayerMap
from layerif.scores import LayerScores

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


def jobs(experiment: str, *overrides: str, vary: Sequence[str] = ()) -> list[DictConfig]:
    """Jobs of the sweep, composed as Hydra would: the first, and those that differ from it along one axis.

    vary: axes of which every combination is wanted.
    """
    given = [f"experiment={experiment}", "outputs=/nowhere", "logger=none", *overrides]
    parameters = compose("config", given, return_hydra_config=True).hydra.sweeper.params
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in parameters.items()] + given)
    (batch,) = BasicSweeper.split_arguments(parsed, None)

    def differing(job: Sequence[str]) -> list[str]:
        return [override.split("=")[0] for override, first in zip(job, batch[0], strict=True) if override != first]

    kept = [job for job in batch if len(differing(job)) <= 1 or set(differing(job)) <= set(vary)]
    return [compose("config", list(job), return_hydra_config=True) for job in kept]


def plain(job: DictConfig) -> dict[str, Any]:
    """The job's resolved configuration."""
    HydraConfig.instance().set_config(job)
    return {
        str(key): OmegaConf.to_container(job[key], resolve=True) if OmegaConf.is_config(job[key]) else job[key]
        for key in job
        if key != "hydra"
    }


@cache
def choice(group: str, name: str) -> tuple[Any, Any]:
    return identity(compose("config", [f"{group}={name}", "outputs=/nowhere", "logger=none"])[group])


def identity(section: Mapping[str, Any]) -> tuple[Any, Any]:
    return section.get("_target_"), section.get("name")


def meets(config: Mapping[str, Any], conditions: Mapping[str, Any]) -> bool:
    """What `expected.json` means by an arm or a column."""
    for key, wanted in conditions.items():
        if key in GROUPS:
            if identity(config[key] or {}) != choice(key, wanted):
                return False
        elif OmegaConf.select(OmegaConf.create(config), key) != wanted:
            return False
    return True


def equal_scores(depth: int) -> tuple[LayerScores, LayerMap]:
    names = tuple(f"model.layers.{number}" for number in range(depth))
    scores = LayerScores(names, (1.0,) * depth, "undertrained", "equal", "none")
    return scores, LayerMap(names, tuple((f"{name}.weight",) for name in names), (1,) * depth)


@pytest.mark.parametrize("experiment", TABLES)
def test_every_job_composes_binds_and_spends_its_budget(experiment):
    for small in ("true", "false"):
        found = jobs(experiment, f"small={small}", "seed=0")
        assert len({str(plain(job)) for job in found}) == len(found) > 1
        for job in found:
            config = OmegaConf.create(plain(job))
            check(config)
            is_embedded = config.model._target_.endswith("Embedded")
            assert is_embedded == (small == "true")
            for part in ("model", "task", "estimator", "allocator", "probe", "fit"):
                instantiate(config[part])
            instantiate(config.evaluation, _convert_="all")
            method = instantiate(OmegaConf.to_container(config.method)) if config.method else None
            scores, layers = equal_scores(30 if is_embedded else DEPTHS[config.model.name])
            allocation = instantiate(config.allocator)(scores, layers)
            assert allocation.kind == getattr(method, "allocates", "experts")
            if config.allocator.get("budget"):
                assert allocation.budget == config.allocator.budget
        assert {job.hydra.mode.name for job in found} == {"MULTIRUN"}


@pytest.mark.parametrize("experiment", [name for name in TABLES if (EXPERIMENTS / name / "expected.json").exists()])
def test_what_is_expected_names_every_job_of_the_full_sweep_once(experiment):
    expected = json.loads((EXPERIMENTS / experiment / "expected.json").read_text())
    assert list(expected) == ["source", "metric", "model", "arms", "columns", "values"]
    cells = []
    axes = {key for conditions in expected["columns"].values() for key in conditions}
    for job in jobs(experiment, "seed=0", vary=sorted(axes)):
        config = plain(job)
        found = [
            (arm, column)
            for arm, of_arm in expected["arms"].items()
            for column, of_column in expected["columns"].items()
            if meets(config, of_arm | of_column)
        ]
        assert len(found) == 1
        assert config["model"]["name"] in expected["model"]
        cells += found
    assert {arm for arm, _ in cells} == set(expected["arms"])
    assert {column for _, column in cells} == set(expected["columns"])
    assert set(expected["values"]) <= set(expected["arms"])
    for values in expected["values"].values():
        assert set(values) <= set(expected["columns"])
        assert all(0.3 < value < 1 for value in values.values())


def test_the_published_numbers_are_fractions_of_the_five_tasks():
    expected = json.loads((EXPERIMENTS / "table1_experts_mistral" / "expected.json").read_text())
    means = {arm: sum(values.values()) / len(values) for arm, values in expected["values"].items()}
    # the averages that the paper prints beside these rows
    assert means["layerif_top25"] == pytest.approx(0.8227, abs=1e-4)
    assert means["alphalora"] == pytest.approx(0.8051, abs=1e-4)


@pytest.mark.parametrize("experiment", TABLES)
def test_seeds_are_an_axis_and_folders_are_told_apart(experiment):
    for small, name in (("true", f"{experiment}_small"), ("false", experiment)):
        seeds = str(jobs(experiment, f"small={small}")[0].hydra.sweeper.params.seed)
        assert seeds == "0,1,2" or (small == "true" and seeds == "0")
        first = jobs(experiment, f"small={small}", "seed=0")
        assert {job.hydra.sweep.dir for job in first} == {f"/nowhere/sweeps/{name}"}
        assert len({job.hydra.job.override_dirname for job in first}) == len(first)
        assert not any("small" in job.hydra.job.override_dirname for job in first)


def test_the_released_recipe_is_an_addition():
    ours, theirs = jobs("table1_experts_mistral", "seed=0"), jobs("[table1_experts_mistral,upstream]", "seed=0")
    for job, changed in zip(ours, theirs, strict=True):
        mine, other = plain(job), plain(changed)
        assert (mine["method"]["warmup_steps"], other["method"]["warmup_steps"]) == (None, 100)
        assert (mine["data"]["drop_partial"], other["data"]["drop_partial"]) == (False, True)
        rounding = other["allocator"].get("rounding", "upstream")  # a shape is not rounded
        assert (rounding, mine["allocator"].get("rounding", "largest_remainder")) == ("upstream", "largest_remainder")
        assert other["evaluation"]["metrics"] == ["generation"]
        assert other["model"] == mine["model"]
        assert other["estimator"] == mine["estimator"]


def test_an_arm_is_over_an_experiment_and_the_command_line_over_both():
    (job,) = jobs("table2_pruning_50", "small=true", "seed=0", "pruner=magnitude", "arm=owl")
    assert (job.allocator.rule, job.allocator.epsilon) == ("shifted", 0.08)
    for pruner, epsilon in (("magnitude", 0.3), ("wanda", 0.1)):  # the paper's
        (job,) = jobs("table2_pruning_50", "model=mistral_7b", "seed=0", f"pruner={pruner}", "arm=layerif_all")
        assert job.allocator.epsilon == epsilon
    (job,) = jobs("table1_experts_mistral", "task=mrpc", "seed=0", "arm=layerif_top25", "estimator=exact")
    assert job.estimator._target_.endswith("Exact")


def test_the_adapter_of_another_arm_is_the_one_of_the_same_sweep():
    trained, *_, tracin = jobs("ablation_estimator", "small=true", "seed=0")
    (checkpoint,) = plain(tracin)["estimator"]["checkpoints"]
    plain(trained)
    assert checkpoint == f"{trained.hydra.sweep.dir}/{trained.hydra.sweep.subdir}/adapter"
