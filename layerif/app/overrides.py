"""The command line's overrides in the form that Hydra gets."""

from __future__ import annotations

from collections.abc import Iterable

_SIZES = {"true": "small", "false": "full"}


def with_size(arguments: Iterable[str]) -> list[str]:
    """Writes `small=true` as the choice `size=small`, which defaults lists can read, and `small=false` as `size=full`.

    A value that is neither stays as it is, and Hydra refuses it as a value of the root key `small`.
    """
    return [_with_size(argument) for argument in arguments]


def _with_size(argument: str) -> str:
    key, _, value = argument.partition("=")
    sizes = [_SIZES.get(word.strip().lower()) for word in value.split(",")]
    return f"size={','.join(filter(None, sizes))}" if key.lstrip("+") == "small" and all(sizes) else argument
