"""The objects a configuration names."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf

from layerif.adapt.data import TaskDataModule
from layerif.data.task import Splits
from layerif.decide import Decider
from layerif.evaluate.evaluation import Evaluation
from layerif.files import conf_folder, hash_file
from layerif.models.blocks import context_length
from layerif.probe.store import Store


class Parts:
    """The objects a configuration names, checked against one another.

    No weights are loaded here, save that the embedded model is converted the first time it is asked for anything.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.model = instantiate(config.model)
        self.task = instantiate(config.task)
        self.evaluation: Evaluation = instantiate(config.evaluation, _convert_="all")
        instantiate(config.fit)  # checked by making it
        self.tokenizer = self.model.tokenizer()
        self.splits: Splits = self.task.load()
        score_task = instantiate(config.score_task) if config.score_task else None
        self.scored = score_task.load() if score_task else self.splits
        check_unseen(self.scored, self.splits)
        trainer = self.trainer([], Path())
        self.decider = Decider(
            model=self.model,
            tokenizer=self.tokenizer,
            splits=self.scored,
            probe=instantiate(config.probe),
            estimator=instantiate(config.estimator),
            allocator=instantiate(config.allocator),
            store=Store(Path(config.store)),
            seed=config.seed,
            device=trainer.strategy.root_device,
            spread=isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy),
            num_processes=trainer.world_size,
        )
        check_spent(config.method, self.decider.preview().kind)
        if config.method or self.evaluation.before:
            longest = context_length(self.model.skeleton())
            self.evaluation.check(self.tokenizer, self.splits.test, self.task, longest, score_task=score_task)

    def inputs(self) -> dict[str, str]:
        """What the configuration only names: a job is the same if the content is, too."""
        hashes = {"rows": self.splits.fingerprint, **self.model.inputs()}
        if self.scored is not self.splits:
            hashes["score_task"] = self.scored.fingerprint
        for setting in ("method.allocation", "method.calibration.text", "evaluation.text"):
            path = OmegaConf.select(self.config, setting)
            if isinstance(path, str) and Path(path).is_file():
                hashes[setting] = hash_file(Path(path))
        return hashes | self.decider.inputs()

    def method(self) -> Any:
        """A Lightning module to fit, something to call, or None (scores and allocation only)."""
        return instantiate(OmegaConf.to_container(self.config.method, resolve=True)) if self.config.method else None

    def datamodule(self) -> TaskDataModule:
        return instantiate(self.config.data)(self.splits, self.tokenizer)

    @cached_property
    def loggers(self) -> list[Logger]:
        """Every one the configuration names, the same for all trainers of the run."""
        return [instantiate(logger) for logger in self.config.logger.values()]

    def trainer(self, callbacks: list[Callback], folder: Path, **overrides: Any) -> L.Trainer:
        """overrides: settings of the trainer that a method fixes."""
        logger = self.loggers if callbacks else False
        try:
            return instantiate(
                self.config.trainer,
                callbacks=callbacks,
                logger=logger,
                default_root_dir=str(folder),
                enable_model_summary=False,
                enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
                num_sanity_val_steps=0,
                **overrides,
            )
        except InstantiationException as error:
            cpu = "; without a GPU use trainer=default" if self.config.trainer.get("accelerator") == "gpu" else ""
            raise ValueError(f"trainer: {error.__cause__ or error}{cpu}") from error


def check_spent(method: DictConfig | None, given: str) -> None:
    """Refuse a method that cannot spend what the allocator gives (experts, rank, sparsity)."""
    target = method["_target_"] if method else ""
    wanted = get_class(target).allocates if target else None  # type: ignore[attr-defined]
    if wanted in (None, given):
        return
    files = {file.stem: file for file in sorted((conf_folder() / "method").glob("*.yaml"))}
    targets = {name: str(OmegaConf.select(OmegaConf.load(file), "_target_") or "") for name, file in files.items()}
    name = next((name for name, each in targets.items() if each == target), target)
    able = [name for name, each in targets.items() if each and get_class(each).allocates == given]  # type: ignore[attr-defined]
    raise ValueError(
        f"the allocator gives {given}, method={name} spends {wanted}; use allocator={wanted}, or "
        f"{''.join(f'method={name}, ' for name in able)}or method=none for scores and allocation only"
    )


def check_unseen(scored: Splits, splits: Splits) -> None:
    """Refuse scores of rows that are evaluated on; within one task its own `load` does."""
    if scored is splits:
        return
    asked = {example.question for example in splits.test}
    seen = sum(example.question in asked for example in (*scored.train, *scored.validation))
    if seen:
        raise ValueError(
            f"{seen} train or validation rows of score_task ask what test rows of the task ask: scores would see what "
            "they are judged by; name another score_task, or null for the task's own rows"
        )
