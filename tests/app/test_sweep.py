"""Sweeps: a job that fails, is stopped or is killed costs no other job its result, whichever launcher runs them."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import weakref
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from layerif.app import main as __main__
from layerif.app.messages import explain
from layerif.app.methods.none import ScoresOnly
from layerif.app.sweep import Balance, Sweep, balance
from layerif.files import held
from layerif.models.pretrained import LocalModel
from layerif.record.record import Failure, RunRecord
from tests.command import layerif as command
from tests.command import layerif_here


@pytest.fixture
def sweep(tiny_overrides, tmp_path, monkeypatch, capfd):
    """Runs the command line in this process and returns its exit code and its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    handlers, level = list(logging.root.handlers), logging.root.level

    def call(*overrides: str) -> tuple[int, str]:
        Sweep.running = None
        sys.argv[:] = ["layerif", "-m", *tiny_overrides, "name=mine", *overrides]
        try:
            __main__.main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        told = capfd.readouterr()
        return code, told.out + told.err

    yield call
    Sweep.running = None
    logging.root.handlers[:], logging.root.level = handlers, level


def records(folder: Path) -> list[RunRecord]:
    return [RunRecord.read(file.parent) for file in sorted((folder / "sweeps" / "mine").glob("*/record.json"))]


def failures(folder: Path) -> list[Failure]:
    return [Failure.read(file.parent) for file in sorted((folder / "sweeps" / "mine").glob("*/failure.json"))]


def test_a_job_that_fails_loses_nothing_of_the_others_and_is_named_at_the_end(sweep, tmp_path):
    jobs = ["method=none", "allocator.budget=2,8,9"]
    code, told = sweep(*jobs)
    assert code == 1
    assert "Traceback" not in told
    assert "jobs: 2 run, 0 already done, 1 failed\n" in told
    assert "gradient passes: 1 made in " in told
    assert "1 taken from the store, which saved " in told
    error = "budget=2 cannot give 3 layers 1 expert each; use allocator.budget>=3"
    assert f"failed: allocator.budget=2: {error}\n" in told
    assert len(records(tmp_path)) == 2
    (failed,) = failures(tmp_path)
    assert failed.error == error
    assert failed.config["allocator"]["budget"] == 2
    assert (failed.name, failed.seed) == ("mine", 0)
    assert "allocator.budget=2" in failed.overrides
    assert "raise ValueError" in failed.traceback

    code, told = sweep(*jobs)  # finished jobs are skipped, and failed ones are listed and not run again
    assert code == 1
    assert "jobs: 0 run, 2 already done, 0 failed, 1 failed before and not run again (rerun=failed does)" in told
    assert told.count(error) == 2
    code, told = sweep(*jobs, "rerun=failed")
    assert "jobs: 0 run, 2 already done, 1 failed\n" in told
    code, told = sweep("method=none", "allocator.budget=9", "rerun=true")
    assert (code, "jobs: 1 run, 0 already done, 0 failed" in told) == (0, True)


def test_what_failed_by_a_defect_keeps_its_traceback_and_runs_again_on_request(sweep, tmp_path, monkeypatch):
    score = ScoresOnly.run

    def out_of_memory(self, setup, record, folder):
        if setup.config.seed == 1:
            raise MemoryError("no room for 3 layers")
        score(self, setup, record, folder)

    monkeypatch.setattr(ScoresOnly, "run", out_of_memory)
    code, told = sweep("method=none", "seed=1,2")
    assert code == 1
    assert "jobs: 1 run, 0 already done, 1 failed\n" in told
    assert "failed: seed=1: MemoryError: no room for 3 layers" in told
    (failure,) = failures(tmp_path)
    assert "in out_of_memory" in failure.traceback
    (folder,) = (file.parent for file in tmp_path.rglob("failure.json"))
    assert "in out_of_memory" in next(folder.glob("*.log")).read_text()

    monkeypatch.setattr(ScoresOnly, "run", score)
    code, told = sweep("method=none", "seed=1,2", "rerun=failed")
    assert (code, "jobs: 1 run, 1 already done, 0 failed\n" in told) == (0, True)
    assert (failures(tmp_path), len(records(tmp_path))) == ([], 2)  # the record replaces the failure


def test_what_cannot_be_written_as_json_and_what_a_logger_stopped_are_failures_like_others(
    sweep, tmp_path, monkeypatch
):
    code, told = sweep("method=none", "estimator.damping=nan,0.1")
    assert (code, "jobs: 1 run, 0 already done, 1 failed\n" in told, "Traceback" in told) == (1, True, False), told
    (failure,) = failures(tmp_path)
    assert failure.config["estimator"]["damping"] == "NaN"
    code, told = sweep("method=none", "estimator.damping=nan,0.1")
    assert "1 already done, 0 failed, 1 failed before" in told

    def no_key(*_):
        raise ValueError("wandb cannot start")

    score = ScoresOnly.run
    monkeypatch.setattr(ScoresOnly, "run", no_key)
    assert "1 failed\n" in sweep("method=none", "logger=none", "seed=1")[1]
    monkeypatch.setattr(ScoresOnly, "run", score)
    assert "1 failed before" in sweep("method=none", "logger=none", "seed=1")[1]
    assert "jobs: 1 run, 0 already done, 0 failed\n" in sweep("method=none", "seed=1")[1]


def test_small_is_of_an_experiment(sweep):
    code, told = sweep("method=none", "small=true", "dry_run=true")
    assert (code, "small=true chooses the small variant of an experiment, but" in told) == (
        1,
        True,
    )


def test_ctrl_c_stops_a_sweep_at_once_and_the_same_command_carries_on(sweep, tmp_path, monkeypatch):
    score, seen = ScoresOnly.run, []

    def interrupted(self, setup, record, folder):
        seen.append(setup.config.seed)
        if setup.config.seed == 1:
            raise KeyboardInterrupt
        score(self, setup, record, folder)

    monkeypatch.setattr(ScoresOnly, "run", interrupted)
    code, told = sweep("method=none", "seed=0,1,2")
    assert (code, seen) == (130, [0, 1])
    assert "interrupted; the same command carries on" in told
    assert "jobs: 1 run, 0 already done, 0 failed, 1 unfinished" in told
    assert failures(tmp_path) == []
    monkeypatch.setattr(ScoresOnly, "run", score)
    code, told = sweep("method=none", "seed=0,1,2")
    assert (code, "jobs: 2 run, 1 already done, 0 failed\n" in told) == (0, True)


def test_a_typo_stops_a_sweep_before_its_first_job(sweep, tmp_path):
    code, told = sweep("method=none", "estimator=datainf,datainff")
    assert code == 1
    assert "layerif: estimator=datainff is not a choice of the group 'estimator' (did you mean 'datainf'?)" in told
    assert not list(tmp_path.rglob("*.json"))
    code, told = sweep("method=none", "rerun=fail")
    assert (code, "rerun='fail' is not allowed; allowed: False, failed, True (did you mean 'failed'?)" in told) == (
        1,
        True,
    )


def test_a_dry_run_of_a_sweep_tries_every_job_and_leaves_nothing(sweep, tmp_path):
    code, told = sweep("method=none", "dry_run=true", "allocator.budget=2,9")
    assert code == 1
    assert "failed: budget=2 cannot give" in told
    assert "layerif: budget=2 cannot give" in told
    assert "dry run: everything above is valid" in told
    assert not list(tmp_path.rglob("failure.json"))


def test_the_model_of_a_job_is_gone_when_the_next_begins(sweep, monkeypatch):
    load, loaded, alive = LocalModel.load, [], []

    def watched(self, *args, **kwargs):
        alive.append([reference() for reference in loaded if reference() is not None])
        model = load(self, *args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(LocalModel, "load", watched)
    gc.disable()  # an automatic collection might come in time and hide a leak
    try:
        # The second job fails on a loss that is not finite: the traceback of its error must not keep the model.
        code, told = sweep("seed=0,1", "method.learning_rate=1e-3,1e300", "trainer.max_steps=3")
    finally:
        gc.enable()
    assert (code, "2 run, 0 already done, 2 failed" in told) == (1, True), told
    assert len(loaded) >= 4
    assert not any(alive)
    assert not any(reference() for reference in loaded)


def test_a_job_that_another_sweep_runs_is_unfinished_and_not_failed(tiny_overrides, tmp_path):
    folder = tmp_path / "sweeps" / "mine" / "job"
    folder.mkdir(parents=True)
    with held(folder):
        done = layerif_here(["-m", *tiny_overrides, "name=mine", "method=none", "hydra.sweep.subdir=job"], tmp_path)
    assert done.returncode == 1
    assert f"{folder} is in use by process {os.getpid()}" in done.stdout
    assert "jobs: 0 run, 0 already done, 0 failed, 1 unfinished" in done.stdout
    assert not (folder / "failure.json").exists()


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side_on_one_gradient_pass(tiny_overrides, tmp_path):
    jobs = ["launcher=joblib", "method=none", "name=mine", "estimator=datainf,exact", "allocator.budget=2,9"]
    done = command(["-m", *tiny_overrides, *jobs], tmp_path)
    assert done.returncode == 1
    assert "jobs: 2 run, 0 already done, 2 failed\n" in done.stdout, done.stdout + done.stderr
    assert "gradient passes: 1 made in" in done.stdout
    assert done.stdout.count("failed: allocator.budget=2") + done.stdout.count("failed: estimator=") == 2
    assert len(list((tmp_path / "store" / "grams").glob("*.safetensors"))) == 1
    assert not any("launcher" in folder.name for folder in (tmp_path / "sweeps" / "mine").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [["launcher=submitit_local"], ["launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]],
    ids=["submitit", "ray"],
)
def test_a_launcher_runs_jobs_on_this_machine(launcher, tiny_overrides, tmp_path):
    done = command(["-m", *tiny_overrides, *launcher, "method=none", "name=mine", "estimator=datainf,exact"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "jobs: 2 run, 0 already done, 0 failed\n" in done.stdout
    assert "gradient passes: 1 made in" in done.stdout
    assert len(records(tmp_path)) == 2


@pytest.mark.slow
def test_a_swept_job_of_two_processes_runs_by_itself_and_may_fail(tiny_overrides, tmp_path):
    jobs = ["trainer.devices=2", "trainer.strategy=ddp", "method=none", "name=mine", "allocator.budget=2,9"]
    done = command(["-m", *tiny_overrides, *jobs], tmp_path)
    assert done.returncode == 1
    assert "jobs: 1 run, 0 already done, 1 failed\n" in done.stdout, done.stdout + done.stderr
    assert [failure.error.split(";")[0] for failure in failures(tmp_path)] == [
        "budget=2 cannot give 3 layers 1 expert each"
    ]


def test_a_search_minimises_the_loss_on_validation_rows_and_carries_on(sweep, tmp_path):
    search = ["sweeper=optuna", "hydra.sweeper.n_trials=2", "method.learning_rate=interval(0.0001,0.01)"]
    code, told = sweep(*search)
    assert code == 0, told
    assert "jobs: 2 run, 0 already done, 0 failed\n" in told
    found = OmegaConf.load(tmp_path / "sweeps" / "mine" / "optimization_results.yaml")
    losses = [record.metrics["validation/loss"] for record in records(tmp_path)]
    assert found.best_value == min(losses)
    assert len(set(losses)) == 2
    code, told = sweep(*search)
    assert (code, "jobs: 0 run, 2 already done, 0 failed\n" in told) == (0, True)


def test_a_search_goes_on_after_a_failed_trial_and_looks_at_scores_alone_if_asked(sweep, tmp_path):
    search = ["sweeper=optuna", "hydra.sweeper.n_trials=4"]
    search += ["hydra.sweeper.direction=maximize", "objective=reliability", "method=none"]
    code, told = sweep(*search, "allocator.budget=choice(2,9)")
    assert code == 1
    assert "jobs: 1 run, 0 already done, 1 failed" in told
    (record,) = records(tmp_path)
    found = OmegaConf.load(tmp_path / "sweeps" / "mine" / "optimization_results.yaml")
    assert (found.best_value, found.best_params) == (record.decision.reliability, {"allocator.budget": 9})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=accuracy"], "objective='accuracy' is not allowed; allowed: None, validation/loss, reliability"),
        (["objective=validation/loss", "method=none"], "objective=validation/loss is a figure of a fine-tuned model"),
    ],
)
def test_no_objective_but_those_of_validation_rows(sweep, overrides, message):
    code, told = sweep(*overrides)
    assert (code, message in told) == (1, True), told


@pytest.mark.parametrize("missing", ["hydra/launcher/joblib", "hydra/launcher/submitit_slurm", "hydra/sweeper/optuna"])
def test_a_missing_plugin_is_named_with_its_extra(missing):
    said = explain(MissingConfigException("not found", missing, options=["basic"]), [])
    extra = missing.rpartition("/")[2].split("_")[0]
    assert f"={extra} needs a plugin of Hydra that is not installed: pip install 'layerif[{extra}]'" in said


def test_a_balance_states_what_it_knows():
    measured = [
        {"kind": "grams", "called": "gradient passes", "key": "a", "reused": reused, "seconds": 90.0}
        for reused in (False, True, True)
    ]
    measured += [{"kind": "spectra", "called": "spectra of weights", "key": "b", "reused": True, "seconds": None}]
    text = str(Balance(run=["a"], failed_before={"b": "no"}, measurements=measured))
    assert "gradient passes: 1 made in 90.0 s, 2 taken from the store, which saved 3 min" in text
    assert "spectra of weights: 0 made, 1 taken from the store, which saved at least 0.0 s" in text
    assert text.splitlines()[-1] == "failed: b: no"
    assert Balance(run=["a"]).is_clean
    assert not Balance(unfinished=["a"]).is_clean


def test_a_balance_counts_what_it_cannot_read_as_failed_and_leaves_out_jobs_of_earlier_sweeps(tmp_path):
    for seed, name in enumerate(("earlier", "broken", "killed")):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text(f"- seed={seed}\n- name=mine\n")
    os.utime(tmp_path / "earlier" / ".hydra" / "overrides.yaml", ns=(5, 5))
    (tmp_path / "broken" / "record.json").write_text('{"name": "mi')
    found = balance(tmp_path, since=10)
    assert (found.run, found.unfinished) == ([], ["seed=2"])
    assert "is not a readable record of layerif" in found.failed["seed=1"]


def test_a_single_run_that_fails_says_so_as_ever_and_leaves_its_failure(tiny_overrides, tmp_path):
    folder = tmp_path / "run"
    overrides = [*tiny_overrides, "allocator.budget=2", f"hydra.run.dir={folder}"]
    for _ in range(2):  # a job that is asked for by itself runs again
        done = layerif_here(overrides, tmp_path)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("layerif: budget=2 cannot give 3 layers")
        assert "failed before" not in done.stdout + done.stderr
    assert Failure.read(folder).error.startswith("budget=2 cannot give")
    assert json.loads((folder / "failure.json").read_text()).keys() == {
        "name", "seed", "choices", "config", "overrides", "error", "traceback",
    }  # fmt: skip


@pytest.mark.parametrize("setting", ["model.path", "task.path"])
def test_a_folder_that_all_jobs_would_miss_fails_once_and_before_the_first(tiny_overrides, tmp_path, setting):
    done = layerif_here(["-m", *tiny_overrides, "seed=0,1,2", f"{setting}=/nowhere"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"layerif: {setting}=")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("failure.json"))
