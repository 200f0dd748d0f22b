"""Steps that several methods share: decide, keep the decision, evaluate."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from layerif.adapt.callback import InfluenceCallback
from layerif.adapt.module import AdapterModule
from layerif.adapt.train import train
from layerif.app.setup import Parts
from layerif.decide import Decision
from layerif.moe import measure_usage
from layerif.moe.usage import by_block, describe_unused
from layerif.record.record import RunRecord


def score(parts: Parts, record: RunRecord) -> None:
    """Scores and allocation, and if asked the accuracy of the untouched model."""
    _join_processes(parts)
    loaded: list[nn.Module] = []

    def load() -> nn.Module:
        loaded[:] = loaded or [parts.model.load().to(parts.decider.device)]
        return loaded[0]

    keep(parts.decider(load), record)
    if parts.evaluation.before:
        evaluate(load(), parts, record, "before/")


def fit(parts: Parts, module: AdapterModule, record: RunRecord, folder: Path) -> None:
    """Scores, allocation, fine-tuning, evaluation."""
    influence = InfluenceCallback(parts.decider)
    if parts.evaluation.before:
        evaluate(module.base_model().to(parts.decider.device), parts, record, "before/")
    with keeping(influence, record):
        model = train(parts, module, influence, record, folder)
    evaluate(model, parts, record, "")


@contextmanager
def keeping(influence: InfluenceCallback, record: RunRecord) -> Iterator[None]:
    """Put the decision that is made inside into the record, also if training fails after it."""
    try:
        yield
    finally:
        if influence.decision is not None:
            keep(influence.decision, record)


def keep(decision: Decision, record: RunRecord) -> None:
    """Put a decision, and what there is to say of its samples, into the record."""
    record.layers = list(decision.allocation.layers)
    record.allocation = decision.allocation.to_dict()
    record.seconds |= decision.seconds
    record.source = decision.source
    if decision.scores is None:
        return
    record.scores = list(decision.scores.values)
    record.higher_means, record.fingerprint = decision.scores.higher_means, decision.scores.fingerprint
    record.reliability, record.fidelity = decision.reliability, decision.fidelity
    record.notes.extend(decision.notes)
    if decision.reused:
        record.notes.append("scores from the store: this model and task were measured before")
    if decision.num_truncated:
        record.notes.append(
            f"{decision.num_truncated} of {sum(decision.num_samples)} probed samples cut at probe.max_length"
        )
    for part, num in zip(("train", "validation"), decision.num_samples, strict=True):
        record.samples[part] = num


def _join_processes(parts: Parts) -> None:
    """Start the processes that the trainer's settings ask for, as its `fit` would, and connect them."""
    if parts.decider.num_processes > 1:
        settings = {key: parts.config.trainer[key] for key in ("accelerator", "devices", "num_nodes", "strategy")}
        Fabric(**settings).launch()


def evaluate(model: nn.Module, parts: Parts, record: RunRecord, prefix: str) -> None:
    """The metrics of `model` into the record, under `prefix`, and how it routes; the first process measures for all."""
    if rank_zero_only.rank > 0:
        return
    start = time.perf_counter()
    with measure_usage(model) as meter:
        result = parts.evaluation.run(model, parts.tokenizer, parts.splits.test, parts.task)  # type: ignore[arg-type]
    usage = meter.take()
    record.routing = by_block(usage, parts.decider.layers().names)
    if unused := describe_unused(usage):
        warnings.warn(unused, RuntimeWarning, stacklevel=2)
    record.metrics |= {f"{prefix}{name}": value for name, value in result.metrics.items()}
    record.questions |= {
        f"{prefix}{metric}": {answer.id: answer.correct for answer in answers}
        for metric, answers in result.answers.items()
    }
    record.seconds[f"{prefix}evaluate"] = time.perf_counter() - start
