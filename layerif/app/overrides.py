"""The command line's overrides in the form that Hydra gets."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

_SIZES = {"true": "small", "false": "full"}


def with_size(arguments: Iterable[str]) -> list[str]:
    """Writes `small=true` as the choice `size=small`, which defaults lists can read, and `small=false` as `size=full`.

    A value that is neither stays as it is, and Hydra refuses it as a value of the root key `small`.
    """
    return [_with_size(argument) for argument in arguments]


def options_first(arguments: Sequence[str], overrides: Sequence[str]) -> str:
    """Returns the message for settings on both sides of an option, which Hydra does not read: the command to give.

    Args:
        arguments: the command line.
        overrides: the settings among them.
    """
    options = [argument for argument in arguments if argument not in overrides]
    command = shlex.join(["layerif", *options, *overrides])
    return f"settings stand on both sides of {options[0]}; options come first: {command}"


def _with_size(argument: str) -> str:
    key, _, value = argument.partition("=")
    sizes = [_SIZES.get(word.strip().lower()) for word in value.split(",")]
    return f"size={','.join(filter(None, sizes))}" if key.lstrip("+") == "small" and all(sizes) else argument
