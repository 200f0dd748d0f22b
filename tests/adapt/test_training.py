"""A training that does nothing, never ends or cannot be validated as asked is refused before any work."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest

from layerif.adapt.data import TaskDataModule
from layerif.adapt.train import Fit, check_training
from layerif.data.render import Example
from layerif.data.task import Splits
from tests.tiny import tiny_tokenizer


def check(fit: Fit | None = None, *, measure_validation: bool = False, **settings: Any) -> None:
    """Checks a training of 5 batches an epoch, with 2 of validation."""
    rows = tuple(Example(str(number), f"Which {number}?", ("a", "b"), ("a", "b"), 0) for number in range(20))
    data = TaskDataModule(Splits(rows, rows[:8], ()), tiny_tokenizer(), batch_size=4)
    settings = {"max_epochs": 3, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(**settings, accelerator="cpu", logger=False, enable_checkpointing=False)
    check_training(trainer, data, fit or Fit(), measure_validation=measure_validation)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_epochs": 0}, r"trainer\.max_epochs=0 trains nothing; .* method=none"),
        ({"max_steps": 0}, r"trainer\.max_steps=0 trains nothing"),
        ({"limit_train_batches": 0}, r"trainer\.limit_train_batches=0 trains nothing"),
        ({"limit_train_batches": 0.0}, r"trainer\.limit_train_batches=0\.0 trains nothing"),
        ({"limit_train_batches": 0.1}, r"limit_train_batches=0\.1 of 5 batches is less than one; use at least 0\.2"),
        ({"limit_val_batches": 0.1}, r"limit_val_batches=0\.1 of 2 batches is less than one"),
        ({"max_epochs": -1}, r"trainer\.max_epochs=-1 trains without end; give trainer\.max_steps"),
        ({"accumulate_grad_batches": 0}, r"trainer\.accumulate_grad_batches=0 is not allowed; allowed: at least 1"),
        ({"accumulate_grad_batches": -1}, r"trainer\.accumulate_grad_batches=-1 is not allowed"),
        ({"gradient_clip_val": -0.5}, r"trainer\.gradient_clip_val=-0\.5 is not allowed; allowed: at least 0"),
        ({"val_check_interval": 6}, r"val_check_interval=6 is not a number of batches .* has 5; use 1 to 5"),
        ({"val_check_interval": 0}, r"val_check_interval=0 is not a number of batches"),
        ({"val_check_interval": 3, "limit_train_batches": 2}, r"val_check_interval=3 .* has 2"),
    ],
)
def test_a_training_without_a_step_or_an_end_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": -1, "max_steps": 3},
        {"max_epochs": None, "max_steps": 3},
        {"max_epochs": None},  # Lightning's 1000 epochs
        {"limit_train_batches": 0.2},
        {"val_check_interval": 5},
        {"val_check_interval": 0.01},
        {"val_check_interval": 6, "check_val_every_n_epoch": None},
        {"val_check_interval": 6, "limit_val_batches": 0},
        {"val_check_interval": "00:01:00:00"},
        {"overfit_batches": 1},
        {"fast_dev_run": True},
    ],
)
def test_every_other_training_is_left_to_lightning(settings):
    check(**settings)


def test_the_best_adapter_and_the_validation_loss_need_a_validation():
    check(limit_val_batches=0)
    with pytest.raises(ValueError, match=r"fit\.keep=best needs a validation, and trainer\.limit_val_batches=0 leaves"):
        check(Fit(keep="best"), limit_val_batches=0)
    with pytest.raises(ValueError, match="objective=validation/loss needs a validation"):
        check(measure_validation=True, limit_val_batches=0)
