"""Composition: what Hydra composes is checked before Hydra builds anything from it.

Hydra imports the packages of its search path while it composes, and builds callbacks, launcher, sweeper and logging
handlers before the job's function runs. So the command line gives it a loader that checks, see `compat.compose_by`.
The same loader composes the jobs of a sweep, in whatever process the launcher runs them.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerif.app.growth import check_growth
from layerif.app.schema import check_plain
from layerif.checks import check_file_name
from layerif.files import check_yaml, conf_folder
from layerif.targets import allowed_target, check_targets, is_known_package

# Settings that say what code runs, by name or as a command. Only the command line may give them.
FROM_COMMAND_LINE = (
    "trusted_targets",
    "hydra.job.env_set",
    "hydra.launcher.additional_parameters",
    "hydra.launcher.setup",
    "hydra.launcher.ray.init.address",
    "hydra.launcher.ray.init.runtime_env",
    "hydra.launcher.ray.remote.runtime_env",
)
_BUILT = ("callbacks", "launcher", "sweeper")
_LOGGING = ("hydra_logging", "job_logging")
_REMEMBERED = 100  # configurations, of about half a megabyte
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# The folder of a run is known only when the run starts, as an absolute path.
_LATE = ("${hydra.runtime.output_dir}", "${hydra:runtime.output_dir}")


class Composer(ConfigLoaderImpl):
    """Hydra's loader, which refuses a configuration that would let Hydra run code of others.

    Args:
        config_search_path: where Hydra looks for YAMLs.
        given: what the command line gives, as from `from_command_line`.
    """

    def __init__(self, config_search_path: ConfigSearchPath, given: Mapping[str, Any]) -> None:
        super().__init__(config_search_path)
        self.given = given
        self.repository = _Repository(config_search_path, given.get("trusted_targets", ()))
        self._composed: dict[tuple[Any, ...], DictConfig] = {}

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        if validate_sweep_overrides:
            parsed = OverridesParser.create(config_loader=self).parse_overrides(overrides)
            self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        # Hydra composes everything twice: a command to find its mode, and a job of a sweep to see if it is legal.
        asked = (config_name, *overrides, run_mode)
        if (config := self._composed.pop(asked, None)) is None:
            config = super().load_configuration(config_name, overrides, run_mode, from_shell, False)
            if len(self._composed) < _REMEMBERED:
                self._composed[asked] = copy.deepcopy(config)
        return config

    def _load_configuration_impl(self, config_name: str | None, overrides: list[str], *rest: Any, **named: Any) -> Any:
        # All that Hydra composes comes by here; 1.4 composes the jobs of a sweep past `load_configuration`.
        config = super()._load_configuration_impl(config_name, overrides, *rest, **named)
        check_composed(config, self.given, len(overrides))
        return config

    def get_mode(self, config_name: str | None, overrides: list[str], *read: Any) -> Any:
        """Finds the mode of a run for Hydra 1.4, which leaves reading the overrides to us; 1.3 does not call this."""
        given = read or (OverridesParser.create(config_loader=self).parse_overrides(overrides),)
        return super().get_mode(config_name, overrides, *given)  # pyright: ignore[reportAttributeAccessIssue]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_composed": {}}  # a launcher sends the loader to other processes


def from_command_line(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the settings of FROM_COMMAND_LINE that these overrides give, as plain values.

    Raises:
        ValueError: `trusted_targets` is not one list for the whole command.
    """
    given = OmegaConf.create({})
    texts = [one for one in overrides if re.match(r"\+*(hydra|trusted_targets)\b[^/@]*=", one)]
    for override in OverridesParser.create().parse_overrides(texts) if texts else ():
        key, value = override.key_or_group, override.value()
        if key == "trusted_targets" and not (isinstance(value, list) and all(map(_is_dotted, value))):
            raise ValueError(
                f"{override.input_line} is not allowed; allowed: one list of dotted paths, as in "
                "'trusted_targets=[my_package]'"
            )
        if not override.is_sweep_override():  # Hydra refuses a sweep over its own settings
            OmegaConf.update(given, key, value, merge=True, force_add=True)
    return {setting: value for setting in FROM_COMMAND_LINE if (value := _plain(given, setting))}


def check_composed(config: DictConfig, given: Mapping[str, Any], num_overrides: int) -> None:
    """Refuses a composed configuration from which Hydra would build, or write, what it should not.

    The parts of which Hydra builds objects are resolved for good, so that nothing else is built than what is checked.

    Args:
        config: with the node `hydra`.
        given: what the command line gives, as from `from_command_line`.
        num_overrides: the number of overrides that it was composed with.

    Raises:
        ValueError: says which setting, and what is allowed.
    """
    check_growth(_as_texts(OmegaConf.to_container(config)))
    hydra = config.hydra
    if len(hydra.overrides.task) + len(hydra.overrides.hydra) != num_overrides:
        raise ValueError("hydra.overrides stands in a YAML; take it out, only the command line gives overrides")
    for setting in FROM_COMMAND_LINE:
        if (value := _plain(config, setting)) and value != given.get(setting):
            raise ValueError(
                f"{setting}={value} comes from a YAML, which must not say what code runs; allowed: the same on the "
                "command line, if you trust it"
            )
    for part in ("launcher", "sweeper"):
        if not OmegaConf.is_dict(hydra[part]):
            raise ValueError(f"hydra.{part}={hydra[part]} is not allowed; allowed: {part}=NAME, see layerif --help")
    if not isinstance(hydra.verbose, bool | str | ListConfig):
        raise ValueError(f"hydra.verbose={hydra.verbose} is not allowed; allowed: true, false, or names of loggers")
    for setting in ("outputs", "hydra.run.dir", "hydra.sweep.dir"):  # Hydra makes a folder before the job is checked
        check_plain(_plain(config, setting), setting)
    for setting, parent in (("name", config), ("hydra.job.name", hydra.job)):
        if _unresolved(parent, "name") is not None:
            _settle_key(parent, "name", setting)
            check_file_name(setting, parent.name, below="outputs/sweeps")
    trusted = given.get("trusted_targets", ())
    for part in (*_BUILT, *_LOGGING):
        _settle_key(hydra, part, f"hydra.{part}")
        check = _check_logging if part in _LOGGING else check_targets
        check(_unresolved(hydra, part), f"hydra.{part}", trusted)
    if space := OmegaConf.select(hydra, "sweeper.custom_search_space"):  # Optuna's sweeper calls it
        allowed_target(space, "hydra.sweeper.custom_search_space", trusted)
    _check_lines(_unresolved(hydra, "launcher"), "hydra.launcher")


class _Repository(ConfigRepository):
    """The YAMLs on a search path, on which packages must be known and files are bounded."""

    def __init__(self, config_search_path: ConfigSearchPath, trusted: Sequence[str]) -> None:
        self.trusted = trusted
        super().__init__(config_search_path)

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        for element in config_search_path.get_path():
            scheme, _, name = str(element.path).partition("://")
            package = name.replace("/", ".").strip(".")
            if scheme == "pkg" and not is_known_package(package, self.trusted):
                raise ValueError(
                    f"pkg://{name} is not allowed on the search path, because its package would be imported; allowed: "
                    "a folder (file:///folder), or a package that is registered in layerif.choices; for code that you "
                    f"trust, add trusted_targets=[{package.partition('.')[0]}] to the command line"
                )
        super().initialize_sources(config_search_path)

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() != "file" or Path(source.path) == conf_folder():
            return super().load_config(config_path)
        file = Path(source.path) / source._normalize_file_name(config_path)
        try:
            check_yaml(file)
            found = super().load_config(config_path)
        except RecursionError as error:
            raise ValueError(f"{file} is nested too deeply for a configuration; make it flatter") from error
        if found is not None and isinstance(found.config, DictConfig) and found.config.get("hydra", {}) is None:
            raise ValueError(f"{file} sets hydra to null; allowed: settings of Hydra's, or no key of this name")
        return found


def _plain(config: DictConfig, setting: str) -> Any:
    """Returns the value of a setting with every leaf as a text; None where it is empty or not there.

    Environment variables that keep the value they have are left out.
    """
    parent, _, key = setting.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    found = _unresolved(node, key) if isinstance(node, DictConfig) else None
    if setting == "hydra.job.env_set" and isinstance(found, Mapping):
        found = {name: value for name, value in found.items() if os.environ.get(str(name)) != value}
    return _as_texts(found) if found else None


def _is_dotted(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)*", name) is not None


def _as_texts(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _as_texts(value) for key, value in node.items()}
    return [_as_texts(value) for value in node] if isinstance(node, list) else str(node)


def _unresolved(node: DictConfig, key: str) -> Any:
    """Returns a setting as plain values, with interpolations as they are written; None where it is not there."""
    if key not in list(node):
        return None
    if OmegaConf.is_interpolation(node, key):
        written: Any = OmegaConf.to_container(node)
        return written[key]
    found = node.get(key)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def _settle_key(node: DictConfig | ListConfig, key: Any, setting: str) -> None:
    """Puts the value of an interpolation in its place, and of every one inside that value.

    What depends on the folder of the run stays, because it can only become a path in it.
    """
    if OmegaConf.is_interpolation(node, key):
        written: Any = OmegaConf.to_container(node)
        try:
            value = node[key]
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            if str(written[key]).startswith(_LATE):
                return
            raise ValueError(
                f"{setting}={written[key]} cannot be read before the run starts: {error}; write the value itself"
            ) from error
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{setting}={value!r} would be resolved a second time; allowed: a text without ${{…}}")
        node[key] = value
    if OmegaConf.is_missing(node, key):
        return
    value = node[key]
    if isinstance(value, DictConfig | ListConfig):
        for inner in list(value.keys()) if isinstance(value, DictConfig) else range(len(value)):
            _settle_key(value, inner, f"{setting}.{inner}")


def _check_logging(node: Any, setting: str, trusted: Sequence[str]) -> None:
    """Checks every name by which Python's logging configuration finds an object."""
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        path = f"{setting}.{key}"
        if isinstance(value, Mapping | list):
            _check_logging(value, path, trusted)
        elif key in ("()", "class", "queue", "listener"):
            allowed_target(value, path, trusted)
        elif isinstance(value, str) and value.startswith("ext://") and value not in _STREAMS:
            raise ValueError(f"{path}={value!r} is not allowed; allowed: {', '.join(_STREAMS)}")


def _check_lines(node: Any, setting: str) -> None:
    """Refuses a text of several lines: Slurm's launcher writes its settings into a script, a line each."""
    if isinstance(node, str) and len(node.splitlines()) > 1:
        raise ValueError(f"{setting}={node!r} is not allowed; allowed: a text of one line")
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        _check_lines(value, f"{setting}.{key}")
