"""Every logger gets the content of a run, finished or failed, as its files show when they are read back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import wandb
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from omegaconf import DictConfig, OmegaConf, open_dict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import layerif.adapt.train
import layerif.moe.usage
from layerif.app.run import run
from layerif.app.schema import check, register
from layerif.files import conf_folder
from layerif.probe.store import Store
from layerif.record.frames import frames
from layerif.record.record import RunRecord
from layerif.record.text import markdown
from layerif.record.tracking import WANDB_RUN, Mlflow, Wandb, log_again, log_routing, tracked
from layerif.report import report
from tests.records import MATRICES, by_curves, by_matrix
from tests.wandb_file import WandbFile

pytestmark = pytest.mark.usefixtures("undrawn")

BLOCKS = ["model.layers.0", "model.layers.1", "model.layers.2"]
ROUTED = "model.layers.2"  # the shape below gives more than one expert to this block alone


@pytest.fixture(scope="module", autouse=True)
def own_wandb(tmp_path_factory):
    """Keeps wandb to keys, settings and a cache of these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(home))
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server answers there
        patch.setenv("WANDB_INIT_TIMEOUT", "1")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB__SAVE_REQUIREMENTS", "false")  # or it lists all installed packages at every start
        # This imports wandb's launcher, which looks through all modules.
        patch.setattr(wandb.Run, "_detect_and_apply_job_inputs", lambda run: None, raising=False)
        wandb.teardown()
        yield
        wandb.teardown()


def nothing_stored(fingerprint: str) -> list[Path]:
    """Returns the files of an empty store."""
    return []


def composed(overrides: list[str], folder: Path) -> DictConfig:
    """Composes the configuration of a job in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(config)
        del config["hydra"]
    return config


def job(overrides: list[str], folder: Path) -> None:
    """Runs one job in this process and in `folder`, as the command line does."""
    run(composed(overrides, folder))


@pytest.fixture(scope="module")
def settings(model_folder, task_folder, tmp_path_factory) -> list[str]:
    return [
        "model=local",
        f"model.path={model_folder}",
        "task=jsonl",
        f"task.path={task_folder}",
        f"outputs={tmp_path_factory.mktemp('outputs')}",
        "name=mine",
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "data.batch_size=4",
    ]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The folder of a LoRA-MoE run that had every logger at once."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerif.moe.usage, "UNUSED", 1.0)  # no router is exactly even
        job([*settings, "logger=[csv,tensorboard,wandb]", "trainer.log_every_n_steps=2"], folder)
    return folder


def test_a_wandb_run_carries_everything(whole):
    record, found = RunRecord.read(whole), WandbFile(whole)
    (started,) = found.all("run")[:1]
    assert (started.run_group, started.project, started.display_name) == ("mine", "layerif", "run")
    assert record.tracking == {"wandb": found.file.parent.name}
    assert found.config == record.config
    (left,) = found.all("exit")
    assert left.exit_code == 0

    curves: Any = pd.DataFrame(found.history)
    assert curves["train/loss"].dropna().notna().sum() == 2  # every second of four steps
    assert curves["validation/loss"].count() == 2
    assert curves["train/learning_rate"].dropna().is_monotonic_decreasing
    assert (curves["train/seconds"].dropna() > 0).all()
    assert curves["trainer/global_step"].max() == 3

    layers = found.table("layers")
    decision = record.decision
    assert decision is not None
    assert decision.scores is not None
    assert layers["layer"].tolist() == decision.allocation.units == decision.scores.layers == BLOCKS
    assert layers["score"].tolist() == pytest.approx(decision.scores.values)
    assert layers["experts"].tolist() == decision.allocation.values
    pd.testing.assert_frame_equal(found.table("layers/score_table"), layers)  # behind the charts
    assert found.charts.keys() == {"layers/score", "layers/experts"}
    assert found.table("metrics").set_index("metric")["value"].to_dict() == pytest.approx(record.metrics)
    questions = found.table("questions").set_index("question")["options"].to_dict()
    assert questions == record.answers["options"]
    assert found.summary["accuracy"] == record.metrics["accuracy"]
    assert found.summary["seconds/fit"] == record.seconds["fit"]


def test_wandb_keeps_the_grams_and_the_adapter_where_they_lie(whole, settings):
    record = RunRecord.read(whole)
    kept = {artifact.type: artifact for artifact in WandbFile(whole).all("artifact") if artifact.type != "run_table"}
    assert kept.keys() == {"grams", "adapter", "record"}
    (content,) = kept["record"].manifest.contents
    assert RunRecord(**json.loads(Path(content.local_path).read_text())).metrics == record.metrics
    store = Store(Path(settings[4].partition("=")[2]) / "store")
    (file,) = [Path(entry.local_path) for entry in kept["grams"].manifest.contents]
    assert [file] == store.files(record.fingerprint)
    adapter = {Path(entry.local_path) for entry in kept["adapter"].manifest.contents}
    assert whole / "adapter" / "adapter_model.safetensors" in adapter


def test_load_and_entropy_are_logged_while_training(whole):
    record = RunRecord.read(whole)
    assert record.decision is not None
    given = record.decision.allocation
    experts = dict(zip(given.units, map(int, given.values), strict=True))
    curves: Any = pd.DataFrame(WandbFile(whole).history)
    routed = [block for block in BLOCKS if experts[block] > 1]
    assert list(record.routing) == routed
    table: Any = pd.read_csv(whole / "routing.csv")
    assert table["layer"].tolist() == routed * 2
    assert table["step"].tolist() == sorted([1, 3] * len(routed))
    for block in routed:
        loads = curves[[f"load/{block}/{expert}" for expert in range(experts[block])]].dropna()
        assert len(loads) == 2
        assert loads.sum(axis=1).tolist() == pytest.approx([1, 1])
        entropy = curves[f"entropy/{block}"].dropna()
        assert ((entropy > 0) & (entropy <= torch.tensor(float(experts[block])).log().item() + 1e-6)).all()
        rows = table[table["layer"] == block]
        assert rows["lowest load"].tolist() == pytest.approx(loads.min(axis=1).tolist())
        assert rows["entropy"].tolist() == pytest.approx(entropy.tolist())
        assert sum(record.routing[block]["load"]) == pytest.approx(1)
        assert record.routing[block]["entropy"] > 0
    assert sum(" experts are hardly used (most in " in note for note in record.notes) == 1


def test_csv_keeps_its_columns_few(whole):
    curves = pd.read_csv(whole / "metrics.csv")
    expected = {"epoch", "step", "train/loss", "train/learning_rate", "train/seconds", "validation/loss"}
    assert set(curves.columns) == expected


def test_tensorboard_reads_curves_tables_and_a_chart(whole):
    record = RunRecord.read(whole)
    events = EventAccumulator(str(whole)).Reload()
    tags = events.Tags()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3]
    assert {"validation/loss", "train/learning_rate", f"entropy/{next(iter(record.routing))}"} <= set(tags["scalars"])
    assert events.Scalars("accuracy")[-1].value == pytest.approx(record.metrics["accuracy"])
    assert sorted(tags["images"]) == ["allocation", "scores"]
    layers, questions = (
        events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
        for name in ("layers", "questions")
    )
    assert layers[0] == "| depth | layer | score | experts |"
    assert len(layers) == 2 + len(BLOCKS)
    for line, (name, right) in zip(questions[2:], record.answers["options"].items(), strict=True):
        assert line.startswith(f"| {name} | {right} | {record.losses['loss'][name]} |")


def test_a_run_that_fails_is_finished_as_failed_with_its_scores_and_the_next_is_its_own(
    settings, tmp_path, monkeypatch
):
    def fail(*_args) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(layerif.adapt.train.TrainingCurves, "on_train_batch_end", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            job([*settings, "logger=wandb"], tmp_path / "failed")
    failed = WandbFile(tmp_path / "failed")
    assert [left.exit_code for left in failed.all("exit")] == [1]
    assert failed.table("layers")["layer"].tolist() == BLOCKS
    assert failed.config["task"]["name"] == "jsonl"

    job([*settings, "logger=wandb", "method=none", "logger.wandb.artifacts=false"], tmp_path / "next")
    following = WandbFile(tmp_path / "next")
    assert following.all("run")[0].run_id != failed.all("run")[0].run_id
    assert [left.exit_code for left in following.all("exit")] == [0]
    assert following.table("layers").equals(failed.table("layers"))
    assert {artifact.type for artifact in following.all("artifact")} == {"run_table"}


def test_every_logger_of_a_run_resumed_or_done_again_shows_it_from_the_start(whole, settings, tmp_path, monkeypatch):
    real = layerif.adapt.train.TrainingCurves.on_train_batch_end

    def killed(self, trainer, *rest) -> None:
        if trainer.global_step == 3:
            raise KeyboardInterrupt
        real(self, trainer, *rest)

    rest = [*settings, "trainer.log_every_n_steps=2", "fit.checkpoint_steps=2"]
    every = [*rest, "logger=[csv,tensorboard,wandb]"]
    with monkeypatch.context() as patch:
        patch.setattr(layerif.adapt.train.TrainingCurves, "on_train_batch_end", killed)
        with pytest.raises(SystemExit):
            job(every, tmp_path)
    (before,) = tmp_path.glob("wandb/offline-run-*")
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["TrainingCurves"]
    job(every, tmp_path)
    record = RunRecord.read(tmp_path)
    assert record.seconds["fit"] > saved["seconds"] > 0
    assert any(note.startswith("resumed from") for note in record.notes)
    assert any(note.startswith(f"wandb/{record.tracking['wandb']} holds this run from") for note in record.notes)
    assert not (tmp_path / WANDB_RUN).exists()
    curves, expected = (
        pd.read_csv(folder / "metrics.csv").drop(columns="train/seconds") for folder in (tmp_path, whole)
    )
    pd.testing.assert_frame_equal(curves, expected)
    assert (tmp_path / "routing.csv").read_text() == (whole / "routing.csv").read_text()
    for name in ("train/loss", f"entropy/{ROUTED}"):
        shown, undisturbed = (EventAccumulator(str(folder)).Reload().Scalars(name) for folder in (tmp_path, whole))
        assert [(one.step, one.value) for one in shown] == [(one.step, one.value) for one in undisturbed]
    assert before.name != record.tracking["wandb"]
    first, second = (WandbFile(tmp_path, name).all("run")[0] for name in (before.name, record.tracking["wandb"]))
    assert first.run_id == second.run_id
    histories = [WandbFile(tmp_path, record.tracking["wandb"]).history, WandbFile(whole).history]
    shown, undisturbed = (
        pd.DataFrame(rows).filter(["trainer/global_step", "epoch", "train/loss", f"entropy/{ROUTED}"])
        for rows in histories
    )
    pd.testing.assert_frame_equal(shown, undisturbed)

    job([*rest, "logger=[csv,tensorboard]", "rerun=true"], tmp_path)  # done again, it hides what it logged before
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")] == [1, 3]
    again: Any = pd.read_csv(tmp_path / "metrics.csv")
    assert again["train/loss"].count() == 2


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (SystemExit, 1), (ValueError, 1)])
def test_whatever_ends_a_run_reaches_wandb(tmp_path, error, code):
    logger = Wandb(save_dir=str(tmp_path))
    record = RunRecord(name="mine", seed=0, config={"task": {"name": "jsonl"}}, overrides=[])
    with pytest.raises(error), tracked([logger], record, tmp_path, nothing_stored):
        raise error
    assert [left.exit_code for left in WandbFile(tmp_path).all("exit")] == [code]
    assert wandb.run is None


class Online:
    """A run of wandb's server, as far as a logger sees it, which keeps all that it is told."""

    offline, url = False, "https://wandb.example/mine"

    def __init__(self, resumed: bool, **settings: Any) -> None:
        self.id, self.resumed = settings["id"], resumed
        self.summary = {"trainer/global_step": 3} if resumed else {}
        self.config = SimpleNamespace(update=lambda *_, **__: None)
        self.rows: list[Any] = []
        self.inputs: list[wandb.Artifact] = []
        self.outputs: list[wandb.Artifact] = []

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def use_artifact(self, artifact: wandb.Artifact) -> None:
        self.inputs.append(artifact)

    def log_artifact(self, artifact: wandb.Artifact) -> None:
        self.outputs.append(artifact)

    def finish(self, exit_code: int) -> None:
        pass


def test_an_online_run_keeps_its_id_until_it_is_done_and_takes_evidence_of_the_store_as_an_input(tmp_path, monkeypatch):
    started: list[Online] = []

    def init(**settings: Any) -> Online:
        started.append(Online(any(settings["id"] == run.id for run in started), **settings))
        return started[-1]

    monkeypatch.setattr(wandb, "init", init)
    stored = tmp_path / "grams" / "abc.safetensors"
    stored.parent.mkdir()
    stored.touch()
    (tmp_path / "rows.html").touch()
    rows = [{"metrics": {"train/loss": 0.5}, "step": step} for step in range(6)]
    for reused in (False, True):
        record = RunRecord(name="mine", seed=0, config={}, overrides=[], fingerprint="abc")
        record.measurements = [{"kind": "grams", "called": "grams", "key": "abc", "reused": reused, "seconds": 1.0}]
        logger = Wandb(save_dir=str(tmp_path), mode="online")
        with tracked([logger], record, tmp_path, lambda _: [stored]):
            log_again([logger], rows)
        assert record.tracking == {"wandb": Online.url}
    first, second = started
    assert (first.id, first.resumed, second.resumed) == (second.id, False, True)
    assert [row["trainer/global_step"] for row in first.rows] == [0, 1, 2, 3, 4, 5]
    assert [row["trainer/global_step"] for row in second.rows] == [4, 5]  # the server has the steps up to 3
    assert [artifact.type for artifact in first.outputs] == ["record", "grams", "rows"]
    assert not first.inputs
    assert [artifact.type for artifact in second.outputs] == ["record", "rows"]
    assert [artifact.name for artifact in second.inputs] == ["grams-abc"]

    other = RunRecord(name="mine", seed=1, config={"seed": 1}, overrides=[])
    with tracked([Wandb(save_dir=str(tmp_path), mode="online")], other, tmp_path, nothing_stored):
        pass
    assert started[-1].id != first.id  # another job in the same folder
    with tracked([Wandb(save_dir=str(tmp_path), mode="online", id="mine")], other, tmp_path, nothing_stored):
        pass
    assert started[-1].id == "mine"


def test_a_report_is_an_artifact_of_its_own_run(tmp_path, settings, capsys):
    job([*settings, "logger=none", "method=none", "estimator=uniform"], tmp_path / "run")
    report.main([str(tmp_path), "--wandb"])
    assert "wandb: " in capsys.readouterr().out
    found = WandbFile(tmp_path)
    assert (found.all("run")[0].job_type, found.all("run")[0].run_group) == ("report", tmp_path.name)
    (artifact,) = found.all("artifact")
    assert artifact.type == "report"
    assert {"report.html", "report.md", "report.csv"} <= {entry.path for entry in artifact.manifest.contents}


@pytest.mark.slow
def test_mlflow_carries_curves_figures_and_the_record(settings, tmp_path):
    from mlflow.tracking import MlflowClient  # its import takes seconds

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    job([*settings, "logger=mlflow", f"outputs={tmp_path}", "trainer.log_every_n_steps=2"], tmp_path / "run")
    record = RunRecord.read(tmp_path / "run")
    client = MlflowClient(uri)
    run = client.get_run(record.tracking["mlflow"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert client.get_experiment(run.info.experiment_id).name == "mine"
    assert [(one.step, one.value > 0) for one in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (1, True),
        (3, True),
    ]
    assert run.data.metrics["accuracy"] == record.metrics["accuracy"]
    assert run.data.params["task/name"] == "jsonl"
    kept = {Path(file.path).name for file in client.list_artifacts(run.info.run_id)}
    assert {"record.json", "layers.csv", "questions.csv", "adapter"} <= kept
    content = client.download_artifacts(run.info.run_id, "record.json", str(tmp_path))
    assert RunRecord(**json.loads(Path(content).read_text())).metrics == record.metrics
    assert not (tmp_path / "mlruns").exists()
    for address in ("nowhere://", f"file:{tmp_path}"):  # mlflow maintains its files no more
        with pytest.raises(ValueError, match=rf"mlflow cannot start at {address}.*give a database \(logger\.mlflow\."):
            Mlflow(save_dir="run", tracking_uri=address).start()


def test_mlflow_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(MLFlowLogger, "__init__", lambda *_, **__: require("no_such_package"))
    with pytest.raises(ValueError, match=r"logger=mlflow needs mlflow .*: pip install 'layerif\[mlflow\]'"):
        Mlflow(save_dir="run", tracking_uri="http://127.0.0.1:9")


def require(name: str) -> None:
    __import__(name)


def test_the_sweep_of_the_manual_gives_agents_a_command_that_composes(tmp_path):
    (given,) = Path(conf_folder().parent).glob("docs/how-to/sweep.yaml")
    sweep: Any = OmegaConf.to_container(OmegaConf.load(given), resolve=False)
    for chosen in (min, max):
        values = {
            name: {"value": chosen(space.get("values") or (space["min"], space["max"]))}
            for name, space in sweep["parameters"].items()
        }
        arguments = create_sweep_command_args({"args": values})["args_no_hyphens"]
        at = sweep["command"].index("${args_no_hyphens}")
        program, *overrides = [*sweep["command"][:at], *arguments, *sweep["command"][at + 1 :]]
        assert program == sweep["program"] == "layerif"
        config = composed(overrides, tmp_path)
        check(config)
        assert config.objective == sweep["metric"]["name"]
        assert sweep["metric"]["goal"] == "minimize"  # it is a loss


def test_pruning_is_tracked_too(settings, tmp_path):
    pruning = ["method=prune", "pruner=magnitude", "allocator=sparsity", "estimator=uniform", "method.save=false"]
    job([*settings, *pruning, "logger=tensorboard", "allocator.smoothing=false"], tmp_path / "run")
    record = RunRecord.read(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert events.Scalars("sparsity")[0].value == pytest.approx(record.metrics["sparsity"])
    assert "sparsity/text_summary" in events.Tags()["tensors"]


def test_frames_hold_what_the_record_holds():
    record = RunRecord(name="mine", seed=0, config={}, overrides=[])
    assert frames(record) == {}
    record.answers = {"before/options": {"a": True, "b": False}, "options": {"b": True, "a": True}}
    record.losses = {"loss": {"b": 0.5, "a": 1.5}}
    record.metrics = {"accuracy": 1.0, "found": {"not": "a number"}}
    record.sparsity = {"model.layers.0.q": 0.5}
    found = frames(record)
    assert found.keys() == {"metrics", "questions", "sparsity"}
    assert found["questions"].to_dict("list") == {
        "question": ["a", "b"],
        "before/options": [True, False],
        "options": [True, True],
        "loss": [1.5, 0.5],
    }
    assert found["metrics"].to_dict("list") == {"metric": ["accuracy"], "value": [1.0]}


def test_wandb_draws_a_line_for_each_kind_of_matrix(tmp_path):
    record = by_curves(by_matrix())
    with tracked([Wandb(save_dir=str(tmp_path))], record, tmp_path, nothing_stored):
        pass
    found = WandbFile(tmp_path)
    layers = found.table("layers")
    assert layers["depth"].tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert layers["matrix"].tolist() == list(MATRICES) * 3
    assert layers["sparsity"].tolist() == pytest.approx(record.decision.allocation.values)
    assert found.charts.keys() == {"layers/sparsity"}
    (chart,) = found.charts.values()
    assert chart["panel_config"]["fieldSettings"] == {"x": "depth", "y": "sparsity", "stroke": "matrix"}


def test_a_text_of_a_logger_cannot_break_its_table():
    frame = pd.DataFrame({"a|b": ["x|y\nz"], "score": [1.25e-7]})
    assert markdown(frame, spell=str) == "| a\\|b | score |\n| --- | --- |\n| x\\|y; z | 1.25e-07 |"


@pytest.mark.parametrize(("key", "message"), [(None, "No API key configured"), ("a" * 40, "connection refused")])
def test_online_without_key_or_network_stops_before_any_work(tmp_path, monkeypatch, key, message):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    record = RunRecord(name="mine", seed=0, config={}, overrides=[])
    began = False
    with (
        pytest.raises(ValueError, match=rf"cannot start in mode online.*{message}.*logger.wandb.mode=offline"),
        tracked([Wandb(save_dir=str(tmp_path), mode="online")], record, tmp_path, nothing_stored),
    ):
        began = True
    assert not began
    with (
        pytest.warns(RuntimeWarning, match=f"{message}.*it is offline now"),
        tracked([Wandb(save_dir=str(tmp_path), mode="online", fallback="offline")], record, tmp_path, nothing_stored),
    ):
        began = True
    assert began
    assert WandbFile(tmp_path, record.tracking["wandb"]).all("exit")[0].exit_code == 0


def test_disabled_leaves_nothing(tmp_path):
    record = RunRecord(name="mine", seed=0, config={}, overrides=[], metrics={"accuracy": 1.0})
    with tracked([Wandb(save_dir=str(tmp_path), mode="disabled")], record, tmp_path, nothing_stored):
        pass
    assert record.tracking == {}
    assert list(tmp_path.iterdir()) == []


def test_the_environment_chooses_the_mode(settings, monkeypatch):
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", [*settings, "logger=wandb"])
    for mode in ("online", "offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert config.logger.wandb.mode == mode


def test_a_logger_that_fails_in_the_end_loses_no_result(tmp_path, monkeypatch):
    logger = CSVLogger(str(tmp_path), name=None, version="")
    monkeypatch.setattr(logger, "finalize", lambda _: 1 / 0)
    record = RunRecord(name="mine", seed=0, config={}, overrides=[])
    warned = pytest.warns(RuntimeWarning, match="CSVLogger did not get everything")
    with warned, tracked([logger], record, tmp_path, nothing_stored):
        record.metrics["accuracy"] = 1.0
    assert record.metrics == {"accuracy": 1.0}


def test_routing_of_a_run_before_is_not_continued(tmp_path):
    record = RunRecord(name="mine", seed=0, config={}, overrides=[])
    for _ in range(2):
        logger = CSVLogger(str(tmp_path), name=None, version="")
        with tracked([logger], record, tmp_path, nothing_stored):
            log_routing([logger], {ROUTED: {"load": [0.25, 0.75], "entropy": 0.5}}, step=0)
    assert len(pd.read_csv(tmp_path / "routing.csv")) == 1
