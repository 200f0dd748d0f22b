"""The schema of the root configuration, and the check of every group against its class.

Nothing heavy is imported here, because `layerif --help` must answer at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from layerif.app.resolvers import register_resolvers
from layerif.checks import Seed, check_file_name, check_value, did_you_mean, is_finite, shown, unknown_key
from layerif.compat import resolve_in_defaults
from layerif.files import conf_folder
from layerif.targets import allowed_target, build, nodes_with_target, refuse_keywords


@dataclass
class Config:
    """The root keys. Groups are untyped here, because the signature of each `_target_` is its schema, see `check`."""

    model: Any = MISSING
    task: Any = MISSING
    score_task: Any = None
    estimator: Any = MISSING
    allocator: Any = MISSING
    method: Any = MISSING
    pruner: Any = MISSING
    selection: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    probe: Any = MISSING
    data: Any = MISSING
    fit: Any = MISSING
    evaluation: Any = MISSING
    name: str = MISSING
    seed: int = 0
    dry_run: bool = False
    rerun: bool | str = False
    objective: str | None = None
    recipe: Any = MISSING
    small: bool = False
    trusted_targets: list[str] = field(default_factory=list)
    outputs: str = MISSING
    store: str = MISSING


def register() -> None:
    """Makes the schema and the resolvers known to Hydra; calling it again changes nothing."""
    ConfigStore.instance().store(name="schema", node=Config)
    register_resolvers()
    resolve_in_defaults()


# Root keys that hold the settings of one object.
_OBJECTS = (
    "model",
    "task",
    "estimator",
    "allocator",
    "method",
    "pruner",
    "selection",
    "trainer",
    "probe",
    "data",
    "fit",
    "evaluation",
)
# Root keys whose choices are words.
_CHOICES = {
    "rerun": Literal[False, "failed", True],
    "objective": Literal[None, "validation/loss", "reliability"],
}


def from_conf(choice: str, *overrides: str) -> Any:
    """Returns the object behind one choice, for use from Python: `from_conf("model=local", "model.path=/folder")`."""
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", [choice, *overrides])
    group, trusted = choice.partition("=")[0], list(config.trusted_targets)
    plain: Any = OmegaConf.to_container(config[group], resolve=True)
    check_plain(plain, group)
    _check_kinds({group: plain})
    check_nodes({group: plain}, trusted)
    return build(plain, group, trusted)


def check(config: DictConfig) -> None:
    """Binds every `_target_` of the resolved configuration to its signature.

    Args:
        config: the composed configuration.

    Raises:
        ValueError: names the key, its value, the values that are allowed and the nearest valid name.
    """
    check_root(config)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    check_plain(plain)
    _check_kinds(plain)
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    if plain.get("small") and choices.get("experiment") == choices.get("arm") == "none":
        raise ValueError(
            "small=true chooses the small variant of an experiment, but no experiment is chosen, so it would change "
            "nothing; name one (experiment=table1_experts_mistral, say), or leave it out"
        )
    if "size" in choices:
        check_size(small=bool(plain.get("small")), size=choices["size"])
    method = plain.get("method") or {}
    recipe = (plain.get("recipe") or {}).get("name")
    if recipe and "warmup_steps" not in method:
        raise ValueError(
            f"the recipe {recipe} is a way to fine-tune, and method={choices.get('method')} does not fine-tune; leave "
            "it out (experiment=NAME in place of [NAME,upstream]), or use method=lora_moe"
        )
    scored = plain.get("score_task")
    if scored is not None and not _has_target(scored):
        name = scored if isinstance(scored, str) else "NAME"
        raise ValueError(
            f"score_task={shown(scored)} stands where a whole task belongs; say +task@score_task={name}, which puts "
            "that task there, or score_task=null for scores on the task's own rows"
        )
    check_nodes(plain, plain.get("trusted_targets") or ())


def check_plain(node: Any, path: str = "") -> None:
    """Refuses a value that JSON or a number of 64 bits cannot hold, and the character that no path can have.

    The record of the run could not be written, or a library would fail where the work is half done.

    Args:
        node: a value, or dictionaries and lists of values.
        path: of the node in the configuration.

    Raises:
        ValueError: names the first such value: an infinity, say, or bytes.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            inside = f"{path}.{key}" if path else str(key)
            check_plain(key, inside)
            check_plain(value, inside)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_plain(value, f"{path}[{index}]")
    elif isinstance(node, float) and not is_finite(node):
        raise ValueError(f"{path}={node} is not allowed; allowed: a finite number")
    elif isinstance(node, int) and abs(node) >= 2**63:
        raise ValueError(f"{path}={shown(node)} is not allowed; allowed: a whole number that 64 bits can hold")
    elif isinstance(node, str) and "\0" in node:
        raise ValueError(f"{path}={node!r:.80} is not allowed; allowed: a text without the character NUL")
    elif not isinstance(node, str | int | float | None):
        raise ValueError(f"{path}={node!r} is not allowed; allowed: a text, a number, true, false or null")


def _check_kinds(plain: Mapping[str, Any]) -> None:
    """Refuses root keys of another kind, which a configuration without our schema can have: a text as estimator."""
    for key, hint in typing.get_type_hints(Config).items():
        if key in plain and hint is not Any:
            _check_value(key, plain[key], hint)
    for key in ("logger", "recipe"):
        if not isinstance(plain.get(key, {}), dict):
            raise ValueError(f"{key}={plain[key]} is not allowed; allowed: settings by name, or {{}} for none")
    objects = {key: plain[key] for key in _OBJECTS if key in plain}
    for key, node in (objects | {f"logger.{name}": node for name, node in plain.get("logger", {}).items()}).items():
        if not _has_target(node):
            raise ValueError(
                f"{key}={node} is not allowed; allowed: settings with a _target_, as every choice has them"
            )


def _has_target(node: Any) -> bool:
    return isinstance(node, dict) and "_target_" in node


def check_size(*, small: bool, size: str) -> None:
    """Refuses a root key `small` that contradicts the group `size`, whose files make the small variant.

    Raises:
        ValueError: the two disagree.
    """
    if small != (size == "small"):
        raise ValueError(f"small={small} and size={size} disagree; give size=small, or small=true on the command line")


def check_root(config: DictConfig) -> None:
    """Checks the root keys by themselves, which a sweep can do before its first job.

    Raises:
        ValueError: as from `check`.
    """
    allowed = [field.name for field in dataclasses.fields(Config)]
    for key in map(str, config):
        if key not in (*allowed, "hydra"):
            raise ValueError(unknown_key(key, allowed))
    for key, hint in _CHOICES.items():
        if key in config:
            _check_value(key, config[key], hint)
    check_value("seed", config.get("seed", 0), Seed)
    check_file_name("name", config.get("name", "default"), below="outputs/sweeps")


def check_nodes(plain: Mapping[str, Any], trusted: Sequence[str] = ()) -> None:
    """Binds every `_target_` of plain settings to its signature.

    Args:
        plain: settings by root key, with their interpolations resolved.
        trusted: as for `layerif.targets.allowed_target`.

    Raises:
        ValueError: as from `check`.
    """
    for path, node in nodes_with_target(plain):
        _check_node(path, node, trusted)


def _check_node(path: str, node: Mapping[str, Any], trusted: Sequence[str]) -> None:
    target = allowed_target(node["_target_"], f"{path}._target_", trusted)
    refuse_keywords(node, path)
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a trusted class that is written in C may have none
        return
    if node.get("_partial_") and dataclasses.is_dataclass(target):
        raise ValueError(f"{path}._partial_={node['_partial_']} is not allowed; allowed: false, for a whole object")
    given = {str(key): value for key, value in node.items() if not re.fullmatch(r"_\w+_", str(key))}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in given:
        if key not in parameters and not open_ended:
            raise ValueError(
                f"{path}.{key} is not known to {node['_target_']}{did_you_mean(key, parameters)}; "
                f"allowed: {', '.join(name for name in parameters if name != 'self')}"
            )
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in parameters.items():
        is_needed = parameter.default is parameter.empty and parameter.kind not in variable
        if is_needed and name not in given and not node.get("_partial_"):
            raise ValueError(f"{path} has no {name!r}, which {node['_target_']} needs; give it with +{path}.{name}=…")
    try:
        hints = typing.get_type_hints(target if dataclasses.is_dataclass(target) else target.__init__)
    except (NameError, TypeError):  # another library has annotations that only a type checker can resolve, or none
        return
    for key, value in given.items():
        if key in hints and not any(nodes_with_target(value)):  # nodes with a target are bound on their own
            _check_value(f"{path}.{key}", value, hints[key])


def _check_value(path: str, value: Any, hint: Any) -> None:
    """Refuses a value that does not fit its annotation.

    The value is checked strictly, as JSON, so that it is used just as it was checked: "no" is a text and not false, and
    a whole number is also a float.
    """
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    if value == MISSING:
        raise ValueError(f"{path} has no value: give one with {path}=…")
    try:
        TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except PydanticUserError:  # a type of another library
        return
    except ValidationError as error:
        choices = [str(choice) for choice in _literals(hint)]
        others = [_KINDS.get(each["type"], each["msg"].lower()) for each in error.errors()]
        kinds = [kind for kind in dict.fromkeys(others) if kind]
        if type(None) in typing.get_args(hint):
            kinds.append("null")
        allowed = f"{', '.join([*choices, *kinds])}{did_you_mean(str(value), choices)}"
        in_list = f", as in '{path}=[{value}]'" if "a list" in kinds and isinstance(value, str) else ""
        raise ValueError(f"{path}={value!r} is not allowed; allowed: {allowed}{in_list}") from error


# Pydantic's name of an error -> words for the values that are allowed. Choices and null are added by `_check_value`.
_KINDS = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text (in quotes, where it looks like a number)",
    "list_type": "a list",
    "literal_error": "",
    "none_required": "",
}


def _literals(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
    else:
        for argument in typing.get_args(hint):
            yield from _literals(argument)
