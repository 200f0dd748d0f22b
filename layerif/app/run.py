"""One run: makes the objects of the configuration, checks them, lets the method work, and writes the record."""

from __future__ import annotations

import logging
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import transformers
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from layerif import PACKAGE
from layerif.adapt.train import CHECKPOINTS
from layerif.app.schema import check
from layerif.app.setup import Outline, Setup, setup_of
from layerif.app.sweep import is_swept
from layerif.attribution.selection.all import AllRows
from layerif.checks import how_many
from layerif.data.batches import shown_text
from layerif.data.render import Example
from layerif.data.rows import CompletionExample
from layerif.decide import Decider
from layerif.estimators._base import CurveEstimator
from layerif.files import held
from layerif.pruning.module import BLOCKS
from layerif.record.job import choices_of_run, is_same_job, settings_of
from layerif.record.plots import spelt_budget
from layerif.record.record import FAILURE, FILE, AllocationRecord, RunRecord
from layerif.record.text import allocation_lines, print_run
from layerif.record.tracking import WANDB_RUN, tracked

log = logging.getLogger(__name__)


def run(config: DictConfig) -> float | None:
    """Runs one composed configuration in Hydra's folder, unless that folder holds the same job's record already.

    Args:
        config: the composed configuration.

    Returns:
        The figure that `objective` names, for a sweeper that searches; None where it names none.

    Raises:
        ValueError: the user can mend it. It is raised before any work where that is possible.
        InUse: another run works in the folder.
    """
    check(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    _prepare_process(config)
    setup = setup_of(config)
    if config.dry_run:
        _check_method(setup)
        preview(setup, folder)
        return None
    # The processes of one run share its folder, and the first one holds it.
    with held(folder) if rank_zero_only.rank == 0 else nullcontext():
        return _run_in(folder, setup)


def _run_in(folder: Path, setup: Setup) -> float | None:
    config = setup.config
    record = RunRecord(
        name=config.name,
        seed=config.seed,
        choices=choices_of_run(),
        config=settings_of(config),
        overrides=list(HydraConfig.get().overrides.task),
        inputs=setup.inputs(),
        measurements=setup.store.taken,  # grows while the run goes on
    )
    before = _record_in(folder)
    is_same = before is not None and is_same_job(before.identity, record.identity)
    if before is not None and is_same and config.rerun is not True and not (folder / FAILURE).exists():
        log.info("already done and not run again (rerun=true would run it): %s", folder / FILE)
        _remove_parts(folder)  # there if the run was killed right after it wrote its record
        return before.objective
    _check_method(setup)
    if before is not None and not is_same and rank_zero_only.rank == 0:
        record.notes.append("this folder held another job's record; other files of it may be left")
        log.warning("%s: %s", folder, record.notes[-1])
    try:
        with _noting_warnings(record.notes), tracked(setup.loggers, record, folder, setup.store.files):
            _execute(setup, record, folder)
            record.memory_gb = _peak_memory()
    except KeyboardInterrupt:
        if not is_swept():  # the jobs of a sweep find their folders again by themselves
            print(f"\ninterrupted; the same command with hydra.run.dir='{folder}' carries on", file=sys.stderr)
            sys.exit(130)
        raise
    except OSError as error:
        if error.errno and not error.filename:  # a full disk does not say where
            error.filename = str(folder)
        raise
    if rank_zero_only.rank > 0:  # the first process keeps the record for all
        return None
    if record.decision:  # a method that decides nothing has printed its own result
        print_run(record, folder)
    file = record.write(folder)  # last, because a job with a record is not run again
    _remove_parts(folder)
    log.info("record: %s", file)
    return record.objective


def preview(setup: Setup, folder: Path) -> None:
    """Prints all that is known without weights: the sizes, one sample, and the allocation that the budget permits."""
    if isinstance(setup, Outline):
        print("dry run: the configuration makes a model, nothing was counted or measured")
        return
    config, splits, template = setup.config, setup.splits, setup.task.template
    probe, everything = setup.decider.probe, setup.decider.layers()
    skeleton = setup.model.skeleton(with_adapter=probe.parameters == "lora")
    layers = setup.decider.measured_layers(skeleton)
    train, validation = setup.decider.samples()
    lines = {
        "model": f"{choices_of_run().get('model')}, {len(layers.names)} layers of {sum(everything.numel):,} parameters "
        "together",
        "task": f"{setup.task.name}: {len(splits.train)} train, {len(splits.validation)} validation, "
        f"{len(splits.test)} test rows",
        "probe": f"{sum(map(len, layers.params))} matrices ({config.probe.scope}), {sum(layers.numel):,} parameters; "
        f"{len(train)} + {len(validation)} samples, {sum(map(len, (*train, *validation))):,} tokens, "
        f"{train.num_truncated + validation.num_truncated} samples cut at {config.probe.max_length} tokens",
        "allocation": _spelt_preview(setup.decider),
    }
    # Making the trainer and the loggers checks their settings.
    setup.trainer(setup.fit.callbacks(folder / CHECKPOINTS), folder)
    lines |= setup.method.preview(setup)
    if splits.unread:
        lines["not read"] = _unread(setup)
    lines["first sample"] = repr(shown_text(splits.train[0], template, setup.tokenizer))
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {line}" for name, line in lines.items()))
    print("dry run: everything above is valid, nothing was measured or trained")


def _spelt_preview(decider: Decider) -> str:
    """Spells the allocation that equal scores or curves would give, or the one that needs neither."""
    allocation, spends = AllocationRecord(**decider.preview().to_dict()), decider.allocator.spends
    blocks = how_many(len(allocation.by_block()), "layer")
    parts = "sublayers" if allocation.kind == "blocks" else "matrices"
    over = f"{len(allocation.units)} {parts} of {blocks}" if allocation.is_by_matrix else blocks
    evidence = "curves" if isinstance(decider.estimator, CurveEstimator) else "scores"
    gives = "the allocator gives" if spends == "nothing" else f"equal {evidence} would give"
    if getattr(decider.allocator, "slope", 0.0) is None:
        gives = "before the trials of allocator.slope, the allocator gives"
    values = "; ".join(allocation_lines(allocation))
    return f"{allocation.kind}, {spelt_budget(allocation)} over {over}; {gives} {values}"


def _prepare_process(config: DictConfig) -> None:
    """Seeds the process, and quietens libraries that print or warn too much."""
    warnings.filterwarnings("ignore", module=r"lightning\.")  # workers, logging steps
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    L.seed_everything(config.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    _quieten_hub()
    if rank_zero_only.rank > 0:
        logging.getLogger("layerif").setLevel(logging.WARNING)
    if not sys.stderr.isatty():  # progress bars do not belong in a log file
        transformers.utils.logging.disable_progress_bar()


def _check_method(setup: Setup) -> None:
    """Refuses, before any measurement, a method that cannot work or cannot give the figure that a search needs."""
    _check_rows_to_learn_from(setup)
    setup.method.check(setup)
    if setup.config.get("objective") == "validation/loss" and not setup.method.fine_tunes:
        raise ValueError(
            "objective=validation/loss is a figure of a fine-tuned model, and this method fine-tunes none; use "
            "method=lora_moe (or lora, lora_equal, full, or prune or drop with method.recover), or "
            "objective=reliability for scores alone"
        )


def _check_rows_to_learn_from(setup: Setup) -> None:
    """Refuses a selection of rows, or a filter of tokens, that the method would not look at."""
    if not setup.method.selects_rows and not isinstance(setup.selection, AllRows):
        raise ValueError(
            f"selection chooses the rows of fine-tuning, and method={setup.method.name} does not select any; use "
            "selection=all, or method=lora, lora_moe, lora_equal or full (none: only show the rows)"
        )
    token_filter = setup.config.data.get("token_filter", "none")
    if token_filter != "none" and not (setup.method.selects_rows and setup.method.fine_tunes):
        raise ValueError(
            f"data.token_filter={token_filter} is for fine-tuning, and method={setup.method.name} does not filter "
            "tokens; use data.token_filter=none, or method=lora, lora_moe, lora_equal or full"
        )


def _execute(setup: Setup, record: RunRecord, folder: Path) -> None:
    if setup.splits.num_dropped:
        record.notes.append(f"{setup.splits.num_dropped} rows dropped from train and validation: repeated")
    if setup.splits.unread:
        record.notes.append(_unread(setup))
    if getattr(setup.tokenizer, "chat_template", None) and setup.task.template != "chat" and _asks(setup):
        record.notes.append(
            f"the tokenizer has a chat template, and task.template={setup.task.template} does not use it; "
            "task.template=chat does"
        )
    setup.method.run(setup, record, folder)


def _asks(setup: Setup) -> bool:
    """Tells if the task's rows have prompts, which a chat template could stand around."""
    return isinstance(setup.splits.train[0], Example | CompletionExample)


def _unread(setup: Setup) -> str:
    parts = ", ".join(f"{part} from {split}.jsonl" for part, split in setup.task.splits.items() if split)
    return f"{setup.task.path} also holds {', '.join(setup.splits.unread)}, which no part reads (task.splits: {parts})"


def _remove_parts(folder: Path) -> None:
    """Removes what only a run that was killed before it wrote its record needs."""
    if rank_zero_only.rank == 0:
        for name in (CHECKPOINTS, BLOCKS):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / WANDB_RUN).unlink(missing_ok=True)


class _FirstTime(logging.Filter):
    """Lets every message through once, and never the announcement that an attempt is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_first = message not in self.said and not message.startswith("Retrying in")
        self.said.add(message)
        return is_first


_FIRST_TIME = _FirstTime()  # one for the whole process, because a sweep has many runs in it


def _quieten_hub() -> None:
    """Makes the hub's client print each message once; it has a handler beside the root's and repeats every attempt."""
    logging.getLogger("huggingface_hub").propagate = False
    logging.getLogger("huggingface_hub.utils._http").addFilter(_FIRST_TIME)


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
    """Adds the warnings of layerif to the notes of the record; all warnings are shown as before."""
    show = warnings.showwarning

    def note_and_show(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if PACKAGE in Path(filename).parents and str(message) not in notes:
            notes.append(str(message))
        show(message, category, filename, *rest)

    with warnings.catch_warnings():
        warnings.showwarning = note_and_show
        yield


def _peak_memory() -> float:
    """Returns the peak of the main memory of this process in gigabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
