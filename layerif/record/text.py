"""Text of records and frames: on the console, in Markdown, and cell by cell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerif.layers import short_names
from layerif.record.frames import frames, runs_frame
from layerif.record.plots import plots_of_run, spelt_budget
from layerif.record.record import AllocationRecord, DecisionRecord, RunRecord
from layerif.stats import doubts

WRAPPED = ("run", "model", "arm", "from", "to", "both with", "profile", "and", "finding", "note", "command", "state")
_AT_MOST = 12  # kinds of matrices whose ranges are spelt out: a mixture of experts has hundreds


def console() -> Console:
    """Makes a console as wide as the terminal, and wide enough for a table where the output is a log file."""
    found = _Console()
    return found if found.is_terminal else _Console(width=140)


def print_run(record: RunRecord, folder: Path, on: Console | None = None) -> None:
    """Prints the summary of one run, and leaves its layers and plots in its folder.

    Args:
        record: of a run that decided something.
        folder: where `layers.csv`, `scores.png` and `allocation.png` go.
        on: the console; None: a new one.
    """
    assert record.decision is not None
    on, given, scores = on or console(), record.decision.allocation, record.decision.scores
    ranking = ""
    if scores is not None and len(set(scores.values)) > 1:
        highest = np.argsort(scores.values)[::-1][:3]
        ranking = f"; highest: {', '.join(scores.layers[index] for index in highest)}"
    on.print(f"\n{record.decision.source}{ranking}", highlight=False, markup=False)
    values, *ranges = allocation_lines(given)
    for line in (f"{given.kind} {values} ({spelt_budget(given)})", *(f"  {line}" for line in ranges)):
        on.print(line, highlight=False, markup=False)
    for line in _trust_lines(record.decision):
        on.print(line, highlight=False, markup=False)
    if record.metrics and (record.answers or record.parameters):  # a report of method=diagnose has no accuracy
        show_table(_fitting(runs_frame(record), on.width), record.config["task"]["name"], on)
    for line in _learned_lines(record):
        on.print(f"  {line}", highlight=False)
    for line in _metric_lines(record.metrics):
        on.print(f"  {line}", highlight=False)
    for note in record.notes:
        on.print(f"  note: {note}", highlight=False)
    frames(record)["layers"].to_csv(folder / "layers.csv", index=False)
    for name, plot in plots_of_run(record).items():
        plot.save(folder / f"{name}.png")


def _fitting(frame: pd.DataFrame, width: int) -> pd.DataFrame:
    """Returns the frame of one or two runs, with a run as a column where the rows are wider than the console."""
    cells = [[str(name), *map(spelt, frame[name])] for name in frame.columns]
    if sum(max(map(len, column)) + 3 for column in cells) < width:
        return frame
    runs = [str(name) for name in frame["run"]]
    rows = [[name, *values] for name, *values in cells if name != "run"]
    return pd.DataFrame(rows, columns=["", *runs])


def allocation_lines(given: AllocationRecord) -> list[str]:
    """Spells the values of an allocation: one for each block, or the means of blocks and the ranges of matrices."""
    spelt_values = [spelt(value) for value in given.values]
    if not given.is_by_matrix:
        return [f"[{', '.join(spelt_values)}]"]
    parts = "sublayers" if given.kind == "blocks" else "matrices"
    table, number = given.by_matrix(), f"{len(spelt_values)} {parts}"
    if len(set(spelt_values)) == 1:
        return [f"{spelt_values[0]} for each of {number}"]
    ranges = f"{number} from {spelt(min(given.values))} to {spelt(max(given.values))}"
    if len(table) <= _AT_MOST:
        names = short_names(list(table))
        of_kinds = (
            f"{name} {spelt(min(of.values()))} to {spelt(max(of.values()))}"
            for name, of in zip(names, table.values(), strict=True)
        )
        ranges = f"{ranges}: {', '.join(of_kinds)}"
    return [f"[{', '.join(spelt(value) for value in given.by_block().values())}] as means of the blocks", ranges]


def _trust_lines(decision: DecisionRecord) -> Iterator[str]:
    """Spells how far a decision can be trusted: its reliability, doubts, and the prediction of curves."""
    samples = [decision.samples.get(part, 0) for part in ("train", "validation")]
    of = "none" if decision.reliability is None else f"{decision.reliability:.2f}"
    if decision.curves is not None:
        yield f"reliability {of} (rank correlation of the allocations by two halves of the samples)"
        yield from (f"  warning: {doubt}" for doubt in doubts(None, samples))
        if decision.curves.get("sense") == "distance":
            yield f"angular distance over the span that goes {spelt(decision.curves['distance'])}"
            return
        if decision.curves.get("sense") == "gain":
            gain, form = decision.curves["predicted"], decision.curves["source"]["form"]
            yield f"{decision.curves['parameters']:,} parameters; predicted gain {gain:.3g} ({form}, to compare alone)"
            return
        predicted, actual = decision.curves["predicted"], decision.curves.get("actual")
        seen = "" if actual is None else f", actual {spelt(actual)} nats"
        yield f"predicted rise of the loss {spelt(predicted)} nats{seen}"
    elif decision.samples:
        yield f"reliability {of} (rank correlation of two halves of {samples[0]} + {samples[1]} samples)"
        yield from (f"  warning: {doubt}" for doubt in doubts(decision.reliability, samples))


def _learned_lines(record: RunRecord) -> Iterator[str]:
    """Spells how many rows and tokens were learned from, where that was chosen."""
    if record.selection:
        taken, of = (record.selection[part]["rows"] for part in ("taken", "of"))
        yield f"selected: {taken:,} of {of:,} train rows, listed in selection.csv"
    if record.tokens:
        kept, counted, left_out = (record.tokens[part] for part in ("kept", "counted", "rows_left_out"))
        without = f"; {left_out:,} rows have none" if left_out else ""
        yield f"learned from {kept:,} of {counted:,} tokens that count in the loss{without}"


def _metric_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Spells each metric with its interval, but for the accuracy, which stands in the table."""
    intervals = {name: (f"{name}_low", f"{name}_high") for name in metrics if f"{name}_low" in metrics}
    bounds = {bound for interval in intervals.values() for bound in interval}
    for name, value in metrics.items():
        if name not in bounds and not name.removeprefix("before/").startswith("accuracy"):
            interval = " to ".join(spelt(metrics[bound]) for bound in intervals.get(name, ()))
            yield f"{name}: {spelt(value)}" + f" (95 % interval {interval})" * bool(interval)


def show_table(frame: pd.DataFrame, title: str, on: Console) -> None:
    """Prints a frame as a table; only columns of long texts wrap."""
    shown = Table(title=title, title_justify="left")
    for column in frame.columns:
        texts = [value for value in frame[column] if isinstance(value, str)]
        is_long = column in WRAPPED or any(len(line) > 30 for text in texts for line in text.split("\n"))
        width = min(12, max(map(len, [str(column), *texts])))  # beside columns that do not wrap, some must be left
        shown.add_column(
            str(column), justify="left" if texts else "right", no_wrap=not is_long, min_width=width, overflow="fold"
        )
    for row in frame.itertuples(index=False):
        shown.add_row(*(escape(spelt(value)) for value in row))
    on.print(shown)


def spelt(value: object) -> str:
    """Spells a cell as it is shown, a number with three decimals or with separators."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, float | np.floating):
        if np.isinf(value):
            return "∞"
        if value and abs(value) < 5e-4:
            return "<0.001" if value > 0 else ">−0.001"
        return f"{value:,.0f}" if abs(value) >= 1000 or (value == int(value) and abs(value) > 1) else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int | np.integer) and abs(value) > 9999 else str(value)


def markdown(frame: pd.DataFrame, spell: Callable[[object], str] = spelt) -> str:
    """Spells a frame as a table in Markdown; line breaks within a cell become semicolons."""
    header, rule = list(map(str, frame.columns)), ["---"] * len(frame.columns)
    rows = [header, rule, *([spell(value) for value in row] for row in frame.itertuples(index=False))]
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join(line.replace("\n", "; ") for line in lines)


def inert(page: str) -> str:
    """Returns a page of Markdown in which names and errors, other people's text, can be neither HTML nor links."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", page).replace("](", "]\\(")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Turns quiet where `| head` reads no further, so that the work goes on to its end."""
        with suppress(SystemExit):
            super().on_broken_pipe()
