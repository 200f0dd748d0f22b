"""The report as one page: HTML and CSS without scripts, pictures inside, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from layerif.record.text import WRAPPED, spelt
from layerif.report.sections import Section

TEMPLATE = "page.html.jinja"  # lies beside this file; it escapes names and errors, which are other people's text


def page(title: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """Renders the report as HTML.

    Args:
        title: of the page.
        summary: its first lines.
        sections: in their order.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cells": cells,
        "kinds": kinds,
        "breadth": breadth,
        "breakable": breakable,
        "begins": begins,
    }
    return environment.get_template(TEMPLATE).render(title=title, summary=summary, sections=sections)


def cells(frame: pd.DataFrame) -> list[list[list[str]]]:
    """Returns the cells of each row, and the lines of each cell."""
    return [[spelt(value).split("\n") for value in row] for row in frame.itertuples(index=False)]


def begins(section: Section) -> list[bool]:
    """Tells the rows that begin a group, see `Section.grouped_by`."""
    assert section.table is not None
    keys = list(section.table.filter(items=section.grouped_by).itertuples(index=False, name=None))
    return [bool(section.grouped_by) and row > 0 and keys[row] != keys[row - 1] for row in range(len(section.table))]


def breadth(section: Section) -> str:
    """Returns the classes that decide how a section prints: many columns in small type, few rows on one page."""
    if section.table is None:
        return "whole"
    num_rows, num_columns = section.table.shape
    classes = {"wide": num_columns > 7, "whole": num_rows <= 6}
    return " ".join(name for name, is_given in classes.items() if is_given)


def breakable(text: str) -> Markup:
    """Returns the text with places to break after every = and . and within long words.

    A reader who copies the text copies none of them.
    """
    words = [re.findall(r"[^=./,]{1,24}[=./,]*|[=./,]+", word) for word in text.split(" ")]
    return Markup(" ").join(Markup("<wbr>").join(pieces) for pieces in words)


def kinds(frame: pd.DataFrame) -> list[str]:
    """Returns the class of each column: numbers stand right, long texts wrap."""
    found = []
    for name in frame.columns:
        is_text = any(isinstance(value, str) for value in frame[name])
        found.append("text" if name in (*WRAPPED, "error") else "short" if is_text else "number")
    return found
