"""`method=plan`: print the cost of the evidence, the needs of each method, and what the Performance Law expects."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from rich.table import Table

from layerif.app.methods import SpendsNothing
from layerif.app.methods._needs import OF_DENSE_WEIGHTS, Amounts, Dimensions, Need, dimensions_of, needs
from layerif.app.setup import Outline, Setup
from layerif.checks import Positive, check_fields
from layerif.compress.performance_law import CHANCE, LABEL, Fewer, fewer_layers
from layerif.estimators._base import name_of
from layerif.formats import formats_called
from layerif.models.memory import free_bytes
from layerif.models.quantised import bits_of_scheme
from layerif.probe.plan import estimate, show_plan
from layerif.probe.speed import product_rate
from layerif.record.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Plan(SpendsNothing):
    """Prints what the evidence of the estimator would cost under each strategy, and writes it to `plan.json`.

    What each method would need (devices, memory, passes, seconds) is counted from the model's configuration, printed,
    and written to `needs.json`. For `model=configuration`, which has no weights, that is all.

    Attributes:
        training_tokens: the tokens that the model was trained on. Given, the MMLU that the Performance Law expects of
            fewer layers is printed, too, and written to `performance_law.json`.
        device_gb: the memory of a device, in 10⁹ bytes; None: what is free on this one.
        teraflops: the operations of matrix products that a device does in a second, in 10¹²; None: measured here.
    """

    name: ClassVar[str] = "plan"
    takes_parts: ClassVar[bool] = True

    training_tokens: Positive | None = None
    device_gb: Positive | None = None
    teraflops: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self, "method")

    def check(self, setup: Setup) -> None:
        self._expected(setup)

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        if not isinstance(setup, Outline):
            self._plan_evidence(setup, record, folder)
        self._count_needs(setup, folder)
        if rows := self._expected(setup):
            said = f"{LABEL}, for {self.training_tokens:.4g} training tokens"
            _show_expected(rows, said)
            found = {"source": said, "rows": [asdict(row) for row in rows]}
            (folder / "performance_law.json").write_text(json.dumps(found, indent=1) + "\n")

    def _plan_evidence(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        decider = setup.decider
        request = decider.estimator.needs
        is_measured = request.is_measured and decider.allocator.spends != "nothing"
        known = estimate(decider, request) if is_measured else None
        strategies = []
        if known is None:
            record.notes.append(_unplanned(name_of(decider.estimator), is_measured, decider.allocator.spends))
            print(record.notes[-1])
        else:
            planned, load, strategies = known
            chosen = next(strategy for strategy in strategies if strategy.chosen)
            show_plan(planned, load, strategies, decider.device)
            record.metrics = {"expected_seconds": chosen.seconds, "expected_memory_gb": chosen.device_gb}
        (folder / "plan.json").write_text(json.dumps([asdict(strategy) for strategy in strategies], indent=1) + "\n")

    def _count_needs(self, setup: Setup, folder: Path) -> None:
        device = setup.trainer([], Path()).strategy.root_device
        dtype = getattr(torch, setup.model.dtype)
        device_gb = free_bytes(device) / 1e9 if self.device_gb is None else self.device_gb
        teraflops = product_rate(device, dtype) / 1e12 if self.teraflops is None else self.teraflops
        model = setup.model
        shape, work = dimensions_of(model.skeleton(), setup.config.probe.scope, model.quantisation), _work(setup)
        found = needs(shape, work, device_gb, teraflops)
        _show_needs(shape, work, found, device_gb, teraflops, is_measured=self.teraflops is None)
        content = {
            "parameters": shape.numel,
            "quantised": shape.quantised,
            "weights_gb": shape.num_bytes / 1e9,
            "device_gb": device_gb,
            "teraflops": teraflops,
            "work": asdict(work),
            "needs": [asdict(need) for need in found],
        }
        (folder / "needs.json").write_text(json.dumps(content, indent=1) + "\n")

    def _expected(self, setup: Setup) -> list[Fewer]:
        """Gives what the law expects of fewer layers; nothing where no training tokens are given."""
        return [] if self.training_tokens is None else fewer_layers(setup.model.skeleton(), self.training_tokens)


def _work(setup: Setup) -> Amounts:
    """Takes the amounts of work from the settings; without a tokenizer every sample has the most tokens allowed."""
    config = setup.config
    probe, data = config.probe, config.data
    if isinstance(setup, Outline):
        rows = len(setup.splits.train)
        num_train, num_val = min(probe.num_train, rows), min(probe.num_validation, len(setup.splits.validation))
        longest, sample_tokens = probe.max_length, (num_train + num_val) * probe.max_length
        length, row_tokens = data.max_length, rows * data.max_length
    else:
        train, validation = setup.decider.samples()
        num_train, num_val = len(train), len(validation)
        sizes = [len(sample) for sample in (*train, *validation)]
        longest, sample_tokens = max(sizes), sum(sizes)
        fitted = [len(sample) for sample in setup.datamodule.train]
        rows, length, row_tokens = len(fitted), max(fitted), sum(fitted)
    trainer = config.trainer
    batch = data.batch_size * (trainer.get("accumulate_grad_batches") or 1)
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    epochs = math.inf if trainer.max_epochs == -1 else trainer.max_epochs
    epochs = min(epochs, steps * batch / rows)
    return Amounts(
        num_train=num_train,
        num_val=num_val,
        longest=longest,
        sample_tokens=sample_tokens,
        batch_size=probe.batch_size,
        fit_tokens=round(row_tokens * epochs),
        fit_length=length,
        fit_batch=data.batch_size,
        epochs=math.ceil(epochs),
        num_formats=len(formats_called("gguf")),
    )


def _show_needs(
    shape: Dimensions, work: Amounts, found: Sequence[Need], device_gb: float, teraflops: float, *, is_measured: bool
) -> None:
    """Prints the devices, memory, passes and seconds of every method."""
    console = Console()
    routed = "" if shape.experts is None else ", a token takes {} of {} experts".format(*shape.experts)
    measured = " (measured on this one)" if is_measured else ""
    console.print(
        f"{shape.numel:,} parameters{routed}: {shape.num_bytes / 1e9:.3g} GB of weights{_said_of(shape.quantised)}; "
        f"devices of {device_gb:.3g} GB and {teraflops:.3g} TFLOP/s{measured}",
        highlight=False,
    )
    table = Table(title="what each method would need")
    for column in ("method", "devices", "GB on each", "passes", "TFLOP", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for need in found:
        devices = "too small" if need.devices is None else f"{need.devices}"
        numbers = f"{need.device_gb:.3g}", f"{need.passes}", f"{need.operations / 1e12:,.3g}", f"{need.seconds:,.3g}"
        table.add_row(need.method, devices, *numbers)
    console.print(table)
    for need in found:
        console.print(f"{need.method}: {need.about}", highlight=False)
    shared = (
        "Several devices share the weights (trainer.strategy=fsdp); full, prune, drop and quantise take one, and the "
        "table shows what it would hold."
    )
    if shape.quantised:
        shared = (
            f"{', '.join(OF_DENSE_WEIGHTS)} are left out: they need the weights as they were before they were "
            "quantised (model.quantised=none). Quantised weights are not divided among devices."
        )
    console.print(
        f"{shared} Fine-tuning reads {work.fit_tokens:,} tokens. The seconds are those of the counted products at this "
        "rate: reading weights, communication, choosing masks, optimiser and evaluation come on top.",
        highlight=False,
    )


def _said_of(quantised: str | None) -> str:
    """Says how weights are quantised, in brackets."""
    if quantised is None:
        return ""
    return (
        f" ({quantised})"
        if bits_of_scheme(quantised)
        else f" ({quantised}, whose bits are not known: counted as if dense)"
    )


def _show_expected(rows: Sequence[Fewer], said: str) -> None:
    """Prints the law's figures, with their source and their limits."""
    table = Table(title="MMLU expected of fewer layers")
    for column in ("layers", "parameters", "MMLU", "change"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(f"{row.layers}", f"{row.parameters:,}", f"{row.mmlu:.3f}", f"{row.change:+.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"By {said}. It knows the shape alone: it is about models that were trained in this shape from the start, and "
        "not about these weights without some of their layers. Nothing was measured.",
        highlight=False,
    )
    if all(row.mmlu == CHANCE for row in rows):
        console.print(
            f"Every row is {CHANCE}, which is chance and the least that the law gives: it tells nothing about this "
            "model.",
            highlight=False,
        )


def _unplanned(estimator: str, is_measured: bool, spends: str) -> str:
    """Says why there is no plan."""
    if spends == "nothing":
        return "nothing to plan: the allocator spends neither scores nor curves, so nothing is measured for it"
    if not is_measured:
        return f"nothing to plan: estimator={estimator} measures nothing"
    return (
        f"no plan: the evidence of estimator={estimator} is neither Grams, curvature, loss curves nor gains of a "
        "gradient pass; its passes, memory and seconds are not known beforehand"
    )
