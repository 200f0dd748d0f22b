"""One run: score, allocate, fine-tune, evaluate, record."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
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
from layerif.models import hash_file, hash_folder, layer_map
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

    patience: stop after so many validations without improvement (None: never). checkpoint_steps: save for a killed run
    every so many optimiser steps (None: at the end of every epoch).
    """

    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    checkpoint_steps: int | None = None


def run(config: DictConfig) -> None:
    """Run one composed configuration in Hydra's folder, unless that folder holds its record already."""
    check(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    L.seed_everything(config.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not sys.stderr.isatty():  # a log file wants no bars
        transformers.utils.logging.disable_progress_bar()
    parts = _Parts(config)
    if config.dry_run:
        _preview(parts, folder)
        return
    record = RunRecord(
        name=config.name,
        seed=config.seed,
        config=_job(config),
        overrides=list(HydraConfig.get().overrides.task),
        inputs=parts.inputs(),
    )
    if not config.rerun and _is_finished(folder, record):
        log.info("already done, nothing to run again (rerun=true would): %s", folder / FILE)
        return
    try:
        with _noting_warnings(record.notes):
            _execute(parts, record, folder)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command with hydra.run.dir='{folder}' carries on", file=sys.stderr)
        sys.exit(130)
    record.memory_gb = _peak_memory()
    file = record.write(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # they were for a run killed before its record stood
    print_run(record, folder)
    log.info("record: %s", file)


class _Parts:
    """The objects a configuration names, checked against one another.

    No weights are loaded here, save that the embedded model is converted the first time it is asked for anything.
    """

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
            device=self.trainer([], Path()).strategy.root_device,
        )
        given = self.decider.rehearse(self.decider.layers()).kind
        wanted = get_class(config.method["_target_"]).allocates if config.method else given  # type: ignore[attr-defined]
        if given != wanted:
            raise ValueError(
                f"the allocator gives {given}, the method {config.method['_target_']} spends {wanted}; "
                f"use allocator={wanted}, or method=none for scores and allocation only"
            )
        if config.method or self.evaluation.before:
            positions = getattr(self.model.skeleton().config, "max_position_embeddings", None)
            self.evaluation.check(self.tokenizer, self.splits.test, self.task, positions)

    def inputs(self) -> dict[str, str]:
        """What the configuration only names: a job is the same if the content is, too."""
        rows = json.dumps(asdict(self.splits), sort_keys=True)
        hashes = {"rows": hashlib.sha256(rows.encode()).hexdigest(), **self.model.fingerprint()}
        for part in ("estimator", "allocator"):
            if path := getattr(getattr(self.decider, part), "path", None):
                hashes[part] = hash_file(Path(path))
        for checkpoint in getattr(self.decider.estimator, "checkpoints", ()):
            hashes[checkpoint] = hash_folder(Path(checkpoint))
        return hashes

    def module(self) -> Any:
        method = OmegaConf.to_container(self.config.method, resolve=True)
        assert isinstance(method, dict)
        return instantiate(method)

    def datamodule(self) -> TaskDataModule:
        return instantiate(self.config.data)(self.splits, self.tokenizer)

    def trainer(self, callbacks: list[Callback], folder: Path) -> L.Trainer:
        try:
            return instantiate(
                self.config.trainer,
                callbacks=callbacks,
                logger=instantiate(self.config.logger) if self.config.logger and callbacks else False,
                default_root_dir=str(folder),
                enable_model_summary=False,
                enable_checkpointing=bool(callbacks),
                num_sanity_val_steps=0,
            )
        except InstantiationException as error:
            raise ValueError(f"trainer: {error.__cause__ or error}") from error


def _preview(parts: _Parts, folder: Path) -> None:
    """Everything that can be said without weights: the sizes, one sample, and whether the budget can be met."""
    config, splits, template = parts.config, parts.splits, parts.task.template
    skeleton = parts.model.skeleton()
    layers, everything = layer_map(skeleton, scope=config.probe.scope), parts.decider.layers()
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
    parts.trainer(_callbacks(parts, folder / "checkpoints"), folder)  # its settings are checked, as are the module's
    if config.method:
        parts.module()
        data = parts.datamodule()
        lines["fit"] = (
            f"{len(data.train)} samples in batches of {data.batch_size}, "
            f"{data.train.num_truncated} samples cut at {config.data.max_length} tokens"
        )
    lines["first sample"] = repr(prompt_text(example, template) + output_text(example.output, template))
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {line}" for name, line in lines.items()))
    print("dry run: everything above is valid, nothing was measured or trained")


def _execute(parts: _Parts, record: RunRecord, folder: Path) -> None:
    if parts.splits.num_dropped:
        record.notes.append(f"{parts.splits.num_dropped} rows dropped from train and validation: repeated")
    if parts.config.method:
        _fit(parts, record, folder)
    else:
        _score(parts, record, parts.decider.device)


def _score(parts: _Parts, record: RunRecord, device: torch.device | str) -> None:
    """Scores and allocation, and if asked the accuracy of the untouched model."""
    loaded: list[nn.Module] = []

    def load() -> nn.Module:
        loaded[:] = loaded or [parts.model.load().to(device)]
        return loaded[0]

    _keep(parts.decider(load), parts, record)
    if parts.evaluation.before:
        _evaluate(load(), parts, record, "before/")


def _fit(parts: _Parts, record: RunRecord, folder: Path) -> None:
    """Scores, allocation, fine-tuning, evaluation."""
    module, data = parts.module(), parts.datamodule()
    influence = InfluenceCallback(parts.decider)
    checkpoints = folder / "checkpoints"
    trainer = parts.trainer([influence, *_callbacks(parts, checkpoints)], folder)
    device = trainer.strategy.root_device
    if parts.evaluation.before:
        _evaluate(module.base_model().to(device), parts, record, "before/")
    start = time.perf_counter()
    trainer.ckpt_path = _unfinished(checkpoints, record)
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit:  # how Lightning leaves on Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    assert influence.decision is not None
    _keep(influence.decision, parts, record)
    record.seconds["fit"] = time.perf_counter() - start - influence.seconds
    for part, encodings in (("training", data.train), ("validation", data.validation)):
        if encodings.num_truncated:
            record.notes.append(f"{encodings.num_truncated} of {len(encodings)} {part} samples cut at data.max_length")
    if parts.fit.keep == "best":
        best = checkpoints / "best.ckpt"
        if not best.exists():
            raise ValueError(
                "fit.keep=best found no validation to choose by: training ended before the first; raise "
                "trainer.max_steps, lower trainer.val_check_interval, or use fit.keep=last"
            )
        module.on_load_checkpoint(torch.load(best, map_location="cpu", weights_only=True))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.model.parameters()]
    record.parameters = {
        "total": sum(numel for numel, _ in sizes),
        "trainable": sum(numel for numel, is_trained in sizes if is_trained),
    }
    module.model.save_pretrained(folder / "adapter")
    _evaluate(module.model.to(device), parts, record, "")


def _keep(decision: Decision, parts: _Parts, record: RunRecord) -> None:
    record.layers = list(decision.allocation.layers)
    record.allocation = decision.allocation.to_dict()
    record.seconds |= decision.seconds
    if decision.scores is None:
        record.source = f"file({parts.config.allocator.path})"
        return
    record.scores = list(decision.scores.values)
    record.higher_means, record.source = decision.scores.higher_means, decision.scores.source
    record.fingerprint = decision.scores.fingerprint
    record.reliability = decision.reliability
    if decision.reused:
        record.notes.append("scores from the store: this model and task were measured before")
    if decision.num_truncated:
        record.notes.append(
            f"{decision.num_truncated} of {sum(decision.num_samples)} probed samples cut at probe.max_length"
        )
    for part, num in zip(("train", "validation"), decision.num_samples, strict=True):
        record.samples[part] = num
        asked = parts.config.probe[f"num_{part}"]
        if 0 < num < asked:
            record.notes.append(f"probe.num_{part}={asked} asked for, the task has {num}")


def _evaluate(model: nn.Module, parts: _Parts, record: RunRecord, prefix: str) -> None:
    start = time.perf_counter()
    result = parts.evaluation.run(model, parts.tokenizer, parts.splits.test, parts.task)  # type: ignore[arg-type]
    record.metrics |= {f"{prefix}{name}": value for name, value in result.metrics.items()}
    record.questions |= {
        f"{prefix}{metric}": {answer.id: answer.correct for answer in answers}
        for metric, answers in result.answers.items()
    }
    record.seconds[f"{prefix}evaluate"] = time.perf_counter() - start


def _callbacks(parts: _Parts, checkpoints: Path) -> list[Callback]:
    saved = partial(ModelCheckpoint, checkpoints, enable_version_counter=False, save_top_k=1)
    callbacks: list[Callback] = [saved(filename="last", every_n_train_steps=parts.fit.checkpoint_steps)]
    if parts.fit.keep == "best":
        callbacks.append(saved(filename="best", monitor="validation/loss"))
    if parts.fit.patience is not None:
        callbacks.append(EarlyStopping("validation/loss", patience=parts.fit.patience))
    return callbacks


def _unfinished(checkpoints: Path, record: RunRecord) -> str | None:
    """The checkpoint of a killed run of the same job in this folder; one of another job is removed."""
    last, job = checkpoints / "last.ckpt", checkpoints / "job.json"
    wanted = json.dumps([record.config, record.inputs], sort_keys=True)
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


def _is_finished(folder: Path, record: RunRecord) -> bool:
    if not (folder / FILE).exists():
        return False
    try:
        done = RunRecord.read(folder)
    except ValueError as error:
        log.warning("%s; the job runs again", error)
        return False
    return (done.config, done.inputs) == (json.loads(json.dumps(record.config)), record.inputs)


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


def _peak_memory() -> float:
    """Gigabytes this process ever held in main memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
