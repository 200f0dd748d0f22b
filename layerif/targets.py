"""The targets that a configuration may name, and the objects that are built from one.

A target is resolved without being called. The object itself is then judged, by the module that defines it. The path
that leads to it says nothing: `layerif.files.os.getcwd` begins in a module of ours. An import runs code, too, so a
module is imported only where its package may hold allowed targets. This module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

ENTRY_POINTS = "layerif.choices"  # the group in which an installed package registers itself

# Modules that define allowed classes, and what a class of theirs must derive from (empty: anything). Functions are not
# among them: `layerif.files.claim_folder` would empty any folder, and a class method could load any checkpoint.
_ALLOWED = (
    ("layerif", ""),
    ("lightning.pytorch.trainer", ""),
    ("lightning.pytorch.loggers", ""),
    ("lightning.pytorch.strategies", ""),
    ("lightning.pytorch.plugins", ""),
    ("lightning.fabric.plugins", ""),  # those that Lightning's trainer takes, too
    ("hydra._internal.core_plugins", "hydra.plugins.launcher.Launcher"),
    ("hydra._internal.core_plugins", "hydra.plugins.sweeper.Sweeper"),
    ("hydra_plugins", "hydra.plugins.launcher.Launcher"),
    ("hydra_plugins", "hydra.plugins.sweeper.Sweeper"),
    ("optuna.samplers", ""),
    ("optuna.pruners", ""),
    ("logging", "logging.Handler"),
    ("logging", "logging.Formatter"),
)
# This launcher runs its settings as commands, on machines that it rents.
_LEFT_OUT = "hydra_plugins.hydra_ray_launcher.ray_aws_launcher"
_IN_WORDS = (
    "classes of layerif, of Lightning (trainer, loggers, strategies, plugins), Hydra (launchers, sweepers), Optuna "
    f"(samplers, pruners) and logging, and what an installed package registers in {ENTRY_POINTS}"
)


def allowed_target(target: Any, setting: str, trusted: Sequence[str] = ()) -> Any:
    """Resolves a target, and refuses one that a configuration may not name.

    Args:
        target: the dotted path of a class.
        setting: where it stands, for the message: `estimator._target_`.
        trusted: packages, modules or objects that the command line names, whose targets are allowed as well.

    Returns:
        The class; of a trusted or registered package also a function.

    Raises:
        ValueError: the object is not allowed, or it cannot be found.
    """
    if not isinstance(target, str):
        raise ValueError(f"{setting}={target!r} is not allowed; allowed: the dotted path of a class, as a text")
    own = {_package(module) for module, _ in _ALLOWED}
    found = _resolved(target, setting, own)
    if _is_allowed(found):
        return found
    others = (*trusted, *registered_modules())
    found = _resolved(target, setting, own | set(map(_package, others)))
    if callable(found) and any(_belongs(found, other) for other in others):
        return found
    leads = "" if found is None else f", it leads to {_name(found)}"
    trust = target if found is None else "…" if isinstance(found, ModuleType) else _name(found)
    raise ValueError(
        f"{setting}={target!r} is not allowed{leads}; allowed: {_IN_WORDS}; for code that you trust, add "
        f"trusted_targets=[{trust}] to the command line"
    )


def hydra_patterns(trusted: Sequence[str] = ()) -> list[str]:
    """Puts this rule into the patterns of Hydra's own whitelist, as far as they can say it.

    A pattern cannot ask for a base class. Hydra's rule is therefore the wider of the two, and ours, which is asked
    first, stays.

    Args:
        trusted: as for `allowed_target`.
    """
    modules = dict.fromkeys(module for module, _ in _ALLOWED)
    named = [name for other in (*trusted, *registered_modules()) for name in (other, f"{other}.*")]
    return [*(f"{module}.*" for module in modules), *named]


def check_targets(node: Any, setting: str, trusted: Sequence[str] = ()) -> None:
    """Refuses settings that hold, at any depth, a target that is not allowed. Nothing is built.

    Args:
        node: plain settings, with their interpolations resolved.
        setting: where they stand.
        trusted: as for `allowed_target`.

    Raises:
        ValueError: as from `allowed_target`.
    """
    for path, found in nodes_with_target(node, setting):
        allowed_target(found["_target_"], f"{path}._target_", trusted)


def nodes_with_target(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields every mapping with a target inside plain settings, the outer ones first, with its dotted path."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from nodes_with_target(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from nodes_with_target(value, f"{path}.{number}")


def build(node: Any, setting: str, trusted: Sequence[str] = (), **given: Any) -> Any:
    """Builds the objects that plain settings describe, the inner ones first.

    Hydra's `instantiate` would resolve interpolations again, and build what had been a harmless text when it was
    checked. Here every text stays as it is.

    Args:
        node: plain settings, with their interpolations resolved; what holds no target is returned as it is.
        setting: where they stand.
        trusted: as for `allowed_target`.
        **given: arguments in place of settings of the outermost object.

    Raises:
        ValueError: as from `allowed_target`, or a keyword of Hydra is not supported.
    """
    if isinstance(node, list | tuple):
        return [build(value, f"{setting}.{number}", trusted) for number, value in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    made = {key: build(value, f"{setting}.{key}", trusted) for key, value in node.items() if key not in given} | given
    if "_target_" not in node:
        return made
    target = allowed_target(made.pop("_target_"), f"{setting}._target_", trusted)
    made.pop("_convert_", None)  # all is plain here
    is_partial = made.pop("_partial_", False)
    refuse_keywords(made, setting)
    return partial(target, **made) if is_partial else target(**made)


def refuse_keywords(node: Mapping[str, Any], setting: str) -> None:
    """Refuses the keywords of Hydra by which settings would not be checked by their names, or not be built."""
    for keyword in ("_args_", "_recursive_"):
        if keyword in node:
            raise ValueError(f"{setting}.{keyword} is not allowed; allowed: settings by their names")


@cache
def registered_modules() -> tuple[str, ...]:
    """Lists the modules that installed packages registered in the entry-point group `layerif.choices`."""
    from importlib.metadata import entry_points  # a quarter of a second, and few configurations need it

    return tuple(sorted({point.module for point in entry_points(group=ENTRY_POINTS)}))


def is_known_package(name: str, trusted: Sequence[str] = ()) -> bool:
    """Tells if a package may be imported for its YAMLs: ours, Hydra's, a trusted or a registered one."""
    known = ("layerif", "hydra", *trusted)
    return any(_is_under(name, place) for place in known) or any(_is_under(name, one) for one in registered_modules())


def _resolved(target: str, setting: str, packages: set[str]) -> Any:
    """Follows a dotted path, and imports modules of these packages only.

    Returns:
        The object at its end; the first module of another package on it; None where it begins in another package.
    """
    first, *others = target.split(".")
    if first not in packages:
        return None
    try:
        found: Any = import_module(first)
        for name in others:
            if not isinstance(found, ModuleType):
                found = getattr(found, name)
            elif _package(found.__name__) not in packages:
                return found
            else:
                inner = f"{found.__name__}.{name}"
                found = getattr(found, name) if hasattr(found, name) else import_module(inner)
    except Exception as error:  # a module may raise anything when it is imported
        raise ValueError(f"{setting}={target!r} cannot be imported: {error}; check the path and its package") from error
    return found


def _is_allowed(found: Any) -> bool:
    if not isinstance(found, type) or _is_under(found.__module__, _LEFT_OUT):
        return False
    bases = {"", *map(_name, found.__mro__)}
    return any(_is_under(found.__module__, module) and base in bases for module, base in _ALLOWED)


def _belongs(found: Any, other: str) -> bool:
    """Tells if an object is defined under a name that is trusted, or is itself what that name stands for."""
    if _is_under(_name(found), other):
        return True
    if "." not in other:
        return False
    named = _resolved(other, "trusted_targets", {_package(other)})
    return named is found or (not isinstance(named, ModuleType) and named == found)


def _name(found: Any) -> str:
    """Returns the module that defines an object, with the object's name there."""
    if isinstance(found, ModuleType):
        return f"the module {found.__name__}"
    return f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', type(found).__qualname__)}"


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_under(name: str, place: str) -> bool:
    return f"{name}.".startswith(f"{place}.")
