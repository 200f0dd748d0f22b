"""Fine-tuning: the trainer's callbacks, what is kept, and how a killed run carries on."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from layerif.adapt.callback import InfluenceCallback
from layerif.adapt.module import AdapterModule
from layerif.adapt.progress import Curves
from layerif.app.setup import Parts
from layerif.files import claim_folder
from layerif.record.record import RunRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """keep: evaluate the `last` adapter or the `best` on the validation loss.

    patience: stop after so many validations without improvement (None: never). checkpoint_steps: save for a killed run
    every so many optimiser steps (None: at the end of every epoch).
    """

    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("patience", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"fit.{name}={value} must be at least 1, or null")


def train(parts: Parts, module: AdapterModule, influence: InfluenceCallback, record: RunRecord, folder: Path) -> Any:
    """The fine-tuned model on the trainer's device; its adapter is in `folder`."""
    kept: Fit = instantiate(parts.config.fit)
    data = parts.datamodule()
    checkpoints = folder / "checkpoints"
    curves = Curves(checkpoints / "curves.jsonl")
    trainer = parts.trainer([influence, curves, *callbacks(kept, checkpoints)], folder)
    start = time.perf_counter()
    trainer.ckpt_path = _unfinished(checkpoints, record)
    run_trainer(trainer, module, data)
    record.seconds["fit"] = curves.seconds_before + time.perf_counter() - start - influence.seconds
    for part, encodings in (("training", data.train), ("validation", data.validation)):
        if encodings.num_truncated:
            record.notes.append(f"{encodings.num_truncated} of {len(encodings)} {part} samples cut at data.max_length")
    if kept.keep == "best":
        best = checkpoints / "best.ckpt"
        if not best.exists():
            raise ValueError(
                "fit.keep=best found no validation to choose by: training ended before the first; raise "
                "trainer.max_steps, lower trainer.val_check_interval, or use fit.keep=last"
            )
        module.on_load_checkpoint(torch.load(best, map_location="cpu", weights_only=True))
    if parts.config.get("objective") == "validation/loss":
        found = trainer.validate(module, datamodule=data, verbose=False)
        if not found:
            raise ValueError("objective=validation/loss found no validation rows; set trainer.limit_val_batches=1.0")
        record.metrics["validation/loss"] = found[0]["validation/loss"]
    model: Any = module.model
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    record.parameters = {
        "total": sum(numel for numel, _ in sizes),
        "trainable": sum(numel for numel, is_trained in sizes if is_trained),
        **module.compared,
    }
    if trainer.is_global_zero:
        model.save_pretrained(folder / "adapter")
    return model.to(trainer.strategy.root_device)


def run_trainer(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule | None = None) -> None:
    """`trainer.fit`, leaving on Ctrl-C by KeyboardInterrupt like everything else."""
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def callbacks(kept: Fit, checkpoints: Path) -> list[Callback]:
    """`last` is saved after all that a validation changes: a run resumed from it knows of the best so far."""
    found: list[Callback] = []
    if kept.patience is not None:
        found.append(EarlyStopping("validation/loss", patience=kept.patience, check_on_train_epoch_end=False))
    saved = partial(ModelCheckpoint, checkpoints, enable_version_counter=False, save_top_k=1)
    if kept.keep == "best":
        found.append(saved(filename="best", monitor="validation/loss", save_on_train_epoch_end=False))
    if kept.checkpoint_steps is None:
        return [*found, saved(filename="last")]
    last = StepCheckpoint(checkpoints, "last", every_n_train_steps=kept.checkpoint_steps, enable_version_counter=False)
    return [*found, last]


class StepCheckpoint(ModelCheckpoint):
    """Saves every so many steps; where a validation follows the step, after it.

    From a checkpoint of the end of a batch Lightning carries on behind the validation that was due then.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        loop = trainer.fit_loop
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            super().on_train_batch_end(trainer, *rest)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_batch_end(trainer, pl_module, None, None, 0)


def _unfinished(checkpoints: Path, record: RunRecord) -> str | None:
    """The checkpoint of a killed run of the same job in this folder.

    The same for all processes of a run: none trains before all have found out.
    """
    last = checkpoints / "last.ckpt"
    if claim_folder(checkpoints, record.identity) and last.exists():
        record.notes.append("resumed from the checkpoint of a run that did not finish")
        if "wandb" in record.tracking:
            record.notes.append("wandb has this run anew, from its first step, beside the one that did not finish")
        log.info("resuming from %s", last)
        return str(last)
    return None
