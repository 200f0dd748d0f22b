"""Names people type: what is allowed where, and which one was probably meant. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def check_choice(setting: str, got: object, allowed: Iterable[str]) -> None:
    """Raises ValueError naming the nearest allowed word if `got` is none of `allowed`."""
    allowed = tuple(allowed)
    if got not in allowed:
        raise ValueError(f"{setting} must be one of {', '.join(allowed)}; got {got!r}{did_you_mean(str(got), allowed)}")


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest allowed word, or nothing if none is near."""
    nearest = difflib.get_close_matches(got, list(allowed), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """Of a key that is not there, by its whole path: what was probably meant, and what its parent has."""
    parent, _, name = key.rpartition(".")
    allowed = list(allowed)
    where = f"in {parent!r}" if parent else "at the top"
    return f"{key!r} is no key of the configuration{did_you_mean(name, allowed)}; allowed {where}: {', '.join(allowed)}"


def check_unique(layers: Sequence[str], values: Sequence[object], *, what: str) -> None:
    """Raises ValueError unless there is one value for each layer, at least one, and no name twice."""
    if not layers or len(layers) != len(values):
        raise ValueError(
            f"there must be one value per layer, at least one, in {what}; got {len(values)} for {len(layers)} layers"
        )
    if len(set(layers)) != len(layers):
        twice = next(layer for index, layer in enumerate(layers) if layer in layers[:index])
        raise ValueError(f"{what} must not name the layer {twice!r} twice; give every layer one value")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
