"""Steps that several methods share: decide, keep the decision, evaluate."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from layerif.adapt.callback import InfluenceCallback
from layerif.app.setup import Setup
from layerif.decide import Decision
from layerif.moe import measure_usage
from layerif.moe.usage import describe_unused, usage_by_block
from layerif.record.record import RunRecord


def loader(setup: Setup) -> Callable[[], nn.Module]:
    """Give a function that loads the model onto its device when it is first called, and keeps it."""

    @cache
    def load() -> nn.Module:
        model: Any = setup.model.load()
        return model.to(setup.decider.device)

    return load


def keep(decision: Decision, record: RunRecord) -> None:
    """Put a decision into the record, with its seconds and what there is to note about its samples."""
    record.decision = decision.record()
    record.seconds |= decision.seconds
    if decision.scores is None:
        return
    record.fingerprint = decision.scores.fingerprint
    record.notes.extend(decision.notes)
    if decision.reused:
        record.notes.append("scores from the store: this model and task were measured before")
    if decision.num_truncated:
        num_probed = sum(decision.num_samples)
        record.notes.append(f"{decision.num_truncated} of {num_probed} probed samples cut at probe.max_length")


@contextmanager
def keeping(influence: InfluenceCallback, record: RunRecord) -> Iterator[None]:
    """Put the decision that is made inside into the record, also if the work fails after it."""
    try:
        yield
    finally:
        if influence.decision is not None:
            keep(influence.decision, record)


def evaluate(model: nn.Module, setup: Setup, record: RunRecord, prefix: str = "") -> None:
    """Put the metrics of a model into the record under a prefix, and how its routers spread tokens over experts.

    The first process measures for all.
    """
    if rank_zero_only.rank > 0:
        return
    start = time.perf_counter()
    with measure_usage(model) as meter:
        result = setup.evaluation.run(model, setup.tokenizer, setup.splits.test, setup.task)
    usage = meter.take()
    record.routing = usage_by_block(usage, setup.decider.layers().names)
    if unused := describe_unused(usage):
        warnings.warn(unused, RuntimeWarning, stacklevel=2)
    record.metrics |= {f"{prefix}{name}": value for name, value in result.metrics.items()}
    record.answers |= {
        f"{prefix}{metric}": {answer.id: answer.correct for answer in answers}
        for metric, answers in result.answers.items()
    }
    record.seconds[f"{prefix}evaluate"] = time.perf_counter() - start


def join_processes(setup: Setup) -> None:
    """Start the processes that the trainer's settings ask for, as its `fit` would, and connect them."""
    if setup.decider.num_processes > 1:
        settings = {key: setup.config.trainer[key] for key in ("accelerator", "devices", "num_nodes", "strategy")}
        Fabric(**settings).launch()
