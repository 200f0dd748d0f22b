"""Messages for errors that a user can mend: they say what was wrong, what was given, what is allowed, what to do.

A message keeps Hydra's own words where these say as much, but never its advice to force a key in with `+`. This module
imports nothing heavy, because `layerif --help` must answer at once.
"""

from __future__ import annotations

import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerif import PACKAGE
from layerif.checks import did_you_mean, unknown_key
from layerif.files import conf_folder, explained

_NEEDS_EXTRA = {
    "hydra/launcher/joblib": ("launcher=joblib", "joblib"),
    "hydra/launcher/submitit_local": ("launcher=submitit_local", "submitit"),
    "hydra/launcher/submitit_slurm": ("launcher=submitit", "submitit"),
    "hydra/launcher/ray": ("launcher=ray", "ray"),
    "hydra/sweeper/optuna": ("sweeper=optuna", "optuna"),
}
# Settings that name a folder which runs write to.
_FOLDERS = ("outputs", "store", "hydra.run.dir", "hydra.sweep.dir")
# OmegaConf's name of a type -> words for the values that it takes.
_KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}


def of_the_user(error: BaseException) -> BaseException | None:
    """Returns the error that a user can act on; None for a defect of ours or of a library.

    Hydra wraps what a class raises: the cause is returned, except for errors in Hydra's own settings.
    """
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return error if "full_key: hydra." in str(error) else of_the_user(error.__cause__)
    if isinstance(error, HydraException | OmegaConfBaseException | OSError | yaml.YAMLError):
        return error
    # Our own code and Hydra's raise ValueError for the user to read; one that comes from torch or numpy is our defect.
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = {PACKAGE, Path(str(hydra.__file__)).parent}
    return error if isinstance(error, ValueError) and ours.intersection(raised_in.parents) else None


def explain(error: BaseException, overrides: list[str]) -> str:
    """Returns one message that says what went wrong, with the nearest valid name where something was mistyped.

    Args:
        error: one that `of_the_user` returned.
        overrides: the command line, as `key=value`.
    """
    said = f"{error}\n{error.__cause__ or ''}"
    if isinstance(error, MissingConfigException):
        return _explain_missing(error, overrides)
    if isinstance(error, OverrideParseException):
        return _explain_unreadable(error.override)
    if isinstance(error, InstantiationException) and (
        unexpected := re.search(r"unexpected keyword argument '(\w+)'[\s\S]*full_key: (\S+)", said)
    ):
        return _explain_key(f"{unexpected[2]}.{unexpected[1]}", said, overrides)
    if "Config group override must be" in said:
        return _explain_no_choice(overrides)
    if isinstance(error, ConfigCompositionException):
        within = re.match(r"In '[^']+': ", said)
        where = within[0] if within else ""
        if wrong := re.search(r"Value '(.*)' (?:of type|is not).*\b(Integer|Float|bool)\b[\s\S]*full_key: (\S+)", said):
            return f"{where}{wrong[3]}={wrong[1]!r} is not allowed; allowed: {_KINDS[wrong[2]]}"
        if several := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", said):
            key, value = several.groups()
            return f"{key} has several values: -m sweeps over them, {key}=[{value}] is a list; {_quoted(key, value)}"
        if found := re.search(r"Could not override '([^']+)'", said) or re.search(r"[Kk]ey '([^']+)'", said):
            whole = re.search(rf"full_key: ({re.escape(found[1])}\.\S+)", said)  # the settings that are given as {{…}}
            return where + _explain_key(whole[1] if whole else found[1], said, overrides)
        if merged := re.match("Error merging override (.*)", said):
            return f"{merged[1]} is not allowed: {_plain(str(error.__cause__))}"
    if isinstance(error, HydraException | yaml.YAMLError):
        return _plain(str(error) or str(error.__cause__))
    if "for integer string conversion" in said:
        long = next((one for one in overrides if re.search(r"\d{1000}", one)), "a setting")
        return f"{long.partition('=')[0]} is given a whole number of too many digits"
    if isinstance(error, OSError):
        given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
        folders = {"outputs": "outputs"} | {key: given[key].strip("'\"") for key in _FOLDERS if key in given}
        return " ".join(explained(error, folders).split())
    return " ".join(str(error).split()) or type(error).__name__


def first_of(override: str) -> str:
    """Returns an override as the first job of a sweep gets it: with the first value, or the start of an interval."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    value: Any = parsed.value()
    first = value.start if parsed.is_interval_sweep() else next(parsed.sweep_string_iterator())
    return f"{parsed.get_key_element()}={first}"


def _explain_missing(error: MissingConfigException, overrides: list[str]) -> str:
    missing = str(error.missing_cfg_file or "")
    if missing in _NEEDS_EXTRA:
        choice, extra = _NEEDS_EXTRA[missing]
        plugin = " and pip install --no-deps hydra-ray-launcher==1.2.2" if extra == "ray" else ""
        return f"{choice} needs a plugin of Hydra that is not installed: pip install 'layerif[{extra}]'{plugin}"
    group, _, choice = missing.rpartition("/")
    if not group:
        return f"{_plain(str(error))} (a folder of your own is given by its absolute path: --config-path=/folder)"
    options = error.options or sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))
    wrong = f"{group}={choice} is not a choice of the group {group!r}{did_you_mean(choice, options)}"
    return f"{_named_by(group, choice, overrides)}{wrong}; available: {', '.join(options)}"


def _named_by(group: str, choice: str, overrides: list[str]) -> str:
    """Names the experiment that asks for a choice; empty where the command line itself asks for it."""
    given = _given(overrides)
    if "experiment" not in given or choice in re.split(r"[\[\],]", given.get(group, "")):
        return ""
    return f"experiment={given['experiment']} names a choice that does not exist: "


def _explain_no_choice(overrides: list[str]) -> str:
    """Explains a group that is set to null or to a number: which one, and its choices."""
    for group, value in _given(overrides).items():
        is_name = isinstance(yaml.safe_load(value), str | list)
        if not is_name and (conf_folder() / group).is_dir():
            choices = sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))
            return f"{group}={value} is not a choice of the group {group!r}; available: {', '.join(choices)}"
    return "a group is set to a value that is not the name of a choice; give a name, or a list of names"


def _explain_unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{override} cannot be read: {_quoted(key, value)}" if equals else f"{key!r} has no value: write {key}=…"


def _quoted(key: str, value: str) -> str:
    return f"""a text with any of , ( ) [ ] {{ }} needs quotes within quotes: '{key}="{value}"'"""


def _explain_key(key: str, said: str, overrides: list[str]) -> str:
    """Explains an unknown key: which part of it is unknown, which keys are there, and which other choice has it."""
    groups = sorted(file.name for file in conf_folder().iterdir() if file.is_dir())
    if "defaults list" in said:  # an experiment overrides a group that does not exist
        return f"{_plain(said)} {key!r} is not a group{did_you_mean(key, groups)}; groups: {', '.join(groups)}"
    if "not in 'Config'" in said and key in groups:
        return (
            f"{key}={_given(overrides).get(key, '…')} sets {key!r}, which is not a key of the configuration; "
            "the first line of its YAML must be: # @package _global_"
        )
    # The choices alone say which keys there are. The other overrides are left out, because they may be wrong, too.
    chosen = [first_of(override) for override in overrides if re.split("[@=]", override.lstrip("+"))[0] in groups]
    config = _composed("config", chosen) or _composed("config", [])
    node, missing = _walk(config, key)
    if not missing:
        return f"not every job has the key {key!r}; sweep the jobs without it by themselves"
    parent = missing.rpartition(".")[0]
    name, group = missing.rpartition(".")[2], parent.removeprefix("hydra.").partition(".")[0]
    keys = [each for each in map(str, node) if each != "hydra" and not re.fullmatch(r"_\w+_", each)]
    if group in groups and not did_you_mean(name, keys):
        choices = [file.stem for file in sorted((conf_folder() / group).glob("*.yaml"))]
        others = [choice for choice in choices if not _walk(_composed(f"{group}/{choice}", []), missing)[1]]
        if others:
            has = f"no {name}" if keys else "no settings"
            choice = config["hydra"]["runtime"]["choices"].get(group)
            return f"{key}: {group}={choice} has {has}; choose {group}={' or '.join(others)}"
    return unknown_key(missing, keys)


def _composed(name: str, overrides: list[str]) -> dict[str, Any]:
    """Composes a YAML of `conf/` with these choices and resolves nothing; empty where it cannot be composed."""
    from hydra import compose, initialize_config_dir

    try:
        with warnings.catch_warnings(), initialize_config_dir(str(conf_folder()), version_base="1.3"):
            warnings.simplefilter("ignore")  # a choice that starts from another is no configuration by itself
            composed = OmegaConf.to_container(compose(name, overrides, return_hydra_config=True))
    except (HydraException, OmegaConfBaseException):
        return {}
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def _walk(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Returns the node at the deepest known part of the key, and the path of the first unknown part, if any."""
    node, path = config, key.split(".")
    for depth, part in enumerate(path, 1):
        if part not in node:
            return node, ".".join(path[:depth])
        node = node[part] if isinstance(node[part], dict) else {}
    return node, ""


def _given(overrides: list[str]) -> dict[str, str]:
    return {key: value for key, _, value in (override.lstrip("+").partition("=") for override in overrides)}


def _plain(said: str) -> str:
    """Returns Hydra's first paragraph in one line, without its advice to force a key in."""
    return " ".join(said.split("\n\n")[0].split("To append to your config")[0].split())
