"""One run: score, allocate, fine-tune, evaluate, record."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch import nn

from layerif.callback import InfluenceCallback
from layerif.config import check
from layerif.data.batches import output_text, prompt_text
from layerif.data.task import Splits
from layerif.decide import Decider, Decision
from layerif.evaluate import Evaluation
from layerif.models import layer_map
from layerif.modules import TaskDataModule
from layerif.record import FILE, RunRecord
from layerif.report import print_run
from layerif.store import Store

log = logging.getLogger(__name__)

# What may differ between two runs that are the same job.
_INCIDENTAL = ("dry_run", "rerun", "outputs", "store", "name", "logger")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """keep: evaluate the `last` adapter or the `best` on the validation loss.

    patience: stop after so many validations without improvement (None: never). checkpoint_steps: also save every so
    many optimiser steps, for long epochs (None: at the end of epochs).
    """

    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    checkpoint_steps: int | None = None


def run(config: DictConfig) -> None:
    """Run one composed configuration in Hydra's folder, unless that folder holds its record already."""
    check(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    job = _job(config)
    if not config.rerun and not config.dry_run and _is_finished(folder, job):
        log.info("already done, nothing to run again (rerun=true would): %s", folder / FILE)
        return
    L.seed_everything(config.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not sys.stderr.isatty():  # a log file wants no bars
        transformers.utils.logging.disable_progress_bar()
    parts = _Parts(config)
    if config.dry_run:
        _preview(parts)
        return
    record = RunRecord(name=config.name, seed=config.seed, config=job, overrides=list(HydraConfig.get().overrides.task))
    with _noting_warnings(record.notes):
        _execute(parts, record, folder)
    record.memory_gb = _peak_memory()
    file = record.write(folder)
    print_run(record, folder)
    log.info("record: %s", file)


class _Parts:
    """The objects a configuration names. Cheap: no weights are loaded here."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.model = instantiate(config.model)
        self.task = instantiate(config.task)
        self.evaluation: Evaluation = instantiate(config.evaluation, _convert_="all")
        self.fit: Fit = instantiate(config.fit)
        self.tokenizer = self.model.tokenizer()
        self.splits: Splits = self.task.load()
        self.decider = Decider(
            model=self.model,
            tokenizer=self.tokenizer,
            splits=self.splits,
            probe=instantiate(config.probe),
            estimator=instantiate(config.estimator),
            allocator=instantiate(config.allocator),
            store=Store(Path(config.store)),
            seed=config.seed,
            device=_device(),
        )
        if config.method:
            self._check_kind(get_class(config.method["_target_"]).allocates)  # type: ignore[attr-defined]

    def _check_kind(self, wanted: str) -> None:
        """A method that builds experts cannot spend ranks: said before anything is measured."""
        given = self.decider.rehearse(layer_map(self.model.skeleton(), scope="all")).kind
        if given != wanted:
            raise ValueError(
                f"the allocator gives {given}, the method {self.config.method['_target_']} spends {wanted}; "
                f"use allocator={wanted}, or method=none for scores and allocation only"
            )

    def module(self) -> Any:
        method = OmegaConf.to_container(self.config.method, resolve=True)
        assert isinstance(method, dict)
        return instantiate(method)

    def datamodule(self) -> TaskDataModule:
        return instantiate(self.config.data)(self.splits, self.tokenizer)


def _preview(parts: _Parts) -> None:
    """Everything that can be said without weights: the sizes, one sample, and whether the budget can be met."""
    config, splits, template = parts.config, parts.splits, parts.task.template
    skeleton = parts.model.skeleton()
    layers, everything = layer_map(skeleton, scope=config.probe.scope), layer_map(skeleton, scope="all")
    train, validation = parts.decider.samples()
    allocation = parts.decider.rehearse(everything)
    example = splits.train[0]
    lines = {
        "model": f"{type(parts.model).__name__.lower()}, {len(layers.names)} layers of {sum(everything.numel):,} "
        "parameters together",
        "task": f"{parts.task.name}: {len(splits.train)} train, {len(splits.validation)} validation, "
        f"{len(splits.test)} test rows",
        "probe": f"{sum(map(len, layers.params))} matrices ({config.probe.scope}), {sum(layers.numel):,} parameters; "
        f"{len(train)} + {len(validation)} samples, {sum(map(len, (*train, *validation))):,} tokens, "
        f"{train.num_truncated + validation.num_truncated} samples cut at {config.probe.max_length} tokens",
        "allocation": f"{allocation.kind}, budget {allocation.budget} over {len(layers.names)} layers; "
        f"equal scores would give {list(allocation.values)}",
    }
    if config.method:
        parts.module()  # its settings are checked, nothing is loaded
        data = parts.datamodule()
        lines["fit"] = (
            f"{len(data.train)} samples in batches of {data.batch_size}, "
            f"{data.num_truncated} samples cut at {config.data.max_length} tokens"
        )
    lines["first sample"] = repr(prompt_text(example, template) + output_text(example.output, template))
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {line}" for name, line in lines.items()))
    print("dry run: everything above is valid, nothing was computed")


def _execute(parts: _Parts, record: RunRecord, folder: Path) -> None:
    if parts.splits.num_dropped:
        record.notes.append(f"{parts.splits.num_dropped} rows dropped from train and validation: test repeats them")
    if not parts.config.method:
        loaded: list[nn.Module] = []

        def load() -> nn.Module:
            loaded[:] = loaded or [parts.model.load().to(_device())]
            return loaded[0]

        _keep(parts.decider(load), record)
        if parts.evaluation.before:
            _evaluate(load(), parts, record, "before/")
        return

    module, datamodule = parts.module(), parts.datamodule()
    callback = InfluenceCallback(parts.decider)
    checkpoints = folder / "checkpoints"
    trainer = _trainer(parts, callback, folder, checkpoints)
    if parts.evaluation.before:
        _evaluate(module.base_model().to(_device()), parts, record, "before/")
    start = time.perf_counter()
    trainer.ckpt_path = _unfinished(checkpoints, record)
    trainer.fit(module, datamodule=datamodule)
    if trainer.interrupted:
        raise KeyboardInterrupt
    assert callback.decision is not None
    _keep(callback.decision, record)
    record.seconds["fit"] = time.perf_counter() - start - callback.seconds
    if datamodule.num_truncated:
        record.notes.append(
            f"{datamodule.num_truncated} of {len(datamodule.train)} training samples cut at data.max_length"
        )
    if parts.fit.keep == "best":
        module.on_load_checkpoint(torch.load(checkpoints / "best.ckpt", map_location="cpu", weights_only=True))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.model.parameters()]
    record.parameters = {
        "total": sum(numel for numel, _ in sizes),
        "trainable": sum(numel for numel, is_trained in sizes if is_trained),
    }
    module.model.save_pretrained(folder / "adapter")
    _evaluate(module.model.to(_device()), parts, record, "")
    shutil.rmtree(checkpoints)  # the adapter and the record say it all; checkpoints were for a run that is killed


def _keep(decision: Decision, record: RunRecord) -> None:
    record.layers = list(decision.scores.layers)
    record.scores = list(decision.scores.values)
    record.higher_means, record.source = decision.scores.higher_means, decision.scores.source
    record.fingerprint = decision.scores.fingerprint
    record.reliability = decision.reliability
    record.allocation = decision.allocation.to_dict()
    record.seconds |= decision.seconds
    if decision.reused:
        record.notes.append("scores from the store: this model and task were measured before")
    if decision.num_truncated:
        record.notes.append(
            f"{decision.num_truncated} of {sum(decision.num_samples)} probed samples cut at probe.max_length"
        )


def _evaluate(model: nn.Module, parts: _Parts, record: RunRecord, prefix: str) -> None:
    start = time.perf_counter()
    result = parts.evaluation.run(model, parts.tokenizer, parts.splits.test, parts.task)  # type: ignore[arg-type]
    record.metrics |= {f"{prefix}{name}": value for name, value in result.metrics.items()}
    record.questions |= {
        f"{prefix}{metric}": {answer.id: answer.correct for answer in answers}
        for metric, answers in result.answers.items()
    }
    record.seconds[f"{prefix}evaluate"] = time.perf_counter() - start


def _trainer(parts: _Parts, callback: InfluenceCallback, folder: Path, checkpoints: Path) -> L.Trainer:
    saved = partial(ModelCheckpoint, checkpoints, enable_version_counter=False, save_top_k=1)
    callbacks: list[Callback] = [callback, saved(filename="last", every_n_train_steps=parts.fit.checkpoint_steps)]
    if parts.fit.keep == "best":
        callbacks.append(saved(filename="best", monitor="validation/loss"))
    if parts.fit.patience is not None:
        callbacks.append(EarlyStopping("validation/loss", patience=parts.fit.patience))
    return instantiate(
        parts.config.trainer,
        callbacks=callbacks,
        logger=instantiate(parts.config.logger) if parts.config.logger else False,
        default_root_dir=str(folder),
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _unfinished(checkpoints: Path, record: RunRecord) -> str | None:
    """The checkpoint of a killed run of the same job in this folder; one of another job is removed."""
    last, job = checkpoints / "last.ckpt", checkpoints / "job.json"
    wanted = json.dumps(record.config, sort_keys=True)
    if last.exists() and job.exists() and job.read_text() == wanted:
        record.notes.append("resumed from the checkpoint of a run that did not finish")
        log.info("resuming from %s", last)
        return str(last)
    shutil.rmtree(checkpoints, ignore_errors=True)
    checkpoints.mkdir(parents=True)
    job.write_text(wanted)
    return None


def _job(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration less what does not change the result."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in _INCIDENTAL}


def _is_finished(folder: Path, job: Mapping[str, Any]) -> bool:
    if not (folder / FILE).exists():
        return False
    try:
        return RunRecord.read(folder).config == json.loads(json.dumps(job))
    except ValueError as error:
        log.warning("%s; the job runs again", error)
        return False


@contextmanager
def _noting_warnings(notes: list[str]) -> Iterator[None]:
    """Warnings are shown as ever; those of layerif are also kept for the record."""
    show = warnings.showwarning

    def note_and_show(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if Path(__file__).parent in Path(filename).parents and str(message) not in notes:
            notes.append(str(message))
        show(message, category, filename, *rest)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")  # about workers and logging steps: nothing to act on
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
        warnings.showwarning = note_and_show
        yield


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peak_memory() -> float:
    """Gigabytes this process ever held in main memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
