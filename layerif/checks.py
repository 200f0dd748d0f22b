"""Checks of the values that people type: names, ranges, one value per layer. This module imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt


def check_choice(setting: str, got: object, allowed: Iterable[str]) -> None:
    """Refuses a word that is not one of `allowed`, and names the nearest one."""
    allowed = tuple(allowed)
    if got not in allowed:
        nearest = did_you_mean(str(got), allowed)
        raise ValueError(f"{setting}={got!r} is not allowed; allowed: {', '.join(allowed)}{nearest}")


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """Gives ` (did you mean 'x'?)` for the nearest allowed word, or an empty text if none is near."""
    nearest = difflib.get_close_matches(got, list(allowed), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """Writes the message for an unknown key, given by its whole path: the nearest name, and the keys of its parent."""
    parent, _, name = key.rpartition(".")
    allowed = list(allowed)
    where = f"in {parent!r}" if parent else "at the top"
    return (
        f"{key!r} is not a key of the configuration{did_you_mean(name, allowed)}; allowed {where}: {', '.join(allowed)}"
    )


def check_file_name(setting: str, got: object, *, below: str) -> None:
    """Refuses a text that is not the name of one folder, which would lead elsewhere or could not be made.

    Args:
        setting: for the message.
        got: the value.
        below: the folder that it is made in.

    Raises:
        ValueError: the text is empty or too long, or holds a slash or a character that cannot be printed.
    """
    is_name = isinstance(got, str) and got.isprintable() and "/" not in got and len(got.encode(errors="replace")) <= 200
    if not is_name or str(got).strip() in ("", ".", ".."):
        raise ValueError(
            f"{setting}={got!r} is not allowed; allowed: the name of a folder below {below}, without a slash and of at "
            "most 200 characters"
        )


def check_unique(layers: Sequence[str], values: Sequence[object], *, what: str) -> None:
    """Refuses values unless there is one for each layer, at least one, and each layer is named once, by a text."""
    if not layers or len(layers) != len(values):
        raise ValueError(
            f"there must be one value per layer, at least one, in {what}; got {len(values)} for {len(layers)} layers"
        )
    unnamed = [layer for layer in layers if not isinstance(layer, str)]
    if unnamed:
        raise ValueError(f"{what} must name each layer by a text; got {shown(unnamed[0])}")
    if len(set(layers)) != len(layers):
        twice = next(layer for index, layer in enumerate(layers) if layer in layers[:index])
        raise ValueError(f"{what} must not name the layer {twice!r} twice; give every layer one value")


def shown(value: object, length: int = 80) -> str:
    """Spells a value for a message, a text in quotes, and cuts it where it is longer than `length` characters."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of too many digits
        return "a number of thousands of digits"
    return text if len(text) <= length else f"{text[:length]}…"


def listed(names: Sequence[str], most: int) -> str:
    """Lists the first `most` names, and counts the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def how_many(number: int, what: str) -> str:
    """Counts things in words: `1 run`, `2 runs`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def is_number(value: object) -> bool:
    """Tells a number from anything else, `True` and `False` included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_object(got: object, *, what: str) -> dict[str, Any]:
    """Gives a JSON object as it is, and an empty one for null.

    Args:
        got: parsed JSON.
        what: its name in the message.

    Raises:
        ValueError: it is neither.
    """
    if got is not None and not isinstance(got, dict):
        raise ValueError(f"{what} must be an object; got {shown(got)}")
    return got or {}


def is_finite(number: Any) -> bool:
    """Tells if a number can be calculated with: not NaN, not infinite, and no whole number that no float can hold."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


# Ranges that settings have in common. A field annotated with one of them is refused outside it by `check_fields`.
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Lt(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]


def check_fields(settings: Any, where: str) -> None:
    """Refuses the first field of a dataclass that lies outside the range or the choices of its annotation.

    An annotation is a type, a `Literal`, a union of these with None, a sequence of them, or
    `Annotated[type, Ge(1), …, "advice"]` with bounds of `annotated_types`; a text among the bounds says what to do
    instead. Numbers are finite.

    Args:
        settings: an instance of a dataclass.
        where: what its fields are called on the command line, before the dot: `probe`.

    Raises:
        ValueError: names the field, what it got, what is allowed and the nearest allowed word.
    """
    for name, hint in _hints(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, str) and value == "???":
            continue
        check_value(f"{where}.{name}", value, hint)


def check_arguments(function: Callable[..., Any], where: str, **given: Any) -> None:
    """Refuses the first argument of a function that lies outside its annotation, see `check_fields`.

    Args:
        function: a function, or the `__init__` of a class that cannot be a dataclass.
        where: what its arguments are called on the command line, before the dot.
        **given: the arguments.
    """
    hints = get_type_hints(function, include_extras=True)
    for name, value in given.items():
        check_value(f"{where}.{name}", value, hints[name])


def check_value(setting: str, value: Any, hint: Any) -> None:
    """Refuses a value outside the range or the choices of an annotation, see `check_fields`."""
    kind, bounds, advice = _parts(hint)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        members = [member for member in get_args(kind) if member is not type(None)]
        if value is None and len(members) < len(get_args(kind)):
            return
        if len(members) == 1:
            check_value(setting, value, members[0])
        return
    if origin is Literal:
        check_choice(setting, value, get_args(kind))
        return
    if origin in (list, tuple, Sequence) and not isinstance(value, str) and isinstance(value, Iterable):
        for item in value:
            check_value(setting, item, get_args(kind)[0])
        return
    if kind not in (int, float):
        return
    number = Integral if kind is int else Real
    fits = isinstance(value, number) and not isinstance(value, bool) and is_finite(value)
    if not fits or any(not _BOUNDS[type(bound)][0](value, bound) for bound in bounds):
        words = " and ".join(_BOUNDS[type(bound)][1](bound) for bound in bounds)
        what = "a whole number" if kind is int else "a finite number"
        allowed = "; ".join(filter(None, [f"{what} {words}".rstrip(), advice]))
        raise ValueError(f"{setting}={shown(value)} is not allowed; allowed: {allowed}")


_BOUNDS: dict[type, tuple[Callable[[Any, Any], bool], Callable[[Any], str]]] = {
    Ge: (lambda value, bound: value >= bound.ge, lambda bound: f"of at least {bound.ge}"),
    Gt: (lambda value, bound: value > bound.gt, lambda bound: f"above {bound.gt}"),
    Le: (lambda value, bound: value <= bound.le, lambda bound: f"of at most {bound.le}"),
    Lt: (lambda value, bound: value < bound.lt, lambda bound: f"below {bound.lt}"),
}


@cache
def _hints(kind: type) -> dict[str, Any]:
    named = {field.name for field in fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if name in named}


def _parts(hint: Any) -> tuple[Any, list[Any], str]:
    """Splits an annotation into its type, its bounds and its advice."""
    if get_origin(hint) is not Annotated:
        return hint, [], ""
    kind, *extras = get_args(hint)
    inner, bounds, advice = _parts(kind)
    bounds = [*bounds, *(extra for extra in extras if type(extra) in _BOUNDS)]
    return inner, bounds, next((extra for extra in extras if isinstance(extra, str)), advice)


@contextmanager
def called_as_arguments(where: str, names: Sequence[str]) -> Iterator[None]:
    """Names settings in messages as the arguments that they are here: `num_train` in place of `probe.num_train`.

    Args:
        where: the part of the command line's names before the dot.
        names: the settings that are arguments.
    """
    try:
        yield
    except (ValueError, MemoryError) as error:
        said = re.sub(rf"\b{where}\.({'|'.join(names)})\b", r"\1", str(error))
        if type(error) not in (ValueError, MemoryError) or said == str(error):
            raise
        raise type(error)(said) from error


def made(kind: Callable[..., Any], called: str, **settings: Any) -> Any:
    """Makes a dataclass of settings, and refuses by name what is not one of them.

    Args:
        kind: the dataclass.
        called: the function that takes the settings, for the message.
        **settings: the settings.

    Raises:
        ValueError: names the nearest setting, and lists all.
    """
    allowed = [field.name for field in fields(kind) if field.init]  # type: ignore[arg-type]
    for name in settings:
        if name not in allowed:
            raise ValueError(
                f"{called} takes no {name!r}{did_you_mean(name, allowed)}; its settings are {', '.join(allowed)}"
            )
    return kind(**settings)


def require(module: str, extra: str = "lab") -> Any:
    """Imports a module of an extra.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ImportError(f"this needs {package}, which is not installed: pip install 'layerif[{extra}]'") from error
