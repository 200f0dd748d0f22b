"""Names people type: what is allowed where, and which one was probably meant. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_choice(setting: str, got: object, allowed: Iterable[str]) -> None:
    """Raises ValueError naming the nearest allowed word if `got` is none of `allowed`."""
    allowed = tuple(allowed)
    if got not in allowed:
        raise ValueError(f"{setting} must be one of {', '.join(allowed)}; got {got!r}{did_you_mean(str(got), allowed)}")


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest allowed word, or nothing if none is near."""
    nearest = difflib.get_close_matches(got, list(allowed), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
