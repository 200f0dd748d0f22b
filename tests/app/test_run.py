"""The command line end to end on a tiny model: every method, its files, the jobs it skips and the input it refuses."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from layerif.app.methods.none import ScoresOnly
from layerif.app.run import _quieten_hub
from layerif.app.setup import Setup
from layerif.files import held
from layerif.record.record import RunRecord
from layerif.report.report import write_report
from tests.command import layerif_here, run_layerif


@pytest.mark.usefixtures("drawn")
def test_the_whole_road(tiny_overrides, tmp_path):
    record = run_layerif([*tiny_overrides, "evaluation.before=true", "allocator.budget=9"], tmp_path)
    folder = tmp_path / "run"
    assert record.decision.scores.layers == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert len(record.decision.scores.values) == 3
    assert min(record.decision.scores.values) >= 0
    assert record.decision.allocation.kind == "experts"
    assert sum(record.decision.allocation.values) == record.decision.allocation.budget == 9
    for prefix in ("before/", ""):
        right = record.answers[f"{prefix}options"]
        assert record.metrics[f"{prefix}accuracy"] == sum(right.values()) / len(right)
        assert len(right) == 10
        for metric in ("loss", "loss_sum", "margin"):
            by_row = record.losses[f"{prefix}{metric}"]
            assert by_row.keys() == right.keys()
            assert record.metrics[f"{prefix}{metric}"] == pytest.approx(sum(by_row.values()) / 10)
    assert {"evidence", "score", "allocate", "fit", "evaluate", "before/evaluate"} <= record.seconds.keys()
    assert record.parameters["total"] > record.parameters["trainable"] > 0
    assert len(record.fingerprint) == 64
    assert record.versions["torch"] == torch.__version__
    assert record.config["estimator"]["damping"] == 0.1
    for name in ("scores.png", "allocation.png", "layers.csv", "metrics.csv", "adapter/adapter_config.json"):
        assert (folder / name).stat().st_size > 0, name
    assert not (folder / "checkpoints").exists()

    from peft import PeftModel

    import layerif.moe  # noqa: F401 - registers the adapter's type
    from tests.tiny import tiny_model

    reloaded = PeftModel.from_pretrained(tiny_model("llama"), folder / "adapter")
    counts = reloaded.peft_config["default"].num_experts  # type: ignore[union-attr]
    assert counts == dict(zip(record.decision.allocation.units, record.decision.allocation.values, strict=True))


def test_the_saved_configuration_reruns_to_the_same_record(tiny_overrides, tmp_path):
    first = run_layerif(tiny_overrides, tmp_path)
    saved = tmp_path / "run" / ".hydra"
    done = layerif_here(
        ["--config-path", str(saved), "--config-name", "config", f"hydra.run.dir={tmp_path / 'again'}"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    again = RunRecord.read(tmp_path / "again")
    assert (again.decision, again.metrics) == (first.decision, first.metrics)
    assert again.answers == first.answers


def test_scores_only_and_then_from_their_file(tiny_overrides, tmp_path):
    record = run_layerif([*tiny_overrides, "method=none"], tmp_path)
    assert record.metrics == {}
    saved = tmp_path / "run" / "record.json"
    reused = tmp_path / "reused"
    reused.mkdir()
    overrides = [*tiny_overrides, "method=none", "estimator=file", f"estimator.path={saved}"]
    again = run_layerif(overrides, reused)
    assert (again.decision.scores, again.decision.allocation) == (record.decision.scores, record.decision.allocation)

    by_hand = tmp_path / "experts.json"
    by_hand.write_text(json.dumps({"model.layers.0": 1, "model.layers.2": 4, "model.layers.1": 2}))
    hand = tmp_path / "hand"
    hand.mkdir()
    given = run_layerif([*tiny_overrides, "allocator=file", f"allocator.path={by_hand}", f"store={hand}"], hand)
    assert given.decision.allocation.values == [1, 2, 4]
    assert given.decision.scores is None  # no allocator looks at scores, so nothing was measured
    assert not list(hand.rglob("*.safetensors")) or list(hand.rglob("grams")) == []


def test_a_second_run_takes_the_scores_from_the_store_and_a_third_does_nothing(tiny_overrides, tmp_path):
    first = run_layerif([*tiny_overrides, "method=none"], tmp_path)
    done = layerif_here([*tiny_overrides, "method=none", "estimator=exact"], tmp_path)
    assert "scores from the store" in done.stderr + done.stdout
    assert len(list((tmp_path / "store" / "grams").glob("*.safetensors"))) == 1
    written = (tmp_path / "run" / "record.json").stat().st_mtime_ns
    done = layerif_here([*tiny_overrides, "method=none", f"hydra.run.dir={tmp_path / 'run'}"], tmp_path)
    assert "already done" in done.stderr + done.stdout
    assert (tmp_path / "run" / "record.json").stat().st_mtime_ns == written
    rows = tmp_path / "rows"
    shutil.copytree(tiny_overrides[3].partition("=")[2], rows)
    moved = [*tiny_overrides, "method=none", f"task.path={rows}"]
    changed = run_layerif(moved, tmp_path)
    (rows / "train.jsonl").write_text((rows / "train.jsonl").read_text().replace("Which of", "What of"))
    assert (
        run_layerif(moved, tmp_path).decision.scores != changed.decision.scores
    )  # the same settings name other rows now
    assert any("held another job's record" in note for note in changed.notes)
    other = run_layerif([*tiny_overrides, "method=none", "estimator.damping=1"], tmp_path)
    assert other.decision.scores != first.decision.scores


@pytest.mark.usefixtures("drawn")
def test_a_sweep_gives_one_folder_a_job_and_a_report(tiny_overrides, tmp_path):
    done = layerif_here(["-m", *tiny_overrides, "name=mine", "estimator=uniform,datainf"], tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "sweeps" / "mine"
    assert len(list(sweep.glob("*/record.json"))) == 2
    write_report(sweep)
    for name in ("report.md", "report.csv", "scores.png", "allocations.png"):
        assert (sweep / name).stat().st_size > 0


def test_settings_of_a_sweep_share_one_gradient_pass(tiny_overrides, tmp_path):
    sweep = ["estimator=datainf,lissa", "estimator.damping=0.01,1", "method=none", "name=mine"]
    done = layerif_here(["-m", *tiny_overrides, *sweep], tmp_path)
    assert done.returncode == 0, done.stderr
    records = [RunRecord.read(file.parent) for file in (tmp_path / "sweeps" / "mine").glob("*/record.json")]
    assert len({record.fingerprint for record in records}) == 1
    assert len({tuple(record.decision.scores.values) for record in records}) == len(records) == 4
    assert done.stdout.count("gradient pass: 20 + 8 samples") == 1
    assert done.stdout.count("no gradient pass") == 3


def test_dry_run_prints_sizes_and_writes_no_result(tiny_overrides, tmp_path):
    rows = shutil.copytree(tiny_overrides[3].partition("=")[2], tmp_path / "rows")
    shutil.copy(rows / "test.jsonl", rows / "dev.jsonl")
    done = layerif_here([*tiny_overrides, f"task.path={rows}", "dry_run=true"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{rows} also holds dev.jsonl, which no part reads (task.splits: train from train.jsonl," in done.stdout
    for part in ("3 layers", "20 train, 8 validation, 10 test", "nothing was measured or trained", "budget 15"):
        assert part in done.stdout
    assert not list(tmp_path.rglob("record.json"))
    assert not (tmp_path / "store").exists()


def test_a_second_run_in_the_same_folder_is_told_who_is_there(tiny_overrides, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with held(folder):
        done = layerif_here([*tiny_overrides, "method=none", f"hydra.run.dir={folder}"], tmp_path)
    assert done.returncode == 1
    holder = f"process {os.getpid()} on {socket.gethostname()} since "
    assert done.stderr.startswith(f"layerif: {folder} is in use by {holder}")
    assert {path.name for path in folder.iterdir()} == {".hydra", "default.log"}  # nor a failure


def test_a_full_disk_names_the_runs_folder(tiny_overrides, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it, without a name

    monkeypatch.setattr(ScoresOnly, "run", full)
    done = layerif_here([*tiny_overrides, "method=none", f"hydra.run.dir={tmp_path / 'run'}"], tmp_path)
    assert done.stderr == (
        f"layerif: no space is left on the disk for {tmp_path / 'run'}; free some and give the same command again\n"
    )


def test_ctrl_c_leaves_no_half_written_file(tiny_overrides, tmp_path):
    overrides = [
        *tiny_overrides,
        "trainer.max_steps=100000",
        "trainer.max_epochs=100000",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "layerif", *overrides],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    deadline = time.monotonic() + 600
    while not (tmp_path / "run" / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"interrupted; the same command with hydra.run.dir='{tmp_path / 'run'}' carries on" in errors
    assert not (tmp_path / "run" / "record.json").exists()


def test_best_without_a_validation_says_what_to_do(tiny_overrides, tmp_path):
    done = layerif_here([*tiny_overrides, "fit.keep=best"], tmp_path)
    assert done.returncode == 1
    assert "fit.keep=best found no validation to choose by" in done.stderr


def test_a_training_that_ends_before_its_first_step_does_not_pass_for_done(tiny_overrides, tmp_path):
    done = layerif_here([*tiny_overrides, "estimator=uniform", "+trainer.max_time='00:00:00:00'"], tmp_path)
    assert done.returncode == 1
    assert "training ended before its first step; is there a limit of time among trainer's settings?" in done.stderr
    assert not (tmp_path / "run" / "record.json").exists()


def test_what_was_measured_is_in_the_record(tiny_overrides, tmp_path):
    rows = shutil.copytree(tiny_overrides[3].partition("=")[2], tmp_path / "rows")
    shutil.copy(rows / "test.jsonl", rows / "dev.jsonl")
    record = run_layerif([*tiny_overrides, f"task.path={rows}", "method=none"], tmp_path)
    assert record.decision.samples == {"train": 20, "validation": 8}
    assert "num_train=300 asked for, and there are 20 train rows" in record.notes
    assert any("also holds dev.jsonl, which no part reads" in note for note in record.notes)
    assert record.inputs.keys() >= {"rows", "weights", "dtype", "adapter"}


def test_tracin_over_saved_adapters(tiny_overrides, tmp_path):
    run_layerif(tiny_overrides, tmp_path)
    adapter = tmp_path / "run" / "adapter"
    (tmp_path / "tracin").mkdir()
    rates = [f"estimator.checkpoints=[{adapter}]", "estimator.learning_rates=[0.1]", "probe.parameters=lora"]
    record = run_layerif([*tiny_overrides, "method=none", "estimator=tracin", *rates], tmp_path / "tracin")
    assert str(adapter) in record.inputs
    assert min(record.decision.scores.values) > 0


@pytest.mark.slow
def test_two_processes_score_and_train_like_one(tiny_overrides, tmp_path):
    small = [*tiny_overrides, "probe.num_train=9", "probe.num_validation=4"]
    alone = run_layerif([*small, "method=none", f"outputs={tmp_path / 'alone'}"], tmp_path)
    two = ["trainer.devices=2", "trainer.strategy=ddp"]
    together = tmp_path / "together"
    together.mkdir()
    scored = run_layerif([*small, *two, "method=none", f"outputs={together}"], together, apart=True)
    assert scored.decision.scores.values == pytest.approx(alone.decision.scores.values, rel=1e-5)
    assert scored.decision.allocation == alone.decision.allocation
    trained = tmp_path / "trained"
    trained.mkdir()
    record = run_layerif([*small, *two, f"outputs={trained}"], trained, apart=True)
    assert record.decision.scores.values == pytest.approx(alone.decision.scores.values, rel=1e-5)
    assert 0 <= record.metrics["accuracy"] <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_trainer_for_a_gpu_says_what_to_do_without_one():
    config = OmegaConf.create({"trainer": {"_target_": "lightning.Trainer", "accelerator": "gpu"}})
    parts = Setup.__new__(Setup)
    parts.config = config
    with pytest.raises(ValueError, match="without a GPU use trainer=default"):
        parts.trainer([], Path())


def test_the_hub_says_each_refusal_once():
    for _ in range(2):  # the runs of a sweep share one process
        _quieten_hub()
    client = logging.getLogger("huggingface_hub.utils._http")
    said = ["refused", "Retrying in 1s", "refused", "Rate limited. Waiting 9s"]
    kept = [client.filter(client.makeRecord("", 30, "", 0, message, (), None)) for message in said]
    assert [bool(one) for one in kept] == [True, False, False, True]
    assert not logging.getLogger("huggingface_hub").propagate
