"""Every YAML composes and fits the signature of its class, and a mistyped name is answered by the nearest valid one."""

from __future__ import annotations

import logging
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from layerif.app import help
from layerif.app.main import main
from layerif.app.overrides import with_size
from layerif.app.schema import check, check_plain, check_size, register
from layerif.files import conf_folder
from layerif.record.job import folder_name, identity, settings_of

CHOICES = [
    (file.parent.name, file.stem) for file in sorted(conf_folder().glob("*/*.yaml")) if file.parent.name != "hydra"
]
OWN = {  # experiments of a user
    "broken": "# @package _global_\nprobe: [a\n  num_train: 3\n",
    "unpacked": "probe:\n  num_train: 3\n",
    "mistyped": "# @package _global_\nprob:\n  num_train: 3\n",
    "wrong": "# @package _global_\nseed: four\n",
}
MANDATORY: dict[tuple[str, ...], list[str]] = {
    ("model", "local"): ["model.path=/somewhere"],
    ("model", "hub"): ["model.name=org/name"],
    ("model", "configuration"): ["model.path=/somewhere"],
    ("estimator", "file"): ["estimator.path=scores.json"],
    ("estimator", "tracin"): ["estimator.checkpoints=[a,b]", "estimator.learning_rates=[1e-3,5e-4]"],
    ("allocator", "file"): ["allocator.path=allocation.json"],
    ("arm", "alphapruning"): ["method=prune", "allocator=sparsity"],
    ("arm", "curves_and_mask_swaps"): ["method=prune"],
    ("arm", "curves_refined"): ["method=prune"],
    ("arm", "greedy"): ["method=drop"],
    ("arm", "dlp"): ["method=prune", "allocator=sparsity"],
    ("arm", "lsa"): ["method=prune", "allocator=sparsity"],
    ("arm", "owl"): ["method=prune", "allocator=sparsity"],
    ("arm", "search_from_uniform"): ["method=prune", "allocator=sparsity"],
    ("arm", "ila"): ["model.adapter=/somewhere"],
    ("arm", "tracin"): ["estimator.checkpoints=[a]"],  # in a sweep, its own experiments stand beside it
}


@pytest.fixture(autouse=True)
def hydra():
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield


def composed(*overrides: str):
    config = compose("config", [*overrides, "outputs=/nowhere", "logger=none"], return_hydra_config=False)
    OmegaConf.resolve(config)
    return config


def together() -> list[list[str]]:
    """Overrides that hold every choice once. Choices of groups that set nothing outside themselves share one list."""
    alone = {"arm", "experiment", "launcher", "sweeper", "size"}
    groups = {group: [name for other, name in CHOICES if other == group] for group, _ in CHOICES}
    shared = zip_longest(
        *([f"{group}={name}" for name in names] for group, names in groups.items() if group not in alone)
    )
    lists = [[override for override in row if override] for row in shared]
    lists += [[f"{group}={name}"] for group, name in CHOICES if group in alone]
    return [
        [*row, *(more for override in row for more in MANDATORY.get(tuple(override.split("=")), []))] for row in lists
    ]


@pytest.mark.parametrize("overrides", together(), ids=" ".join)
def test_every_choice_composes_and_binds_and_the_command_line_stands_over_experiments(overrides):
    with_logger = [] if any(override.startswith("logger=") for override in overrides) else ["logger=none"]
    config = compose("config", ["outputs=/nowhere", *with_logger, *overrides, "seed=7", "probe.num_train=3"])
    for logger in config.logger.values():  # they depend on Hydra's folder and job, which only a run has
        logger.save_dir = "/nowhere"
        for name_of_sweep in {"group", "experiment"} & {*logger}:
            logger[name_of_sweep] = "mine"
    check(config)
    assert (config.seed, config.probe.num_train) == (7, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "probe.scope=atention",
            r"probe.scope='atention' is not allowed; allowed: attention, mlp, all \(did you mean 'attention'",
        ),
        ("estimator.damping=much", "estimator.damping='much' is not allowed"),
        ("estimator.damping_rule=relativ", r"allowed: relative, absolute \(did you mean 'relative'"),
        ("model=local", "model.path has no value"),
        ("fit.keep=worst", "allowed: last, best"),
        ("allocator.smoothing=no", "allocator.smoothing='no' is not allowed; allowed: true or false"),
        ("task.drop_overlap=no", "task.drop_overlap='no' is not allowed; allowed: true or false"),
        ("probe.num_train=1e2", r"probe.num_train=100\.0 is not allowed; allowed: a whole number"),
        ("method.top_k=true", "method.top_k=True is not allowed; allowed: a whole number"),
        ("method.learning_rate=nan", "method.learning_rate=nan is not allowed; allowed: a finite number"),
        ("trainer.gradient_clip_val=inf", "trainer.gradient_clip_val=inf is not allowed; allowed: a finite number"),
        ("+logger.csv={prefix:[a,-inf]}", r"logger.csv.prefix\[1\]=-inf is not allowed; allowed: a finite number"),
        ("fit.patience=2.5", r"fit.patience=2\.5 is not allowed; allowed: a whole number, null"),
        ("method.target_modules=q_proj", "method.target_modules='q_proj' is not allowed; allowed: a list, null"),
        ("seed=-1", "seed=-1 is not allowed; allowed: a whole number of at least 0 and below 4294967296"),
        ("score_task=currency", r"score_task='currency' stands where .* say \+task@score_task=currency"),
        ("evaluation=null", "evaluation=None is not allowed; allowed: settings with a _target_"),
        ("~model.cache", r"model has no 'cache', which .*EmbeddedModel needs; give it with \+model.cache=…"),
        ("+foo=1", "'foo' is not a key of the configuration; allowed at the top: model, task"),
        ("++prob.num_train=1", r"'prob' is not a key of the configuration \(did you mean 'probe'"),
        ("evaluation.metrics=options", r"allowed: a list, null, as in 'evaluation.metrics=\[options\]'"),
        ("name=", "name='' is not allowed; allowed: the name of a folder"),
        ("+estimator.dampin=1", r"estimator.dampin is not known to .* \(did you mean 'damping'"),
        ("data.batch_size=many", "data.batch_size='many'"),
        ("method.learning_rate=fast", "method.learning_rate='fast'"),
        ("+trainer.max_step=1", r"trainer.max_step is not known to lightning.Trainer \(did you mean 'max_steps'"),
    ],
)
def test_values_are_checked_against_the_signature(override, message):
    with pytest.raises(ValueError, match=message):
        check(composed(override))


@pytest.mark.parametrize("value", [{"key": [b"bytes"]}, {1e400: 1}, {"key": Path("a")}, float("nan"), {1, 2}])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(ValueError, match=r"trainer\S*=.* is not allowed; allowed: a "):
        check_plain(value, "trainer")
    check_plain({"key": [1, 2.5, None, True, "text"], 3: {}}, "trainer")


@pytest.mark.parametrize(
    ("key", "value"),
    [("estimator.damping", 1), ("method.lora_alpha", 16), ("method.target_modules", ["q_proj"]), ("fit.patience", 2)],
)
def test_a_whole_number_is_a_number_and_null_gives_way_to_a_value(key, value):
    config = composed(f"{key}={value}")
    check(config)
    assert OmegaConf.select(config, key) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["estimatr=datainf"], "did you mean 'estimator'"),
        (
            ["estimator=datainff"],
            "estimator=datainff is not a choice of the group 'estimator' (did you mean 'datainf'?); available: alpha",
        ),
        (
            ["estimator.dampng=1"],
            "'estimator.dampng' is not a key of the configuration (did you mean 'damping'?); allowed in 'estimator'",
        ),
        (
            ["logger=[csv,wandb]", "estimator.dampng=1"],
            "'estimator.dampng' is not a key of the configuration (did you mean",
        ),
        (
            ["-m", "experiment=[table1_experts_mistral,upstream]", "seed=0,1", "method.rr=4"],
            "'method.rr' is not a key of the configuration (did you mean 'r'?); allowed in 'method': ",
        ),
        (["task=capitol"], "did you mean 'capital'"),
        (["model=null"], "model=null is not a choice of the group 'model'; available: configuration, gemma_7b, hub"),
        (
            ["sed=1", "tsk=capital"],
            "'sed' is not a key of the configuration (did you mean 'seed'?); allowed at the top",
        ),
        (
            ["prob.num_train=3"],
            "'prob' is not a key of the configuration (did you mean 'probe'?); allowed at the top",
        ),
        (["logger.wandb.mode=online"], "logger.wandb.mode: logger=csv has no wandb; choose logger=wandb"),
        (["-m", "hydra.launcher.n_jobs=2"], "launcher=basic has no settings; choose launcher=joblib"),
        (["method=none", "method.balance_coefficient=1"], "method=none has no settings; choose method=lora_moe"),
        (["-m", "method=lora_moe,none", "method.learning_rate=1"], "not every job has the key 'method.learning_rate'"),
        (["data.dropp=1"], "allowed in 'data': template, batch_size, max_length, loss_on, drop_partial, seed"),
        (["seed=one"], "seed='one' is not allowed; allowed: a whole number"),
        (["small=perhaps"], "small='perhaps' is not allowed; allowed: true or false"),
        (["task.columns.nothing"], "'task.columns.nothing' has no value: write task.columns.nothing=…"),
        (["task.path={a"], """needs quotes within quotes: 'task.path="{a"'"""),
        (["task.path=a,b"], "task.path has several values: -m sweeps over them, task.path=[a,b] is a list"),
        (["--dry-run"], "--dry-run is not an option; settings are key=value: dry_run=true"),
        (["-sc", "install=foo"], "No completion plugin for 'foo' found, available : bash fish zsh"),
        (["--config-path=somewhere"], "absolute path: --config-path=/folder"),
        (["-m", "launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0 is not allowed"),
        (["-m", "launcher=submitit"], "launcher=submitit finds no Slurm (srun) here"),
        (["-m", "sweeper=optuna", "objective=accuracy"], "objective='accuracy' is not allowed"),
        (["-m", "name=../elsewhere"], "name='../elsewhere' is not allowed; allowed: the name of a folder below"),
        (["--config-dir=own", "experiment=broken"], "while parsing a flow sequence"),
        (["--config-dir=own", "experiment=unpacked"], "the first line of its YAML must be: # @package _global_"),
        (
            ["--config-dir=own", "experiment=mistyped"],
            "In 'experiment/mistyped': 'prob' is not a key of the configuration",
        ),
        (
            ["--config-dir=own", "experiment=wrong"],
            "In 'experiment/wrong': seed='four' is not allowed; allowed: a whole",
        ),
    ],
)
def test_a_typo_is_answered_in_one_line_without_a_traceback(overrides, message, tmp_path, monkeypatch, capsys):
    GlobalHydra.instance().clear()
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    for name, text in OWN.items():
        (tmp_path / "own" / "experiment" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["layerif", *overrides])
    monkeypatch.setattr(logging.root, "handlers", [])  # another test's may write to a stream that is closed
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (1, 2)
    told = capsys.readouterr()
    (said,) = told.err.strip().splitlines()
    assert said.startswith("layerif: ")
    assert message in said
    assert "+" not in said
    assert "jobs: 0 run" not in told.out


def imported_by(code: str, folder: Path) -> tuple[set[str], str]:
    """Returns the modules that a new Python imported while it ran the code, and the text that it printed."""
    code += "\nimport sys\nprint('\\n--', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    told, _, modules = done.stdout.rpartition("\n-- ")
    return set(modules.split()), told


HEAVY = {"torch", "transformers", "numpy", "pandas", "scipy"}


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    assert not imported_by("import layerif", tmp_path)[0] & HEAVY


def test_help_names_every_group_and_choice_and_loads_nothing_heavy(tmp_path):
    code = "import sys; sys.argv = ['layerif', '--help']\nfrom layerif.app.main import main\nmain()"
    modules, told = imported_by(code, tmp_path)
    assert not modules & (HEAVY | {"hydra"})
    for group in {group for group, _ in CHOICES}:
        choices = [choice for other, choice in CHOICES if other == group]
        assert f"\n{group}: {', '.join(choices)}\n" in told
    assert told.startswith("layerif: score the layers")
    assert 'eval "$(layerif -sc install=bash)"' in told


def test_help_is_left_to_hydra_where_there_are_further_folders():
    assert help.is_asked(["-h", "task=cola"])
    assert not help.is_asked(["task=cola"])
    assert not help.is_asked(["--help", "--config-dir=mine"])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("small=true", "size=small"),
        ("+small=True", "size=small"),
        ("small=false", "size=full"),
        ("small=false,true", "size=full,small"),
        ("small=perhaps", "small=perhaps"),
        ("name=small", "name=small"),
    ],
)
def test_small_is_written_as_a_choice_of_the_group_size(written, read):
    assert with_size(["-m", written]) == ["-m", read]


def test_a_size_is_the_experiments_own_and_every_small_file_has_its_experiment():
    for file in conf_folder().glob("*/*/small.yaml"):
        assert file.parent.with_suffix(".yaml").is_file()
        assert f"optional {file.parent.name}: ${{size}}" in file.parent.with_suffix(".yaml").read_text()


def test_small_without_the_choice_of_a_size_is_refused():
    with pytest.raises(ValueError, match="small=True and size=full disagree"):
        check_size(small=True, size="full")


def test_folder_names_are_readable_unique_and_valid():
    assert folder_name(["task=capital", "seed=1"]) == "seed=1,task=capital"
    paths = [folder_name([f"model.path=/models/{name}"]) for name in ("a", "b")]
    assert len(set(paths)) == 2
    assert all("/" not in path for path in paths)
    assert folder_name([]) == "default"
    assert len(folder_name(["x=" + "1" * 500])) < 120


@pytest.mark.parametrize(
    "incidental",
    [
        "logger=wandb",
        "logger=[csv,wandb]",
        "logger.wandb.project=mine",
        "+logger.wandb.tags=[a,b]",
        "launcher=joblib",
        "rerun=failed",
        "small=true",
        "size=small",
        "outputs=/elsewhere",
    ],
)
def test_what_makes_no_other_job_is_in_no_folder_name(incidental):
    """A sweep that is given again with another logger finds the jobs that are done."""
    for others in ([], ["seed=1"], ["method=none", "task.columns=[c,d]"]):
        assert folder_name([*others, incidental]) == folder_name(others)
    assert folder_name(["dry_run=true"]) != folder_name([])


def test_a_job_is_the_same_wherever_its_results_are_kept():
    here, there, elsewhere = (
        settings_of(compose("config", ["logger=none", *overrides]))
        for overrides in (["outputs=/here", "name=mine"], ["outputs=/there", "store=/store"], ["seed=1"])
    )
    assert here == there
    assert here["model"]["cache"] == "outputs/store/models"
    assert elsewhere != here


def test_a_small_variant_is_another_job_and_says_so():
    ours, small = (settings_of(compose("config", ["logger=none", f"size={size}"])) for size in ("full", "small"))
    assert (ours.pop("small"), small.pop("small")) == (False, True)
    assert ours == small


def test_a_job_is_its_choices_settings_and_inputs_and_no_path_of_a_class():
    settings = settings_of(compose("config", ["logger=none"]))
    moved = {**settings, "estimator": {**settings["estimator"], "_target_": "elsewhere.DataInf"}}
    chosen, inputs = {"estimator": "datainf", "experiment": "none"}, {"rows": "1"}
    assert identity(chosen, settings, inputs) == identity(chosen, moved, inputs)
    assert identity(chosen, settings) == identity({**chosen, "experiment": "first_light", "logger": "csv"}, settings)
    assert identity(chosen, settings) != identity({"estimator": "exact"}, settings)
    assert identity(chosen, settings, inputs) != identity(chosen, settings, {"rows": "2"})
