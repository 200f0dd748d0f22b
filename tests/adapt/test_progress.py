"""A run that is killed at any point and resumed has the curves of an undisturbed one, and counts all its seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from layerif.adapt.adapters import LoraMoeAdapter
from layerif.adapt.data import TaskDataModule
from layerif.adapt.module import AdapterModule
from layerif.adapt.progress import TrainingCurves
from layerif.adapt.train import Fit
from layerif.allocate.allocation import Allocation
from layerif.models.pretrained import LocalModel
from tests.tiny import shipped_task

ALLOCATION = Allocation(tuple(f"model.layers.{l}" for l in range(3)), "experts", (1, 4, 2), 7)
STEPS = 13  # 5 of them make an epoch


class Killed(BaseException):
    """An end of a run that no code catches."""


@pytest.fixture(scope="module")
def splits(task_folder):
    return shipped_task("jsonl", f"task.path={task_folder}").load()


@pytest.fixture
def train(model_folder, splits, tmp_path):
    """Runs in one folder; called again, it carries on from the checkpoint there."""

    def run(name: str, kept: Fit, **options: Any) -> tuple[AdapterModule, TrainingCurves]:
        folder = tmp_path / name
        checkpoints = folder / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        curves = TrainingCurves(checkpoints / "curves.jsonl")
        trainer = L.Trainer(
            **{"max_steps": STEPS, "max_epochs": -1, "log_every_n_steps": 1, **options},
            accelerator="cpu",
            default_root_dir=folder,
            logger=CSVLogger(folder, name=None, version=""),
            callbacks=[curves, *kept.callbacks(checkpoints)],
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
        (folder / "routing.csv").unlink(missing_ok=True)  # as `tracked` does
        model = {"_target_": "layerif.models.pretrained.LocalModel", "path": str(model_folder)}
        adapter = LoraMoeAdapter(learning_rate=0.02, seed=1, target_modules=["q_proj", "down_proj"])
        module = AdapterModule(adapter, model, ALLOCATION)
        data = TaskDataModule(splits, LocalModel(path=str(model_folder)).tokenizer(), batch_size=4, seed=1)
        last = checkpoints / "last.ckpt"
        trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
        return module, curves

    return run


def after(number: int, done: Any) -> Any:
    """Wraps a method so that the run is killed after it has run a number of times."""
    calls = 0

    def until_killed(*given: Any, **named: Any) -> Any:
        nonlocal calls
        result = done(*given, **named)
        calls += 1
        if calls == number:
            raise Killed
        return result

    return until_killed


def shown(folder: Path) -> tuple[pd.DataFrame, str]:
    curves: Any = pd.read_csv(folder / "metrics.csv")
    return curves.drop(columns="train/seconds"), (folder / "routing.csv").read_text()


KILLS = [  # the object, its method, and how often this runs before
    (L.Trainer, "save_checkpoint", 2),  # the checkpoint is saved; where steps are saved, the step is not logged yet
    (AdapterModule, "validation_step", 3),  # in the middle of a validation
    (TrainingCurves, "on_validation_end", 2),
    (TrainingCurves, "on_train_batch_end", 11),  # the step's curves are kept, but its checkpoint is not saved
]
SETTINGS: list[tuple[Fit, dict[str, Any]]] = [
    (Fit(), {}),
    (Fit(keep="best", patience=5), {"val_check_interval": 2}),
    (Fit(checkpoint_steps=1), {}),
    (Fit(checkpoint_steps=2, keep="best", patience=5), {"val_check_interval": 2}),
    (Fit(checkpoint_steps=5, keep="best", patience=5), {}),
    (Fit(checkpoint_steps=3), {"log_every_n_steps": 2, "val_check_interval": 3}),
    (Fit(checkpoint_steps=1), {"limit_val_batches": 0}),
    (Fit(checkpoint_steps=2), {"accumulate_grad_batches": 2, "max_steps": 7}),
]


@pytest.fixture
def killed_and_resumed(train, tmp_path, monkeypatch):
    """Holds runs that are killed and resumed to an undisturbed one, and counts the kills that happened."""

    def count(kept: Fit, options: dict[str, Any], kills: list[tuple[type, str, int]]) -> int:
        whole, undisturbed = train("whole", kept, **options)
        assert undisturbed.seconds_before == 0
        expected, routing = shown(tmp_path / "whole")
        steps = expected.dropna(subset="train/loss")["step"]
        assert steps.is_unique
        assert len(steps) == options.get("max_steps", STEPS) // options.get("log_every_n_steps", 1)
        num_killed = 0
        for where, method, number in kills:
            name = f"{method}-{number}"
            with monkeypatch.context() as patch:
                patch.setattr(where, method, after(number, getattr(where, method)))
                try:
                    train(name, kept, **options)
                except Killed:
                    num_killed += 1
                else:
                    continue  # it does not run as often with these settings
            resumed, carried = train(name, kept, **options)
            found, routed = shown(tmp_path / name)
            pd.testing.assert_frame_equal(found, expected)
            assert routed == routing, name
            assert (carried.seconds_before > 0) == (tmp_path / name / "checkpoints" / "last.ckpt").exists()
            for key, value in whole.state_dict().items():
                assert torch.equal(value, resumed.state_dict()[key]), (name, key)
            if kept.keep == "best":
                first, second = (
                    torch.load(tmp_path / run / "checkpoints" / "best.ckpt", weights_only=True)
                    for run in ("whole", name)
                )
                assert first["global_step"] == second["global_step"], name
        return num_killed

    return count


@pytest.mark.parametrize(
    ("setting", "kills"),
    [(SETTINGS[0], KILLS[:1]), (SETTINGS[3], [KILLS[1], KILLS[3]])],
    ids=["after-a-checkpoint", "in-a-validation-and-before-a-checkpoint"],
)
def test_killed_and_resumed_shows_the_same_curves(killed_and_resumed, setting, kills):
    assert killed_and_resumed(*setting, kills) == len(kills)


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "options"), SETTINGS)
def test_killed_anywhere_and_resumed_shows_the_same_curves(killed_and_resumed, kept, options):
    assert killed_and_resumed(kept, options, KILLS) >= 2
