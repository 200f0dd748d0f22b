"""No door of Hydra's leads to code of others: what a YAML names or commands is refused before Hydra acts on it."""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import version
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from layerif.app.composition import Composer, from_command_line
from layerif.app.schema import check, from_conf, register
from layerif.files import check_yaml
from layerif.record.job import choices_of_run
from tests.command import layerif_here


@pytest.fixture(autouse=True)
def stranger(tmp_path, monkeypatch) -> Iterator[Path]:
    """A package of others whose import leaves a mark."""
    mark, package = tmp_path / "mark", tmp_path / "path" / "stranger"
    (package / "conf").mkdir(parents=True)
    touch = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (package / "__init__.py").write_text(f"{touch}def act(*args, **given):\n    return given\n")
    (package / "conf" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(logging.root, "handlers", [])  # another test's may write to a stream that is closed
    yield mark
    for name in ("stranger", "stranger.conf"):
        sys.modules.pop(name, None)


@pytest.fixture
def compose(tmp_path):
    """Composes a YAML of others as `layerif --config-path=…` does, in a few milliseconds."""
    register()
    version.setbase("1.3")
    setup_globals()

    def composed(text: str, *overrides: str, mode: RunMode = RunMode.RUN) -> DictConfig:
        folder = tmp_path / "others"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(text)
        composer = Composer(create_config_search_path(str(folder)), from_command_line(overrides))
        return composer.load_configuration("config", list(overrides), mode)

    yield composed
    GlobalHydra.instance().clear()


ACT = "{_target_: stranger.act}"
CALLBACKS, LOGGING = "hydra: {callbacks: {x: %s}}", "hydra: {job_logging: {handlers: {console: {%s}}}}"
SLURM = "defaults: [{override hydra/launcher: submitit_slurm}]\nhydra: {launcher: {%s}}"
RAY = "defaults: [{override hydra/launcher: ray}]\nhydra: {launcher: {ray: {%s}}}"
OPTUNA = "defaults: [{override hydra/sweeper: optuna}]\nhydra: {sweeper: {%s}}"
# The setting that the message names, and a YAML that opens this door.
DOORS = [
    ("hydra.callbacks.x._target_", CALLBACKS % ACT),
    ("hydra.callbacks.x.of.0._target_", CALLBACKS % f"{{_target_: layerif.app.sweep.Sweep, of: [{ACT}]}}"),
    ("hydra.callbacks.x._target_", f"z: {ACT}\n" + CALLBACKS % "'${z}'"),
    ("hydra.callbacks.x._target_", CALLBACKS % "'${oc.create:{_target_:stranger.act}}'"),
    ("hydra.callbacks.x._target_", "n: act\n" + CALLBACKS % "{_target_: 'stranger.${n}'}"),
    ("hydra.callbacks.x", CALLBACKS % "'${hydra:runtime.cwd}'"),
    ("hydra.callbacks.x.of", CALLBACKS % r"{_target_: layerif.app.sweep.Sweep, of: '\${oc.create:{_target_:a.b}}'}"),
    ("hydra.launcher._target_", "hydra: {launcher: {_target_: stranger.act}}"),
    ("hydra.sweeper._target_", "hydra: {sweeper: {_target_: hydra.utils.get_object}}"),
    ("hydra.sweeper.sampler._target_", OPTUNA % f"sampler: {ACT}"),
    ("hydra.sweeper.custom_search_space", OPTUNA % "custom_search_space: stranger.act"),
    ("hydra.job_logging.handlers.console.()", LOGGING % "(): stranger.act"),
    ("hydra.job_logging.handlers.console.class", LOGGING % "class: stranger.act"),
    ("hydra.job_logging.handlers.console.stream", LOGGING % "stream: ext://stranger.x"),
    ("hydra.job_logging.handlers.console.stream", LOGGING % "stream: '${hydra:job.num}'"),
    ("hydra.job_logging.handlers.console.listener", LOGGING % "listener: stranger.act"),
    ("hydra.hydra_logging.formatters.x.class", "hydra: {hydra_logging: {formatters: {x: {class: stranger.act}}}}"),
    ("hydra.hydra_logging.filters.x.()", "hydra: {hydra_logging: {filters: {x: {(): logging.config.fileConfig}}}}"),
    ("pkg://stranger.conf", "hydra: {searchpath: ['pkg://stranger.conf']}"),
    ("pkg://stranger/conf", "p: stranger/conf\nhydra: {searchpath: ['pkg://${p}']}"),
    ("hydra.job.env_set", "hydra: {job: {env_set: {PYTHONPATH: /others}}}"),
    ("hydra.launcher.setup", SLURM % "setup: [touch mark]"),
    ("hydra.launcher.additional_parameters", SLURM % "additional_parameters: {wrap: touch mark}"),
    ("hydra.launcher.partition", SLURM % r'partition: "a\ntouch mark"'),
    ("hydra.launcher.ray.init.address", RAY % "init: {address: ray://others:10001}"),
    ("hydra.launcher.ray.remote.runtime_env", RAY % "remote: {runtime_env: {pip: [others]}}"),
    ("trusted_targets", "trusted_targets: [stranger]"),
    ("trusted_targets=${oc.decode:", "trusted_targets: '${oc.decode:\"[stranger]\"}'"),
    ("hydra.overrides", "hydra: {overrides: {task: ['trusted_targets=[stranger]']}}"),
    ("hydra.job.name='../../x'", "hydra: {job: {name: ../../x}}"),
    ("hydra.job.name='../x'", "recipe: {name: ../x}\nhydra: {job: {name: '${recipe.name}'}}"),
    (r"name='a\x00b'", r'name: "a\0b"'),
    ("name='/a'", "name: /a"),
    ("name=5", "name: 5"),
]


@pytest.mark.parametrize(("door", "text"), DOORS)
def test_a_door_is_closed_before_hydra_builds_anything(compose, stranger, door, text):
    with pytest.raises(ValueError, match=r"; allowed: |before the run starts|take it out") as refused:
        compose(text)
    assert door in str(refused.value)
    assert not stranger.exists()


GIVEN = [
    ("x: 1", "hydra.searchpath=[pkg://stranger.conf]", "trusted_targets=[stranger]"),
    ("x: 1", "+hydra.callbacks.x._target_=stranger.act", "trusted_targets=[stranger]"),
    ("x: 1", "+hydra.job.env_set.A=1"),
    ("x: 1", "hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load cuda]"),
    ("x: 1", "hydra/launcher=ray", "hydra.launcher.ray.init.address=auto"),
    ("trusted_targets: [stranger]", "trusted_targets=[stranger]"),  # the configuration that such a run has saved
    (LOGGING % "stream: ext://sys.stderr",),
    ("level: DEBUG\n" + LOGGING % "level: '${level}'",),
    (LOGGING.replace("console", "file") % "filename: '${hydra.runtime.output_dir}/mine.log'",),
]


@pytest.mark.parametrize(("text", "overrides"), [(text, overrides) for text, *overrides in GIVEN])
def test_the_command_line_may_say_what_a_yaml_may_not(compose, text, overrides):
    schema = "trusted_targets: []\n" * ("trusted_targets" not in text)
    assert compose(schema + text, *overrides)


def test_what_is_built_later_is_what_was_checked(compose):
    """The number of a job is not known yet, so a text that depends on it is settled now."""
    late = "${look_up:${oc.select:hydra.job.num,x},{0:'ext://stranger.x'},'ext://sys.stdout'}"
    config = compose(LOGGING % f'stream: "{late}"')
    config.hydra.job.num = 0
    assert config.hydra.job_logging.handlers.console.stream == "ext://sys.stdout"


@pytest.mark.parametrize("given", ["trusted_targets=stranger", "trusted_targets=[a],[b]", "trusted_targets=['${x}']"])
def test_trust_is_one_list_of_names(given):
    with pytest.raises(ValueError, match="allowed: one list of dotted paths"):
        from_command_line([given])


def test_a_job_of_a_sweep_is_checked_in_whatever_process_it_is_composed(compose, tmp_path):
    """The overrides of a job may come from a YAML, by `hydra.sweeper.params`."""
    (tmp_path / "others" / "part").mkdir(parents=True)
    (tmp_path / "others" / "part" / "evil.yaml").write_text("# @package _global_\n" + LOGGING % "(): stranger.act")
    master = compose("name: a\ntrusted_targets: []", mode=RunMode.MULTIRUN)
    composer = Composer(create_config_search_path(str(tmp_path / "others")), {})
    elsewhere = pickle.loads(pickle.dumps(composer))
    assert elsewhere.load_sweep_config(master, ["name=b"]).name == "b"
    for override in (
        "+part=evil",
        "trusted_targets=[stranger]",
        "+hydra.callbacks.x._target_=stranger.act",
        "name=a/b",
    ):
        with pytest.raises(ValueError, match="allowed"):
            elsewhere.load_sweep_config(master, [override])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

FORMAT = "hydra: {job_logging: {formatters: {simple: {format: '${recipe.i}'}}}}\n"


def growth(reference: str) -> str:
    """A YAML of 1.5 kB in which each of a chain of settings names the one before ten times."""
    chain = zip("abcdefgh", "bcdefghi", strict=True)
    levels = "".join(f"  {name}: '{reference.replace('KEY', before) * 10}'\n" for before, name in chain)
    return f"recipe:\n  a: {'x' * 1000}\n{levels}  k_a: a\n{FORMAT}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"once its aliases are spelt out; allowed: 20,000"),
        ("a: &a [*a]\n", r"inf entries"),
        ("a: " + "x" * 300_000, r"has 300,003 bytes; allowed"),
        ("a: " + "[" * 400 + "]" * 400, "is nested too deeply"),
        (growth("${recipe.KEY}"), r"characters once its interpolations are spelt out; allowed: 1,000,000"),
        (growth("${ .KEY }"), r"once its interpolations are"),
        (growth("${recipe[KEY]}"), r"once its interpolations are"),
        (growth('${oc.select:"recipe.KEY", x}'), r"once its interpolations are"),
        (growth("${recipe.KEY}").replace("${recipe.a}", "${recipe.${.k_a}}"), r"once its interpolations are"),
        (growth("${oc.create:{x:${recipe.KEY}}}"), r"does not say which setting it stands for; allowed"),
        (growth("${recipe.KEY}").replace("${recipe.a}", "${recipe.${.${.k_b}}}"), r"does not say which setting"),
        ("".join(f"k{n}: ${{k{n - 1}}}\n" for n in range(2000, 0, -1)), r"too long a chain of interpolations"),
    ],
    ids=[
        *("bomb", "cycle", "large", "deep", "interpolations", "relative", "brackets", "resolver", "inner", "created"),
        *("unclear", "chain"),
    ],
)
def test_a_yaml_that_would_fill_the_memory_is_refused(compose, text, message):
    with pytest.raises(ValueError, match=message):
        compose(text)


def test_aliases_as_people_use_them_are_read(compose):
    assert compose("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]").b == {"x": 1, "y": 2}


def test_interpolations_as_people_use_them_are_read(compose):
    sizes = "sizes: {small: {r: 2}, large: {r: 8}}\nsize: small\nalso: ${size}\n"
    config = compose(
        sizes + "r: ${sizes.${also}.r}\nt: '${look_up:${size},{small:a},b} \\${x}'\nu: ${oc.decode:${oc.env:NOBODY,1}}"
    )
    assert (config.r, config.t, config.u) == (2, "a ${x}", 1)


def test_a_file_that_is_not_a_text_is_named(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"x\.yaml is not a text in UTF-8.*; save it as such"):
        check_yaml(tmp_path / "x.yaml")


def test_the_choices_of_a_run_of_others_are_bounded_too(tmp_path, monkeypatch):
    (tmp_path / "hydra.yaml").write_text(BOMB)
    runtime = {"choices": {}, "config_sources": [{"path": str(tmp_path), "provider": "main"}]}
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": {"runtime": runtime}}))
    with pytest.raises(ValueError, match="aliases"):
        choices_of_run()


@pytest.mark.parametrize(
    "arguments",
    [
        ["name=../../x"],
        ["-m", "name=../../x", "seed=0,1"],
        ["+hydra.callbacks.x._target_=stranger.act", "--cfg", "job"],
        ["--config-path=pkg://stranger.conf"],
        ["--experimental-rerun", "x.pickle"],
        ["--help", "--config-dir=others", "hydra/hydra_logging=evil"],
    ],
)
def test_the_command_refuses_in_one_sentence_and_writes_nothing(tmp_path, stranger, arguments):
    folder = tmp_path / "a" / "b"
    evil = folder / "others" / "hydra" / "hydra_logging" / "evil.yaml"
    evil.parent.mkdir(parents=True)
    evil.write_text("version: 1\nroot: {handlers: [x]}\nhandlers: {x: {(): stranger.act}}\n")
    before = set(tmp_path.rglob("*"))
    done = layerif_here(arguments, folder)
    assert done.returncode in (1, 2)
    (said,) = done.stderr.strip().splitlines()
    assert said.startswith("layerif: ")
    assert set(tmp_path.rglob("*")) == before
    assert not stranger.exists()


def test_a_sweep_does_not_reach_a_door_that_one_of_its_jobs_opens(tmp_path, stranger):
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    for name in ("one", "two"):
        (own / f"{name}.yaml").write_text("# @package _global_\n" + LOGGING % "(): stranger.act")
    done = layerif_here(["-m", f"--config-dir={own.parent}", "experiment=one,two", f"outputs={tmp_path}"], tmp_path)
    assert done.returncode == 1
    assert "hydra.job_logging.handlers.console.()='stranger.act' is not allowed" in done.stderr
    assert not stranger.exists()


# Doors of our own: what a run builds.

NODES = {
    "model": {"_target_": "torch.utils.collect_env.run", "command": "touch mark"},
    "estimator": {"_target_": "layerif.estimators.reversed.Reversed", "of": {"_target_": "stranger.act"}},
    "trainer": {"_target_": "lightning.Trainer", "plugins": [{"_target_": "pandas.read_pickle", "path": "x"}]},
    "task": {"_target_": "torch.load", "f": "x", "weights_only": False},
    "logger": {"x": {"_target_": "joblib.load", "filename": "x"}},
    "probe": "${oc.create:{_target_:stranger.act}}",
}


@pytest.mark.parametrize(("key", "node"), NODES.items(), ids=NODES)
def test_a_foreign_target_of_a_run_is_refused_before_anything_is_built(stranger, key, node):
    with pytest.raises(ValueError, match=rf"^{key}.*_target_='(\S+)' is not allowed; .*add trusted_targets=\[\1\]"):
        check(OmegaConf.create({key: node}))
    assert not stranger.exists()


def test_the_same_target_is_built_where_the_command_line_trusts_it():
    untrusted = ["+estimator.x=1", "estimator._target_=stranger.act"]
    untrusted += [f"~estimator.{key}" for key in ("aggregation", "granularity", "normalisation")]
    assert from_conf("estimator=grad_dot", *untrusted, "trusted_targets=[stranger]") == {"x": 1}
    with pytest.raises(ValueError, match="is not allowed"):
        from_conf("estimator=grad_dot", *untrusted)


def test_an_escaped_interpolation_is_not_resolved_again(stranger):
    """Hydra's `instantiate` resolves twice, so a text that had passed the check could become a target."""
    made = from_conf("estimator=file", r"estimator.path='\${oc.create:{_target_:stranger.act}}'")
    assert made.path == "${oc.create:{_target_:stranger.act}}"
    assert not stranger.exists()


@pytest.mark.parametrize("node", [None, "datainf", [], {"x": 1}, 5])
@pytest.mark.parametrize("key", ["estimator", "evaluation", "data", "logger.csv"])
def test_a_key_that_holds_no_settings_is_named(key, node):
    config = OmegaConf.create({})
    OmegaConf.update(config, key, node, force_add=True)
    with pytest.raises(ValueError, match=rf"^{key}=.* is not allowed; allowed: settings with a _target_"):
        check(config)


class Bomb:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def saved(tmp_path: Path, *, hyper: dict | None = None, **parts) -> Path:
    allocation = {"units": ["a"], "kind": "rank", "values": [1], "budget": 1}
    model = {"_target_": "layerif.models.pretrained.LocalModel", "path": "x"}
    hyper = {"tuning": {"kind": "lora"}, "model": model, "allocation": allocation, **(hyper or {})}
    content = {"pytorch-lightning_version": "2.6.6", "state_dict": {}, "hyper_parameters": hyper, **parts}
    torch.save(content, tmp_path / "foreign.ckpt")
    return tmp_path / "foreign.ckpt"


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "stranger.act"},
        {"_target_": "${oc.create:stranger.act}"},
        {"_target_": "layerif.models.pretrained.LocalModel", "path": {"_target_": "stranger.act"}},
    ],
)
def test_a_foreign_checkpoint_names_no_code(tmp_path, stranger, model):
    from layerif.adapt.module import AdapterModule

    file = saved(tmp_path, hyper={"model": model, "trusted_targets": ["stranger"]})
    with pytest.raises(ValueError, match=r"^model\S*_target_=.* is not allowed"):
        AdapterModule.load_from_checkpoint(file)
    assert not stranger.exists()


def test_a_foreign_checkpoint_is_not_unpickled(tmp_path, stranger, monkeypatch):
    from layerif.adapt.module import AdapterModule

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError):
        AdapterModule.load_from_checkpoint(saved(tmp_path, extra=Bomb(stranger)))
    assert not stranger.exists()
