"""The progress of long work: a bar on a terminal, and now and then a line where the output goes to a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

T = TypeVar("T")
Display = Literal["auto", "bar", "none"]

_DISPLAY: ContextVar[Display] = ContextVar("display", default="auto")
_SECONDS = 60.0  # between two lines


@contextmanager
def displayed(as_: Display) -> Iterator[None]:
    """Chooses how progress is shown inside: as a `bar`, not at all (`none`), or by the kind of output (`auto`)."""
    token = _DISPLAY.set(as_)
    try:
        yield
    finally:
        _DISPLAY.reset(token)


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Yields the items and shows how far the work on them is.

    Args:
        items: the pieces of work.
        what: a name for the work.
    """
    display = _DISPLAY.get()
    if display == "none":
        yield from items
    elif display == "bar" or sys.stderr.isatty():
        yield from tqdm(items, desc=what, leave=False)
    else:
        yield from _with_lines(items, what)


def _with_lines(items: Iterable[T], what: str) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= _SECONDS:
            last = now
            if isinstance(items, Sized):
                left = (now - start) / done * (len(items) - done) / 60
                log.info("%s: %d of %d done, about %.0f min left", what, done, len(items), max(left, 1))
            else:
                log.info("%s: %d done", what, done)
        yield item
