"""The command `layerif-report`, and what a single run prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from layerif.files import explained
from layerif.record import text
from layerif.record.frames import frames
from layerif.record.record import RunRecord
from layerif.report import plots, tables
from layerif.report.arms import runs_of
from layerif.report.expected import Expected
from layerif.report.page import page
from layerif.report.reading import read
from layerif.report.sections import Section, fitting, sections, summary

ON_PAGE_ONLY = ("Versions", "How to reproduce")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="layerif-report", description="The runs below a folder as report.html, report.md and report.csv in it."
    )
    parser.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/sweeps/default")
    parser.add_argument(
        "--expected", type=Path, metavar="FILE", help="published numbers: experiments/NAME/expected.json"
    )
    given = parser.parse_args(arguments)
    try:
        write(given.folder, expected=given.expected)
    except ValueError as error:
        print(f"layerif-report: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        why = f"the report cannot be written there: {explained(error, {})}"
        print(f"layerif-report: {why}; or give a copy of the folder that can be written", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def write(folder: Path, console: Console | None = None, *, expected: Path | None = None) -> None:
    """Leave report.html, report.md, report.csv and the plots of its layers in `folder`, then print its tables.

    expected: the file of the published numbers that the runs are held against. Raises ValueError where nothing in the
    folder can be read, or `expected` is not what it should be.
    """
    console = console or text.console()
    published = None if expected is None else Expected.read(expected)
    sweep = read(folder)
    fitted = fitting(published, sweep.jobs)
    runs = runs_of(sweep.jobs, fitted)  # once: the page, the console and the files call every run the same
    said, found = summary(sweep, runs, published), sections(sweep, runs, fitted)
    files = [folder / name for name in ("report.html", "report.md", "report.csv", "scores.png", "allocations.png")]
    files[0].write_text(page(sweep.name, said, found))
    files[1].write_text(_markdown(sweep.name, said, found))
    tables.in_full(runs, every_metric=True).to_csv(files[2], index=False)
    for plot, file in ((plots.plot_scores(sweep.records), files[3]), (plots.plot_allocations(runs), files[4])):
        if plot is not None:
            plot.save(file)
    for reason in sweep.left_out:
        console.print(f"[yellow]left out:[/] {text.escape(reason)}", highlight=False)
    for line in said:
        console.print(line, highlight=False, markup=False)
    for section in found:
        if section.title not in ON_PAGE_ONLY:
            _print(section, console)
    for file in filter(Path.exists, files):
        console.print(f"  {file}", highlight=False, soft_wrap=True)


def _print(section: Section, console: Console) -> None:
    if section.table is not None:
        shown = section.table.filter(items=section.console or section.table.columns)
        text.show(shown, section.title, console)
    elif section.findings:
        console.print(f"{section.title}:", highlight=False, markup=False)
    for finding in section.findings:
        console.print(f"  {finding}", highlight=False, markup=False)


def _markdown(title: str, summary: Sequence[str], found: Sequence[Section]) -> str:
    parts = [f"# {title}", *summary]
    for section in found:
        if section.table is None and not section.findings:
            continue
        parts.append(f"## {section.title}")
        parts += ["\n".join(f"- {finding}" for finding in section.findings)] if section.findings else []
        parts += [text.markdown(section.table)] if section.table is not None else []
        parts += section.said
    return "\n\n".join(parts) + "\n"


def print_run(record: RunRecord, folder: Path, console: Console | None = None) -> None:
    """One run's summary on the console, and its plots in its folder."""
    console = console or text.console()
    scores, values = record.scores, record.allocation["values"]  # no scores with an allocation from a file
    highest = ", ".join(record.layers[index] for index in np.argsort(scores)[::-1][:3])
    ranking = f"; highest: {highest}" if len(set(scores)) > 1 else ""
    console.print(f"\n{record.source}{ranking}", highlight=False, markup=False)
    console.print(f"{record.allocation['kind']} {values} (budget {record.allocation['budget']})", highlight=False)
    if record.metrics and (record.questions or record.parameters):  # a report of method=diagnose has no accuracy
        text.show(tables.in_full(runs_of([record])), record.config["task"]["name"], console)
    for name, value in record.metrics.items():
        if not name.removeprefix("before/").startswith("accuracy"):  # those stand in the table
            console.print(f"  {name}: {text.spelt(value)}", highlight=False)
    for note in record.notes:
        console.print(f"  note: {note}", highlight=False)
    frames(record)["layers"].to_csv(folder / "layers.csv", index=False)
    for name, plot in plots.plots_of_run(record).items():
        plot.save(folder / f"{name}.png")
