"""Steps that several methods share: decide, record the decision, watch the loss that curves predict, evaluate."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from layerif.adapt.callback import InfluenceCallback
from layerif.app.setup import Setup
from layerif.data.batches import padding_id
from layerif.data.mixed import Mixed
from layerif.data.rows import AnyExample
from layerif.data.text import check_disjoint
from layerif.decide import Decision, Scored
from layerif.evaluate.loss import encoded_rows, row_losses
from layerif.evaluate.questions import QuestionSet
from layerif.models.blocks import context_length
from layerif.moe import measure_usage
from layerif.moe.usage import ExpertUsage, between_tasks, describe_unused, usage_by_block
from layerif.probe.curves.request import LossCurves
from layerif.probe.curves.text import LossText
from layerif.probe.grams.processes import is_spread
from layerif.pruning.calibration import Calibration
from layerif.record.record import RunRecord


def loader(setup: Setup) -> Callable[[], nn.Module]:
    """Returns a function that loads the model onto its device at the first call, and gives the same one afterwards."""

    @cache
    def load() -> nn.Module:
        model: Any = setup.model.load()
        return model.to(setup.decider.device)

    return load


def record_decision(decision: Decision, record: RunRecord) -> None:
    """Puts a decision into the record, with its seconds, its measurements and its notes."""
    record.decision = decision.record()
    record_evidence(decision, record)


def record_evidence(scored: Scored, record: RunRecord) -> None:
    """Puts the seconds, the measurement and the notes of scores or curves into the record."""
    record.seconds |= scored.seconds
    record.notes.extend(scored.notes)
    found = scored.curves or scored.scores
    if found is None:
        return
    record.fingerprint = found.fingerprint
    if scored.reused:
        what, of = ("scores", "model and task") if scored.curves is None else ("curves", "model and these texts")
        record.notes.append(f"{what} from the store: this {of} were measured before")
    if scored.num_truncated:
        num_probed = sum(scored.num_samples)
        record.notes.append(f"{scored.num_truncated} of {num_probed} probed samples cut at probe.max_length")


@contextmanager
def recording(influence: InfluenceCallback, record: RunRecord) -> Iterator[None]:
    """Puts the decision that is made inside into the record, even if the work fails after it."""
    try:
        yield
    finally:
        if influence.decision is not None:
            record_decision(influence.decision, record)


def evaluate(
    model: nn.Module, setup: Setup, record: RunRecord, prefix: str = "", only: Sequence[str] | None = None
) -> None:
    """Evaluates a model and puts metrics, answers and the use of its experts into the record.

    Only the first process measures; where the weights are divided, all run the model for it.

    Args:
        model: on the device that it is evaluated on.
        setup: holds the evaluation.
        record: of the run.
        prefix: of the metrics' names in the record.
        only: these metrics alone; None: those of the configuration.
    """
    if rank_zero_only.rank > 0 and not is_spread(model):
        return
    start = time.perf_counter()
    with measure_usage(model) as meter:
        evaluation = setup.evaluation if only is None else replace(setup.evaluation, metrics=tuple(only))
        result = evaluation.run(model, setup.tokenizer, setup.splits.test, setup.task)
    usage = meter.take()
    record.routing = usage_by_block(usage, setup.decider.layers().names)
    if usage:
        _add_tasks(record.routing, _usage_by_source(model, setup))
    if unused := describe_unused(usage):
        warnings.warn(unused, RuntimeWarning, stacklevel=2)
    record.metrics |= {f"{prefix}{name}": value for name, value in result.metrics.items()}
    record.answers |= {
        f"{prefix}{metric}": {answer.id: answer.correct for answer in answers}
        for metric, answers in result.answers.items()
    }
    record.losses |= {f"{prefix}{name}": dict(rows) for name, rows in result.losses.items()}
    record.context_free |= result.context_free
    record.seconds[f"{prefix}evaluate"] = time.perf_counter() - start


def _usage_by_source(model: nn.Module, setup: Setup) -> dict[str, dict[str, ExpertUsage]]:
    """Measures the use of the experts by each source of a mixed task; empty for any other task.

    Each row is read once, with its right output.
    """
    source = setup.task.source
    if not isinstance(source, Mixed) or setup.task.path is not None:
        return {}
    by_source: dict[str, list[AnyExample]] = defaultdict(list)
    for example in setup.splits.test:
        by_source[source.source_of(example.id)].append(example)
    found = {}
    for name, examples in by_source.items():
        rows = encoded_rows(QuestionSet(examples, setup.task, setup.tokenizer), context_length(model))
        with measure_usage(model) as meter:
            row_losses(model, rows, padding_id(setup.tokenizer), batch_size=setup.evaluation.batch_size)
        found[name] = meter.take()
    return found


def _add_tasks(routing: dict[str, dict[str, Any]], usage: Mapping[str, Mapping[str, ExpertUsage]]) -> None:
    """Adds to the routing of each block that of each task, and how far its routers tell the tasks apart."""
    if not usage:
        return
    apart = between_tasks(usage)
    of_tasks = {name: usage_by_block(of_task, list(routing)) for name, of_task in usage.items()}
    for block, kept in routing.items():
        kept["tasks"] = {name: of_task[block] for name, of_task in of_tasks.items()}
        kept["between_tasks"] = fmean(value for name, value in apart.items() if name.startswith(f"{block}."))


def evaluate_before(load: Callable[[], nn.Module], setup: Setup, record: RunRecord, *, dense: bool) -> None:
    """Evaluates the untouched model where the user asks for it, and otherwise its perplexity alone where `dense`."""
    if setup.evaluation.before:
        evaluate(load(), setup, record, "before/")
    elif dense and "perplexity" in setup.evaluation.metrics_on(setup.splits.test):
        evaluate(load(), setup, record, "before/", only=["perplexity"])


def check_bare(setup: Setup, doing: str) -> None:
    """Refuses a model under an adapter, a quantised one, and a model on several devices.

    Args:
        setup: of the run.
        doing: what its method does with the weights, for the message: `pruning`.
    """
    if setup.model.adapter:
        raise ValueError(
            f"{doing} does not reach the weights under model.adapter={setup.model.adapter!r}; merge the adapter into a "
            "folder of its own (PEFT's merge_and_unload) and use model=local"
        )
    if scheme := setup.model.quantisation:
        raise ValueError(
            f"{doing} works on weights as they were before they were quantised, and the model is quantised ({scheme}); "
            "use model.quantised=none, and quantise what the run leaves (model=local model.quantised=nf4); scores of "
            "the quantised model can be spent by estimator=file"
        )
    if setup.decider.num_processes > 1:
        raise ValueError(f"{doing} works on one device, got {setup.decider.num_processes}; use trainer.devices=1")


def check_calibration_apart(setup: Setup, calibration: Calibration) -> None:
    """Refuses calibration windows of a text whose perplexity is measured."""
    if "perplexity" in setup.evaluation.metrics_on(setup.splits.test):
        for tested in setup.evaluation.texts:
            check_disjoint(calibration.text, tested)


def watched_text(setup: Setup) -> LossText | None:
    """Gives the samples whose loss the curves predict; None where no loss curves are spent."""
    needs = setup.decider.estimator.needs
    spends = setup.decider.allocator.spends == "curves"
    return needs.loss_text(setup.decider) if spends and isinstance(needs, LossCurves) else None


def record_rise(record: RunRecord, dense: float, smaller: float) -> None:
    """Puts the actual rise of the loss that curves predict beside the prediction, in nats."""
    assert record.decision is not None
    assert record.decision.curves is not None
    record.decision.curves |= {"dense_loss": dense, "actual": smaller - dense}


def join_processes(setup: Setup) -> None:
    """Starts and connects the processes that the trainer's settings ask for, as its `fit` would."""
    if setup.decider.num_processes > 1:
        settings = {key: setup.config.trainer[key] for key in ("accelerator", "devices", "num_nodes", "strategy")}
        if settings["strategy"] == "fsdp":  # the probe divides the weights itself
            settings["strategy"] = "ddp"
        Fabric(**settings).launch()
