"""The command `layerif-report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from layerif.files import explained
from layerif.record import text
from layerif.report import tables
from layerif.report.arms import runs_of
from layerif.report.expected import Expected
from layerif.report.page import page
from layerif.report.reading import read_jobs
from layerif.report.sections import Section, fitting, sections, summary

ON_PAGE_ONLY = ("Versions", "How to reproduce")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; the arguments are those of the command line where none are given."""
    parser = argparse.ArgumentParser(
        prog="layerif-report", description="The runs below a folder as report.html, report.md and report.csv in it."
    )
    parser.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/sweeps/default")
    parser.add_argument(
        "--expected", type=Path, metavar="FILE", help="published numbers: experiments/NAME/expected.json"
    )
    parser.add_argument("--wandb", action="store_true", help="also keep the report as an artifact of wandb")
    given = parser.parse_args(arguments)
    try:
        write_report(given.folder, expected=given.expected, keep_in_wandb=given.wandb)
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


def write_report(
    folder: Path, console: Console | None = None, *, expected: Path | None = None, keep_in_wandb: bool = False
) -> None:
    """Leaves report.html, report.md, report.csv and the plots of layers in `folder`, then prints the tables.

    Args:
        folder: of a run or a sweep.
        console: where the tables are printed; None: a new one.
        expected: the file of the published numbers that the runs are held against.
        keep_in_wandb: also keep the files as an artifact of wandb, see `layerif.record.tracking.track_report`.

    Raises:
        ValueError: nothing in the folder can be read, `expected` is malformed, or wandb cannot start.
    """
    console = console or text.console()
    published = None if expected is None else Expected.read(expected)
    jobs = read_jobs(folder)
    fitted = fitting(published, jobs.jobs)
    runs = runs_of(jobs.jobs, fitted)  # made once, so that the page, the console and the files use the same names
    said, found = summary(jobs, runs, published), sections(jobs, runs, fitted)
    plots = ("scores.png", "allocations.png", "matrices.png", "clusters.png")
    files = [folder / name for name in ("report.html", "report.md", "report.csv", *plots)]
    files[0].write_text(page(jobs.name, said, found))
    files[1].write_text(_markdown(jobs.name, said, found))
    tables.in_full(runs, every_metric=True).to_csv(files[2], index=False)
    for section in found:
        if section.plot is not None and section.file:
            section.plot.save(folder / section.file)
    for reason in jobs.left_out:
        console.print(f"[yellow]left out:[/] {text.escape(reason)}", highlight=False)
    for line in said:
        console.print(line, highlight=False, markup=False)
    for section in found:
        if section.title not in ON_PAGE_ONLY:
            _print(section, console)
    written = [file for file in files if file.exists()]
    for file in written:
        console.print(f"  {file}", highlight=False, soft_wrap=True)
    if keep_in_wandb:
        from layerif.record.tracking import track_report  # Lightning takes seconds to import, and few ask for wandb

        console.print(f"  wandb: {track_report(written, jobs.name, folder)}", highlight=False, soft_wrap=True)


def _print(section: Section, console: Console) -> None:
    if section.table is not None:
        shown = section.table.filter(items=section.console or section.table.columns)
        text.show_table(shown, section.title, console)
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
    return text.inert("\n\n".join(parts) + "\n")
