"""Steps that several methods share: decide, record the decision, watch the loss that curves predict, evaluate."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from layerif.adapt.callback import InfluenceCallback
from layerif.app.setup import Setup
from layerif.data.text import check_disjoint
from layerif.decide import Decision
from layerif.moe import measure_usage
from layerif.moe.usage import describe_unused, usage_by_block
from layerif.probe.curves.request import LossCurves
from layerif.probe.curves.text import LossText
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
    record.seconds |= decision.seconds
    record.notes.extend(decision.notes)
    spent = decision.curves or decision.scores
    if spent is None:
        return
    record.fingerprint = spent.fingerprint
    if decision.reused:
        what, of = ("scores", "model and task") if decision.curves is None else ("curves", "model and these texts")
        record.notes.append(f"{what} from the store: this {of} were measured before")
    if decision.num_truncated:
        num_probed = sum(decision.num_samples)
        record.notes.append(f"{decision.num_truncated} of {num_probed} probed samples cut at probe.max_length")


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

    Only the first process measures.

    Args:
        model: on the device that it is evaluated on.
        setup: holds the evaluation.
        record: of the run.
        prefix: of the metrics' names in the record.
        only: these metrics alone; None: those of the configuration.
    """
    if rank_zero_only.rank > 0:
        return
    start = time.perf_counter()
    with measure_usage(model) as meter:
        evaluation = setup.evaluation if only is None else replace(setup.evaluation, metrics=tuple(only))
        result = evaluation.run(model, setup.tokenizer, setup.splits.test, setup.task)
    usage = meter.take()
    record.routing = usage_by_block(usage, setup.decider.layers().names)
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


def evaluate_before(load: Callable[[], nn.Module], setup: Setup, record: RunRecord, *, dense: bool) -> None:
    """Evaluates the untouched model where the user asks for it, and otherwise its perplexity alone where `dense`."""
    if setup.evaluation.before:
        evaluate(load(), setup, record, "before/")
    elif dense and "perplexity" in setup.evaluation.metrics_on(setup.splits.test):
        evaluate(load(), setup, record, "before/", only=["perplexity"])


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
        Fabric(**settings).launch()
