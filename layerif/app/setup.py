"""The objects that a configuration names, made and checked against one another."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf

from layerif.adapt.data import TaskDataModule
from layerif.adapt.strategy import ShardedBase
from layerif.adapt.train import Fit
from layerif.app.methods import Method
from layerif.attribution.selection import Pool, Selection
from layerif.attribution.selection.all import AllRows
from layerif.data.batches import check_vocabulary
from layerif.data.task import AnyTask, Splits
from layerif.decide import Decider
from layerif.estimators._base import CurveEstimator, name_of
from layerif.evaluate.evaluation import Evaluation
from layerif.files import conf_folder, hash_file
from layerif.models.blocks import context_length
from layerif.models.configuration import Configuration
from layerif.models.memory import free_bytes
from layerif.models.pretrained import Pretrained
from layerif.probe.settings import Probe
from layerif.probe.store import Store
from layerif.scores import AllocationKind
from layerif.targets import allowed_target, build

# Strategies that divide the weights of a model among processes.
_DIVIDING = (ShardedBase, FSDPStrategy, ModelParallelStrategy)
# Settings that may be the path of a file. If the file's content changes, it is another job.
_FILES = (
    "method.allocation",
    "method.query",
    "method.index",
    "method.calibration.text",
    "estimator.calibration.text",
    "evaluation.text",
)


class Setup:
    """The objects that a configuration names, checked against one another.

    No weights are loaded here, except that the embedded model is converted the first time anything asks for it.

    Attributes:
        config: the composed configuration.
        model, task, method, evaluation, fit, selection: the objects of these keys.
        splits: the task's rows.
        scored: the rows that scores are measured on: those of `score_task`, or else the task's own.
        store: keeps the measurements.
        decider: scores the layers and allocates.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.model: Pretrained = self._build("model")
        self.task: AnyTask = self._build("task")
        self.method: Method = self._build("method")
        self.evaluation: Evaluation = self._build("evaluation")
        self.fit: Fit = self._build("fit")
        # A configuration that an earlier version left (`--config-path`) has no such key.
        self.selection: Selection = self._build("selection") if "selection" in config else AllRows()
        self.model.check()
        self.tokenizer = self.model.tokenizer()
        self.splits = self.task.load()
        if self.evaluation.metrics is None and self.method.further_metrics:
            by_default = self.evaluation.metrics_on(self.splits.test)
            metrics = (*by_default, *self.method.further_metrics)
            self.evaluation = replace(self.evaluation, metrics=metrics)
        score_task: AnyTask | None = self._build("score_task")
        self.scored = score_task.load() if score_task else self.splits
        check_unseen(self.scored, self.splits)
        num_embeddings = self.model.num_embeddings()
        for splits in {id(each): each for each in (self.splits, self.scored)}.values():
            for part in (splits.train, splits.validation, splits.test):
                check_vocabulary(part, num_embeddings)
        probe: Probe = self._build("probe")
        if probe.template is None and (score_task or self.task).template == "chat":
            probe = replace(probe, template="chat")
        self.store = Store(Path(config.store))
        trainer = self.trainer([], Path())
        self.decider = Decider(
            model=self.model,
            tokenizer=self.tokenizer,
            splits=self.scored,
            probe=probe,
            estimator=self._build("estimator"),
            allocator=self._build("allocator"),
            store=self.store,
            seed=config.seed,
            device=trainer.strategy.root_device,
            spread=isinstance(trainer.strategy, _DIVIDING),
            num_processes=trainer.world_size,
            skip=tuple(getattr(getattr(self.method, "pruner", None), "skip", ())),
        )
        check_parts(self.method, self.decider)
        check_spent(self.method, self.decider)
        if self.method.evaluates or self.evaluation.before:
            longest = context_length(self.model.skeleton())
            self.evaluation.check(self.tokenizer, self.splits.test, self.task, longest, score_task=score_task)

    def inputs(self) -> dict[str, str]:
        """Hashes the content that the configuration only names, because other content makes another job."""
        hashes = {"rows": self.splits.fingerprint, **self.model.inputs(), **self.decider.inputs()}
        if self.scored is not self.splits:
            hashes["score_task"] = self.scored.fingerprint
        if isinstance(other := getattr(self.method, "other", None), Pretrained):
            hashes |= {f"method.other.{name}": value for name, value in other.inputs().items()}
        for setting in _FILES:
            given = OmegaConf.select(self.config, setting)
            paths = [given] if isinstance(given, str) else list(given or ())
            found = [hash_file(Path(path)) for path in paths if Path(path).is_file()]
            if found:
                hashes[setting] = " ".join(found)
        return hashes

    @cached_property
    def datamodule(self) -> TaskDataModule:
        """The batches of the task for fine-tuning."""
        return self._build("data")(self.splits, self.tokenizer)

    @property
    def pool(self) -> Pool:
        """The train rows that a selection chooses from; test rows are out of its sight."""
        seen = replace(self.splits, test=())
        data = self.datamodule
        return Pool(replace(self.decider, splits=seen), data.train, data.template, data.max_length)

    def with_rows(self, rows: Sequence[int]) -> Setup:
        """Returns this setup with some of the train rows, in the task's order.

        Scores see these rows, too, unless they are of another task (`score_task`).

        Args:
            rows: their positions.
        """
        chosen = copy.copy(self)
        train = tuple(self.splits.train[row] for row in sorted(rows))
        chosen.splits = replace(self.splits, train=train)
        chosen.scored = chosen.splits if self.scored is self.splits else self.scored
        chosen.decider = replace(self.decider, splits=chosen.scored)
        vars(chosen).pop("datamodule", None)
        return chosen

    @property
    def free_for_training(self) -> int:
        """The bytes that are free for training on this process's device."""
        return free_bytes(self.decider.device)

    @cached_property
    def loggers(self) -> list[Logger]:
        """The loggers that the configuration names; all trainers of the run share them."""
        return list(self._build("logger").values())

    def trainer(self, callbacks: list[Callback], folder: Path, **overrides: Any) -> L.Trainer:
        """Makes a trainer that works in this folder.

        Args:
            callbacks: of the trainer. Without any, nothing is logged either.
            folder: the run's.
            **overrides: settings of the trainer that a method fixes.

        Raises:
            ValueError: Lightning refuses the settings.
        """
        logger = self.loggers if callbacks else False
        if self.config.trainer.get("strategy") == "fsdp":  # Lightning's own is FSDP 1, for GPUs alone
            overrides = {"strategy": ShardedBase(), **overrides}
        try:
            return self._build(
                "trainer",
                callbacks=callbacks,
                logger=logger,
                default_root_dir=str(folder),
                enable_model_summary=False,
                enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
                num_sanity_val_steps=0,
                **overrides,
            )
        except Exception as error:  # Lightning raises what it likes
            cpu = "; without a GPU use trainer=default" if self.config.trainer.get("accelerator") == "gpu" else ""
            raise ValueError(f"trainer: {error}{cpu}") from error

    def _build(self, key: str, **given: Any) -> Any:
        return built(self.config, key, **given)


class Outline(Setup):
    """The objects of a plan for the configuration of a model alone, which has neither weights nor a tokenizer.

    Samples are not read, because nothing can tell their tokens: there is no decider.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.model = self._build("model")
        self.method = self._build("method")
        if self.method.name != "plan":
            self.model.load()  # refuses
        self.model.check()
        self.task = self._build("task")
        self.splits = self.scored = self.task.load()
        self.selection, self.tokenizer = AllRows(), None
        self.store = Store(Path(config.store))

    def inputs(self) -> dict[str, str]:
        return {"rows": self.splits.fingerprint, **self.model.inputs()}


def setup_of(config: DictConfig) -> Setup:
    """Makes the objects of a configuration: those of a plan alone where the model is only a configuration."""
    return (Outline if isinstance(built(config, "model"), Configuration) else Setup)(config)


def built(config: DictConfig, key: str, **given: Any) -> Any:
    """Builds the object of a root key, None where it is null; arguments stand in place of its settings."""
    node = config[key]
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return build(plain, key, list(config.get("trusted_targets") or ()), **given)


# The allocators that spend scores or curves, by the kind of allocation that a method spends.
_SPENDERS = {
    "experts": {"scores": "experts", "curves": "knapsack"},
    "rank": {"scores": "rank", "curves": "knapsack"},
    "sparsity": {"scores": "sparsity", "curves": "knapsack"},
    "bits": {"scores": "bits", "curves": "knapsack"},
    "blocks": {"scores": "blocks", "curves": "blocks"},
    "layers": {"scores": "layers"},
}
_SCORED = "an estimator of scores, such as datainf"
_PRICED: Mapping[AllocationKind, str] = {
    "experts": "estimator=gain_curve",
    "rank": "estimator=gain_curve",
    "sparsity": "estimator=loss_curve",
    "bits": "estimator=bits_curve",
    "blocks": "estimator=skip_curve or angular",
}


def check_spent(method: Method, decider: Decider) -> None:
    """Refuses method, estimator and allocator that do not fit one another, and says which do.

    Args:
        method: spends one kind of allocation (experts, rank, sparsity, bits, blocks, layers), several, or any.
        decider: with an estimator of scores or of curves, and an allocator that spends either, or neither.
    """
    kinds = _kinds_spent(method)
    if not kinds:
        decider.preview()
        return
    estimator, spends = decider.estimator, decider.allocator.spends
    gives = "curves" if isinstance(estimator, CurveEstimator) else "scores"
    is_spent = not isinstance(estimator, CurveEstimator) or estimator.kind in kinds
    fitting = _spenders(kinds, gives) if is_spent else ""
    scored = f"{_SCORED}, with {_spenders(kinds, 'scores')}"
    priced = [_PRICED[kind] for kind in kinds if kind in _PRICED]
    if spends not in (gives, "either", "nothing"):
        told = [fitting or scored]
        if fitting and _spenders(kinds, spends) not in ("", fitting):
            told += priced if spends == "curves" else [_SCORED]
        raise ValueError(
            f"estimator={name_of(estimator)} gives {gives}, and this allocator spends {spends}; with "
            f"method={method.name} use {', or '.join(told)}"
        )
    if spends != "nothing" and not is_spent:
        assert isinstance(estimator, CurveEstimator)
        raise ValueError(
            f"estimator={name_of(estimator)} prices {estimator.kind}, and method={method.name} spends "
            f"{' or '.join(kinds)}; use {', or '.join([scored, *priced])}"
        )
    is_other = decider.allocator.spends == "either" and decider.allocator.kind not in kinds
    given = decider.allocator.kind if is_other else decider.preview().kind  # type: ignore[union-attr]
    if given in kinds:
        return
    methods = {file.stem: _method_class(file) for file in sorted((conf_folder() / "method").glob("*.yaml"))}
    able = [name for name, other in methods.items() if given in _kinds_spent(other)]
    fitting = fitting or f"{_spenders(kinds, 'scores')} with {_SCORED}"
    raise ValueError(
        f"the allocator gives {given}, and method={method.name} spends {' or '.join(kinds)}; use {fitting}, or "
        f"{''.join(f'method={name}, ' for name in able)}or method=none for scores and allocation only"
    )


def check_parts(method: Method, decider: Decider) -> None:
    """Refuses what cannot be divided where the trainer divides the weights of the model, and says what can.

    Args:
        method: one that works with parts of the model, or needs the whole.
        decider: with the model, which cannot be divided where it is quantised, and what the trainer does with it.
    """
    if decider.spread and (scheme := decider.model.quantisation):
        raise ValueError(
            "the strategy of the trainer divides weights among devices, and the model is quantised "
            f"({scheme}); use trainer.strategy=ddp, or model.quantised=none"
        )
    if decider.spread and not method.takes_parts:
        methods = {file.stem: _method_class(file) for file in sorted((conf_folder() / "method").glob("*.yaml"))}
        able = ", ".join(name for name, other in methods.items() if other.takes_parts)
        raise ValueError(
            f"method={method.name} needs the whole model on every device, and the trainer's strategy divides it; use "
            f"trainer.strategy=ddp or trainer.devices=1 with trainer.strategy=auto, or another method: {able}"
        )


def _kinds_spent(method: Method | type[Method]) -> tuple[AllocationKind, ...]:
    """Gives the kinds of allocation that a method spends; none where any will do."""
    allocates = method.allocates
    return (allocates,) if isinstance(allocates, str) else allocates or ()


def _spenders(kinds: Sequence[AllocationKind], evidence: str) -> str:
    """Lists the allocators that turn scores, or curves, into these kinds; empty where there is none."""
    return " or ".join(f"allocator={_SPENDERS[kind][evidence]}" for kind in kinds if evidence in _SPENDERS[kind])


def check_unseen(scored: Splits, splits: Splits) -> None:
    """Refuses scores of rows that are evaluated; within one task, the task's own `load` refuses them."""
    if scored is splits:
        return
    asked = {example.question for example in splits.test}
    seen = sum(example.question in asked for example in (*scored.train, *scored.validation))
    if seen:
        raise ValueError(
            f"{seen} train or validation rows of score_task ask the same as test rows of the task, so the scores would "
            "see the answers that they are judged by; name another score_task, or null for the task's own rows"
        )


def _method_class(file: Path) -> type[Method]:
    settings: Any = OmegaConf.load(file)
    return allowed_target(settings["_target_"], f"{file}._target_")
