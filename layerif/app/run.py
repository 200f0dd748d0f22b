"""One run: score, allocate, fine-tune, evaluate, record."""

from __future__ import annotations

import logging
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from layerif import PACKAGE
from layerif.adapt.module import AdapterModule
from layerif.adapt.train import callbacks
from layerif.app.methods._steps import fit, score
from layerif.app.methods.prune import check_pruning, prune
from layerif.app.schema import check
from layerif.app.setup import Parts
from layerif.app.sweep import is_swept
from layerif.data.batches import output_text, prompt_text
from layerif.models.blocks import layer_map
from layerif.pruning.module import PruneModule
from layerif.record.job import choices_of_run, settings_of
from layerif.record.record import FAILURE, FILE, RunRecord
from layerif.record.tracking import tracked
from layerif.report import print_run

log = logging.getLogger(__name__)


def run(config: DictConfig) -> float | None:
    """Run one composed configuration in Hydra's folder, unless that folder holds its record already.

    What `objective` names is returned, for a sweeper that searches.
    """
    check(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    L.seed_everything(config.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    _quieten_hub()
    if rank_zero_only.rank > 0:
        logging.getLogger("layerif").setLevel(logging.WARNING)
    if not sys.stderr.isatty():  # a log file wants no bars
        transformers.utils.logging.disable_progress_bar()
    parts = Parts(config)
    if config.dry_run:
        _preview(parts, folder)
        return None
    record = RunRecord(
        name=config.name,
        seed=config.seed,
        config=settings_of(config),
        overrides=list(HydraConfig.get().overrides.task),
        choices=choices_of_run(),
        inputs=parts.inputs(),
    )
    before = _record_in(folder)
    is_same = before is not None and before.identity == record.identity
    if before is not None and is_same and config.rerun is not True and not (folder / FAILURE).exists():
        log.info("already done, nothing to run again (rerun=true would): %s", folder / FILE)
        return before.objective
    _check_method(parts)
    if before is not None and not is_same and rank_zero_only.rank == 0:
        record.notes.append("this folder held another job's record; other files of it may be left")
        log.warning("%s: %s", folder, record.notes[-1])
    try:
        with _noting_warnings(record.notes), tracked(parts.loggers, record, folder, parts.decider.store):
            _execute(parts, record, folder)
    except KeyboardInterrupt:
        if not is_swept():  # a sweep's jobs are found by the sweep
            print(f"\ninterrupted; the same command with hydra.run.dir='{folder}' carries on", file=sys.stderr)
            sys.exit(130)
        raise
    if rank_zero_only.rank > 0:  # the first process keeps the record for all
        return None
    record.measurements = parts.decider.store.taken
    record.memory_gb = _peak_memory()
    file = record.write(folder)
    for name in ("checkpoints", "blocks"):  # they were for a run killed before its record stood
        shutil.rmtree(folder / name, ignore_errors=True)
    if record.allocation:  # other methods have said what they found
        print_run(record, folder)
    log.info("record: %s", file)
    return record.objective


class _FirstTime(logging.Filter):
    """Each message once; an attempt's, but not that it is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_first = message not in self.said and not message.startswith("Retrying in")
        self.said.add(message)
        return is_first


_FIRST_TIME = _FirstTime()  # of the process: a sweep has many runs


def _quieten_hub() -> None:
    """Its client says everything twice, by a handler of its own beside the root's, and that again at each attempt."""
    logging.getLogger("huggingface_hub").propagate = False
    logging.getLogger("huggingface_hub.utils._http").addFilter(_FIRST_TIME)


def _check_method(parts: Parts) -> None:
    """Before anything is measured: can this model be fitted like that, and what a search asks for be had?"""
    method = parts.method()
    if isinstance(method, AdapterModule):
        method.rehearse(parts.model.skeleton(), parts.decider.rehearse(parts.decider.layers()).by_name())
    fits = isinstance(method, AdapterModule) or getattr(method, "recover", "none") != "none"
    if parts.config.get("objective") == "validation/loss" and not fits:
        raise ValueError(
            "objective=validation/loss is of a fine-tuned model, and this method fits none; use method=lora_moe "
            "(or lora, lora_equal, or prune with method.recover), or objective=reliability for scores alone"
        )


def _preview(parts: Parts, folder: Path) -> None:
    """Everything that can be said without weights: the sizes, one sample, and whether the budget can be met."""
    _check_method(parts)
    config, splits, template = parts.config, parts.splits, parts.task.template
    probe, everything = parts.decider.probe, parts.decider.layers()
    skeleton = parts.model.skeleton(with_adapter=probe.parameters == "lora")
    layers = layer_map(
        skeleton, scope=probe.scope, parameters=probe.parameters, skip_unsupported=probe.skip_unsupported
    )
    train, validation = parts.decider.samples()
    allocation = parts.decider.rehearse(everything)
    example = splits.train[0]
    kind = type(parts.model).__name__.removesuffix("Model").lower()
    lines = {
        "model": f"{kind}, {len(layers.names)} layers of {sum(everything.numel):,} parameters together",
        "task": f"{parts.task.name}: {len(splits.train)} train, {len(splits.validation)} validation, "
        f"{len(splits.test)} test rows",
        "probe": f"{sum(map(len, layers.params))} matrices ({config.probe.scope}), {sum(layers.numel):,} parameters; "
        f"{len(train)} + {len(validation)} samples, {sum(map(len, (*train, *validation))):,} tokens, "
        f"{train.num_truncated + validation.num_truncated} samples cut at {config.probe.max_length} tokens",
        "allocation": f"{allocation.kind}, budget {allocation.budget} over {len(layers.names)} layers; "
        f"equal scores would give {list(allocation.values)}",
    }
    # The settings of trainer, fit and method are checked by making them.
    parts.trainer(callbacks(instantiate(config.fit), folder / "checkpoints"), folder)
    method = parts.method()
    if hasattr(method, "plan"):
        lines |= method.plan(parts.decider)
    if isinstance(method, PruneModule):
        lines["prune"] = check_pruning(parts, method)
    elif isinstance(method, L.LightningModule):
        data = parts.datamodule()
        lines["fit"] = (
            f"{len(data.train)} samples in batches of {data.batch_size}, "
            f"{data.train.num_truncated} samples cut at {config.data.max_length} tokens"
        )
    lines["first sample"] = repr(prompt_text(example, template) + output_text(example.output, template))
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {line}" for name, line in lines.items()))
    print("dry run: everything above is valid, nothing was measured or trained")


def _execute(parts: Parts, record: RunRecord, folder: Path) -> None:
    if parts.splits.num_dropped:
        record.notes.append(f"{parts.splits.num_dropped} rows dropped from train and validation: repeated")
    method = parts.method()
    if method is None:
        score(parts, record)
    elif isinstance(method, PruneModule):
        prune(parts, method, record, folder)
    elif isinstance(method, L.LightningModule):
        fit(parts, method, record, folder)  # type: ignore[arg-type]
    else:
        method(parts.decider, record, folder)


def _record_in(folder: Path) -> RunRecord | None:
    if not (folder / FILE).exists():
        return None
    try:
        return RunRecord.read(folder)
    except ValueError as error:
        log.warning("%s; the job runs again", error)
        return None


@contextmanager
def _noting_warnings(notes: list[str]) -> Iterator[None]:
    """Warnings are shown as ever; those of layerif are also kept for the record."""
    show = warnings.showwarning

    def note_and_show(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if PACKAGE in Path(filename).parents and str(message) not in notes:
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
