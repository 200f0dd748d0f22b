"""Laws of targets: an object is judged by where it is defined, others only by name, and nothing is imported before."""

from __future__ import annotations

import json
import logging
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from layerif import targets
from layerif.files import conf_folder
from layerif.layers import LayerMap
from layerif.targets import allowed_target, build, check_targets, hydra_patterns, nodes_with_target, registered_modules

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    {
        node["_target_"]
        for file in conf_folder().rglob("*.yaml")
        for _, node in nodes_with_target(yaml.safe_load(file.read_text()))
    }
)
PLUGINS = [
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
]
OTHERS = [
    "lightning.pytorch.strategies.FSDPStrategy",
    "lightning.pytorch.plugins.environments.SLURMEnvironment",
    "logging.StreamHandler",
    "logging.handlers.RotatingFileHandler",
    "logging.Formatter",
    "optuna.samplers.TPESampler",
    "optuna.pruners.MedianPruner",
]
FOREIGN = [
    "builtins.dict",
    "joblib.load",
    "os.system",
    "pandas.read_pickle",
    "torch.load",
    "torch.utils.collect_env.run",
    # Paths that begin in an allowed package, and lead out of it or to what is not a class of the right kind.
    "hydra._internal.utils._locate",
    "hydra.core.utils.JobReturn",
    "hydra.utils.call",
    "hydra.utils.get_class",
    "hydra.utils.get_method",
    "hydra.utils.get_object",
    "hydra.utils.instantiate",
    "layerif",
    "layerif.adapt.module.AdapterModule.load_from_checkpoint",
    "layerif.adapt.module.Tensor",
    "layerif.app.main.main",
    "layerif.app.sweep.log",
    "layerif.app.sweep.subprocess.run",
    "layerif.files.claim_folder",
    "layerif.files.os.getcwd",
    "layerif.layers.LayerMap.__class__",
    "layerif.layers.LayerMap.__init__",
    "layerif.layers.LayerMap.__init__.__globals__",
    "layerif.targets.build",
    "lightning.pytorch.cli.LightningCLI",
    "logging.config.dictConfig",
    "logging.os.system",
    "logging.Logger",
]


@pytest.mark.parametrize("target", [*SHIPPED, *PLUGINS, *OTHERS])
def test_what_the_configuration_needs_is_allowed(target):
    if target.startswith(("hydra_plugins", "optuna")):
        pytest.importorskip(target.rpartition(".")[0])
    assert isinstance(allowed_target(target, "a._target_"), type)


@pytest.mark.parametrize("target", FOREIGN)
def test_anything_else_is_refused_by_the_object_and_not_by_its_path(target):
    with pytest.raises(ValueError, match=rf"^a\._target_='{re.escape(target)}' is not allowed.*trusted_targets=\["):
        allowed_target(target, "a._target_")


def test_a_launcher_that_runs_its_settings_as_commands_is_left_out():
    aws = "hydra_plugins.hydra_ray_launcher.ray_aws_launcher"
    pytest.importorskip(aws)
    with pytest.raises(ValueError, match=rf"it leads to {re.escape(aws)}\.RayAWSLauncher"):
        allowed_target(f"{aws}.RayAWSLauncher", "hydra.launcher._target_")


@pytest.mark.parametrize("target", [None, 5, "", "...", "layerif.nosuch", "layerif.layers.Layermap", ["os.system"], {}])
def test_what_names_nothing_is_refused_in_one_sentence(target):
    with pytest.raises(ValueError, match=r"^a\._target_="):
        allowed_target(target, "a._target_")


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Iterator[Path]:
    """A module of others whose import leaves a mark."""
    mark = tmp_path / "mark"
    lines = (
        "import pathlib",
        f"pathlib.Path({str(mark)!r}).touch()",
        "class Thing: pass",
        "def act(**given): return given",
    )
    (tmp_path / "stranger.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("stranger", None)


def test_a_refused_module_is_not_imported(stranger):
    for target in ("stranger.act", "stranger", "layerif.stranger.act"):
        with pytest.raises(ValueError, match="a="):
            allowed_target(target, "a")
    assert not stranger.exists()


@pytest.mark.parametrize("trusted", ["stranger", "stranger.act"])
def test_trusted_code_is_allowed_and_no_other(stranger, trusted):
    assert allowed_target("stranger.act", "a", [trusted])(x=1) == {"x": 1}
    with pytest.raises(ValueError, match=r"a='os\.system' is not allowed"):
        allowed_target("os.system", "a", [trusted])
    if trusted == "stranger.act":
        with pytest.raises(ValueError, match=r"it leads to stranger\.Thing"):
            allowed_target("stranger.Thing", "a", [trusted])
    with pytest.raises(ValueError, match="it leads to the module pathlib"):
        allowed_target("stranger.pathlib.Path", "a", [trusted])


def test_trust_holds_for_the_object_by_whatever_name_it_is_imported():
    for target in ("json.JSONDecoder", "json.decoder.JSONDecoder"):
        assert allowed_target(target, "a", ["json.JSONDecoder"]) is json.JSONDecoder
    method = "datetime.datetime.fromisoformat"
    assert allowed_target(method, "a", [method])("2026-01-01").year == 2026


def test_an_installed_package_that_registers_itself_is_allowed(stranger, monkeypatch):
    points = [EntryPoint("mine", "stranger", targets.ENTRY_POINTS)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points * (group == targets.ENTRY_POINTS))
    registered_modules.cache_clear()
    try:
        assert allowed_target("stranger.act", "a")(x=1) == {"x": 1}
        assert targets.is_known_package("stranger.conf")
    finally:
        registered_modules.cache_clear()
    assert not targets.is_known_package("strangers")


def test_targets_are_checked_at_any_depth():
    evil = {"_target_": "os.system"}
    for node in ({"of": evil}, {"all": [[1, evil]]}, {"_target_": "layerif.layers.LayerMap", "_args_": [evil]}):
        with pytest.raises(ValueError, match=r"^a\.\S+\._target_='os\.system' is not allowed"):
            check_targets(node, "a")
        with pytest.raises(ValueError, match="is not allowed"):
            build(node, "a")


def test_objects_are_built_from_plain_settings_inner_ones_first():
    layers = {"_target_": "layerif.layers.LayerMap", "names": ["a"], "params": [["a.q"]], "numel": [2]}
    made = build({"_convert_": "all", "all": [layers], "one": 1}, "x")
    lists: Any = ["a"], [["a.q"]], [2]
    assert made["all"] == [LayerMap(*lists)]
    later = build({"_target_": "layerif.layers.LayerMap", "_partial_": True, "names": ["a"]}, "x")
    assert later(params=[["a.q"]], numel=[2]) == made["all"][0]
    assert build(layers, "x", numel=[3]).numel == [3]
    assert build(None, "x") is None


def test_a_text_stays_a_text_whatever_it_looks_like():
    text = "${oc.create:{_target_:os.getcwd}}"
    made = build({"_target_": "logging.Formatter", "fmt": "%(message)s", "datefmt": text}, "x")
    assert isinstance(made, logging.Formatter)
    assert made.datefmt == text


@pytest.mark.parametrize("keyword", ["_args_", "_recursive_"])
def test_keywords_that_go_round_the_check_are_refused(keyword):
    with pytest.raises(ValueError, match=rf"x\.{keyword} is not allowed; allowed: settings by their names"):
        build({"_target_": "layerif.layers.LayerMap", keyword: []}, "x")


KNOWN_BAD = {
    "filelock": ["3.20.2"],
    "hydra-core": ["1.3.5", "1.3.6"],
    "jinja2": ["3.1.5"],
    "lightning": ["2.6.1", "2.6.2", "2.6.3", "2.6.5"],
    "torch": ["2.9.1"],
    "tqdm": ["4.66.2"],
}


def test_no_version_with_a_known_hole_satisfies_the_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["lab"]]
    needed = {found.name: found.specifier for found in map(Requirement, lines)}
    pinned = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for name, versions in KNOWN_BAD.items():
        assert not [version for version in versions if version in needed[name]]
        assert pinned[name] in needed[name]


def test_the_rule_in_hydras_patterns_allows_what_ships_and_what_is_trusted_and_nothing_of_others():
    patterns = hydra_patterns(["mine.kind"])

    def matches(name: str) -> bool:
        return any(name == each or (each.endswith(".*") and name.startswith(each[:-1])) for each in patterns)

    for target in (*SHIPPED, *PLUGINS, "logging.StreamHandler"):
        found = allowed_target(target, "x._target_")
        assert matches(f"{found.__module__}.{found.__qualname__}"), target
    assert matches("mine.kind")
    assert matches("mine.kind.method")
    for name in ("os.system", "subprocess.run", "torch.utils.collect_env.run", "mine.kinder", "lightning.fabric.x"):
        assert not matches(name)
    assert all("*" not in each.removesuffix(".*") and each != ".*" for each in patterns)
