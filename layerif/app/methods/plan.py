"""`method=plan`: print what the evidence of the estimator would cost, and what a law expects of fewer layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from rich.table import Table

from layerif.app.methods import SpendsNothing
from layerif.app.setup import Setup
from layerif.checks import Positive, check_fields
from layerif.compress.performance_law import CHANCE, LABEL, Fewer, fewer_layers
from layerif.estimators._base import name_of
from layerif.probe.plan import estimate, show_plan
from layerif.record.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Plan(SpendsNothing):
    """Prints what the evidence of the estimator would cost under each strategy, and writes it to `plan.json`.

    Attributes:
        training_tokens: the tokens that the model was trained on. Given, the MMLU that the Performance Law expects of
            fewer layers is printed, too, and written to `performance_law.json`.
    """

    name: ClassVar[str] = "plan"

    training_tokens: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self, "method")

    def check(self, setup: Setup) -> None:
        self._expected(setup)

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        decider = setup.decider
        needs = decider.estimator.needs
        is_measured = needs.is_measured and decider.allocator.spends != "nothing"
        known = estimate(decider, needs) if is_measured else None
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
        if rows := self._expected(setup):
            said = f"{LABEL}, for {self.training_tokens:.4g} training tokens"
            _show_expected(rows, said)
            found = {"source": said, "rows": [asdict(row) for row in rows]}
            (folder / "performance_law.json").write_text(json.dumps(found, indent=1) + "\n")

    def _expected(self, setup: Setup) -> list[Fewer]:
        """Gives what the law expects of fewer layers; nothing where no training tokens are given."""
        return [] if self.training_tokens is None else fewer_layers(setup.model.skeleton(), self.training_tokens)


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
