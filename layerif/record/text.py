"""Frames as text: on the console, in Markdown, and cell by cell."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

WRAPPED = ("run", "model", "arm", "from", "to", "both with", "profile", "and", "finding", "note", "command", "state")


def console() -> Console:
    """As wide as the terminal; a log file has no width, and a table cut to 80 columns cannot be read."""
    found = _Console()
    return found if found.is_terminal else _Console(width=140)


def show(frame: pd.DataFrame, title: str, on: Console) -> None:
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
    header, rule = list(map(str, frame.columns)), ["---"] * len(frame.columns)
    rows = [header, rule, *([spell(value) for value in row] for row in frame.itertuples(index=False))]
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join(line.replace("\n", "; ") for line in lines)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """`| head` reads no further: rich turns quiet, and what is left to do is done."""
        with suppress(SystemExit):
            super().on_broken_pipe()
