"""Fine-tuning: the trainer's callbacks, the choice of the weights to keep, and carrying on after a killed run."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from layerif.adapt.callback import InfluenceCallback
from layerif.adapt.data import TaskDataModule
from layerif.adapt.module import AdapterModule
from layerif.adapt.progress import TrainingCurves
from layerif.adapt.resume import BEST, LAST, WholeCheckpoints, readable_checkpoint
from layerif.checks import Count, check_fields
from layerif.compat import validates_now
from layerif.files import claim_folder, full_disk_explained, whole
from layerif.models.quantised import num_unpacked
from layerif.record.record import RunRecord

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # a folder below the run's; the run removes it once it has written its record


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings that say how long to train and which adapter to keep.

    Attributes:
        keep: the `last` adapter is kept and evaluated, or the one with the `best` validation loss.
        patience: the number of validations without improvement after which training stops; None: it never stops early.
        checkpoint_steps: the number of optimiser steps between checkpoints; None: one at the end of every epoch.
    """

    keep: Literal["last", "best"] = "last"
    patience: Count | None = None
    checkpoint_steps: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self, "fit")

    def callbacks(self, checkpoints: Path) -> list[Callback]:
        """Makes the trainer's callbacks that stop early and save.

        `last` is saved after everything that a validation changes, so that a resumed run knows of the best so far.
        """
        found: list[Callback] = []
        if self.patience is not None:
            found.append(EarlyStopping("validation/loss", patience=self.patience, check_on_train_epoch_end=False))
        saved = partial(ModelCheckpoint, checkpoints, enable_version_counter=False, save_top_k=1)
        if self.keep == "best":
            found.append(saved(filename=Path(BEST).stem, monitor="validation/loss", save_on_train_epoch_end=False))
        if self.checkpoint_steps is None:
            return [*found, saved(filename=Path(LAST).stem)]
        every = self.checkpoint_steps
        name = Path(LAST).stem
        return [*found, StepCheckpoint(checkpoints, name, every_n_train_steps=every, enable_version_counter=False)]


def train(
    module: AdapterModule,
    data: TaskDataModule,
    influence: InfluenceCallback,
    fit: Fit,
    make_trainer: Callable[[list[Callback]], L.Trainer],
    record: RunRecord,
    folder: Path,
    *,
    measure_validation: bool = False,
) -> Any:
    """Fine-tunes the adapter or the layers, and carries on where a killed run of the same job stopped in this folder.

    Args:
        module: made, not yet fitted.
        data: the task's batches.
        influence: decides the allocation where the module has none.
        fit: which adapter to keep.
        make_trainer: makes the trainer with these callbacks.
        record: gets seconds, the cost of training, parameters and notes.
        folder: the run's; the adapter or the model is written into it.
        measure_validation: puts the validation loss of the kept adapter into the record.

    Returns:
        The fine-tuned model on the trainer's device.
    """
    checkpoints = folder / CHECKPOINTS
    curves = TrainingCurves(checkpoints / "curves.jsonl")
    trainer = make_trainer([influence, curves, *fit.callbacks(checkpoints)])
    start = time.perf_counter()
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # another one is the user's
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    trainer.ckpt_path = _unfinished(checkpoints, record)
    run_trainer(trainer, module, data)
    if trainer.global_step == 0:
        raise ValueError(
            f"training ended before its first step; is there a limit of time among trainer's settings? {_UNTRAINED}"
        )
    record.training = curves.cost()
    record.seconds["fit"] = curves.seconds_before + time.perf_counter() - start - influence.seconds
    for part, encodings in (("training", data.train), ("validation", data.validation)):
        if encodings.num_truncated:
            record.notes.append(f"{encodings.num_truncated} of {len(encodings)} {part} samples cut at data.max_length")
    if fit.keep == "best":
        _load_best(module, checkpoints / BEST)
    assert module.model is not None
    record.ranks = module.tuning.finished(module.model)
    if measure_validation:
        record.metrics["validation/loss"] = _validation_loss(trainer, module, data)
    model: Any = module.model
    record.parameters = {
        "total": num_unpacked(model),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        **module.compared,
    }
    if trainer.is_global_zero and module.tuning.is_written:
        _write(module, data, folder)
    return model.to(trainer.strategy.root_device)


def _write(module: AdapterModule, data: TaskDataModule, folder: Path) -> None:
    name = module.tuning.leaves
    advice = "free some space and give the same command again, which carries on after the last step"
    with full_disk_explained(f"the {name} to {folder / name}", advice):
        # A killed run may have left some; PEFT would take up its model card.
        for left in (folder / name, *folder.glob(f".{name}.*")):
            shutil.rmtree(left, ignore_errors=True)
        with whole(folder / name) as unfinished:
            assert module.model is not None
            module.tuning.write(module.model, data.tokenizer, unfinished)


def check_training(trainer: L.Trainer, data: TaskDataModule, fit: Fit, *, measure_validation: bool = False) -> None:
    """Refuses a training without a step or without an end, and validations that cannot be, before any work.

    Args:
        trainer: with the settings of the one that `train` will make.
        data: the task's batches.
        fit: which adapter to keep.
        measure_validation: the validation loss of the kept adapter is asked for.

    Raises:
        ValueError: names the setting.
    """
    data.trainer = trainer
    if trainer.max_epochs == trainer.max_steps == -1:
        raise ValueError("trainer.max_epochs=-1 trains without end; give trainer.max_steps, or a number of epochs")
    for setting in ("max_epochs", "max_steps"):
        if getattr(trainer, setting) == 0:
            raise ValueError(f"trainer.{setting}=0 trains nothing; {_UNTRAINED}")
    for setting, least in (("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
        value = getattr(trainer, setting)
        if value is not None and value < least:  # less than a batch would turn the gradient round
            raise ValueError(f"trainer.{setting}={value} is not allowed; allowed: at least {least}")
    num_batches = _num_batches(trainer, "train", len(data.train_dataloader()))
    if num_batches == 0:
        raise ValueError(f"trainer.limit_train_batches={trainer.limit_train_batches} trains nothing; {_UNTRAINED}")
    num_validated = _num_batches(trainer, "val", len(data.val_dataloader()))
    if num_validated == 0:
        if fit.keep == "best" or measure_validation:
            asked = "fit.keep=best" if fit.keep == "best" else "objective=validation/loss"
            raise ValueError(
                f"{asked} needs a validation, and trainer.limit_val_batches={trainer.limit_val_batches} leaves none; "
                "use trainer.limit_val_batches=1.0"
            )
        return
    # Between two validations; a share of an epoch is a float and always fits.
    interval = getattr(trainer, "val_check_interval", None)
    most = num_batches if trainer.check_val_every_n_epoch is not None else math.inf
    if isinstance(interval, int) and not 1 <= interval <= most:
        raise ValueError(
            f"trainer.val_check_interval={interval} is not a number of batches of an epoch, which has {num_batches}; "
            f"use 1 to {num_batches}, a share such as 1.0 (the end of the epoch), or trainer.limit_val_batches=0 for "
            "no validation"
        )


_UNTRAINED = "give at least 1, or use method=none with evaluation.before=true for the model as it is"


def _num_batches(trainer: L.Trainer, part: Literal["train", "val"], available: int) -> int:
    """Counts the batches of an epoch, as Lightning limits them: by a number, or by a share.

    Raises:
        ValueError: the share is less than one batch.
    """
    limit = getattr(trainer, f"limit_{part}_batches")
    if isinstance(limit, int):
        return min(limit, available)
    if 0 < limit * available < 1:
        raise ValueError(
            f"trainer.limit_{part}_batches={limit} of {available} batches is less than one; use at least "
            f"{1 / available:.2g}, or a whole number of batches"
        )
    return int(limit * available)


def run_trainer(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule | None = None) -> None:
    """Runs `trainer.fit`, and turns its exit on Ctrl-C into the usual KeyboardInterrupt."""
    try:
        trainer.fit(module, datamodule=data, weights_only=True)
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


class StepCheckpoint(ModelCheckpoint):
    """Saves after a number of steps, and after the validation where one follows the step.

    Lightning would skip that validation if it resumed from a checkpoint of the end of the batch.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if not validates_now(trainer):
            super().on_train_batch_end(trainer, *rest)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_batch_end(trainer, pl_module, None, None, 0)


def _load_best(module: AdapterModule, file: Path) -> None:
    if not file.exists():
        raise ValueError(
            "fit.keep=best found no validation to choose by: training ended before the first; raise "
            "trainer.max_steps, lower trainer.val_check_interval, or use fit.keep=last"
        )
    module.on_load_checkpoint(torch.load(file, map_location="cpu", weights_only=True))


def _validation_loss(trainer: L.Trainer, module: AdapterModule, data: TaskDataModule) -> float:
    found = trainer.validate(module, datamodule=data, verbose=False)
    if not found:
        raise ValueError("objective=validation/loss found no validation rows; set trainer.limit_val_batches=1.0")
    return found[0]["validation/loss"]


def _unfinished(checkpoints: Path, record: RunRecord) -> str | None:
    """Returns the checkpoint of a killed run of the same job in this folder; None where there is none.

    All processes of a run get the same answer, because none trains before all have asked.
    """
    last = readable_checkpoint(checkpoints) if claim_folder(checkpoints, record.identity) else None
    if last is not None:
        record.notes.append("resumed from the checkpoint of a run that did not finish")
        log.info("resuming from %s", last)
        return str(last)
    return None
