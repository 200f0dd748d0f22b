"""The identity of a job: two runs are the same job if choices, settings and the content behind them are the same.

A choice is the name of a YAML in `conf/` (`estimator=datainf`), and a setting is a key of the resolved configuration.
Paths of classes (`_target_`) are not part of the identity, so a finished job stays the same when a file moves. This
module imports nothing heavy, because `layerif --help` must answer at once, and Hydra only where there is a run of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerif.files import check_yaml

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Root keys and groups that may differ between two runs of the same job. `small` is not among them, because a record
# says that it belongs to a small variant.
INCIDENTAL = ("dry_run", "rerun", "outputs", "store", "name", "logger", "launcher", "sweeper", "trusted_targets")
# Groups whose files only change other groups, so that the settings show them already.
_CHANGES = ("experiment", "arm", "size")
# Keys that are left out of the names of folders: incidental ones (but a dry run has a folder of its own), and the
# variant, which the folder above is named after.
_NOT_IN_FOLDERS = ({*INCIDENTAL} - {"dry_run"}) | {"small", "size"}
_KEPT_IN = {"outputs": "outputs", "store": "${outputs}/store"}


def choices_of_run() -> dict[str, str]:
    """Returns the choices that the current run was composed from, by group: `{"estimator": "datainf", …}`.

    A configuration that an earlier run left (`--config-path RUN/.hydra`) was composed by that run, so its choices are
    read from the file beside it.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return {}
    hydra = HydraConfig.get()
    found = hydra.runtime.choices
    sources = [Path(source.path) for source in hydra.runtime.config_sources if source.provider == "main"]
    beside = [file for folder in sources if (file := folder / "hydra.yaml").is_file()]
    if "estimator" not in found and beside:
        check_yaml(beside[0])
        found = OmegaConf.select(OmegaConf.load(beside[0]), "hydra.runtime.choices", default={})
    # Names with a slash are Hydra's own choices and the parts of an experiment.
    return {str(group): str(choice) for group, choice in found.items() if "/" not in str(group)}


def settings_of(config: DictConfig) -> dict[str, Any]:
    """Returns the resolved configuration without incidental keys, and without root keys that are null.

    Paths that are derived from `outputs` and `store` (the folder of the converted model, say) are resolved as if these
    two had their defaults, because the place of the results is incidental, too.
    """
    from omegaconf import OmegaConf

    given = OmegaConf.to_container(config)
    assert isinstance(given, dict)
    plain = OmegaConf.to_container(OmegaConf.create(given | _KEPT_IN), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in INCIDENTAL and value is not None}


def identity(
    choices: Mapping[str, str], settings: Mapping[str, Any], inputs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns the identity of a job: values that JSON can hold, equal if and only if two jobs are the same.

    Args:
        choices: as from `choices_of_run`.
        settings: as from `settings_of`.
        inputs: hashes of the content that settings only name (model, rows, files).
    """
    made_of = {group: choice for group, choice in choices.items() if group not in (*INCIDENTAL, *_CHANGES)}
    parts = {"choices": made_of, "settings": _without_targets(settings), "inputs": dict(inputs or {})}
    # A job may have failed because of NaN or infinity, which JSON does not know: they are compared as words.
    return json.loads(json.dumps(parts), parse_constant=str)


def is_same_job(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Tells if two identities are the same to the letter: `keep=1` is one layer, and `keep=1.0` all of them."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def folder_name(overrides: Iterable[str]) -> str:
    """Returns the name of a job's folder in a sweep: its overrides, with a hash where they do not fit a folder name."""
    named = ",".join(sorted(override for override in overrides if _root(override) not in _NOT_IN_FOLDERS))
    if not named:
        return "default"
    if len(named) <= 120 and re.fullmatch(r"[\w.,=+-]+", named):
        return named
    # The last part of a path is shown: the others are alike in all jobs, and would push the rest out of the name.
    shown = re.sub(r"(?<==)[^,=]*/(?=[^,/=]+(?:,|$))", "", named)
    readable = re.sub(r"[^\w.,=-]+", "-", shown)[:60].strip("-")
    return f"{readable}-{hashlib.sha256(named.encode()).hexdigest()[:10]}"


def sweep_name(name: str, recipe: str | None, small: bool) -> str:
    """Returns the name of a sweep's folder, with its recipe and its size."""
    return name + (f"_{recipe}" if recipe else "") + ("_small" if small else "")


def tracking_of(overrides: Iterable[str]) -> list[str]:
    """Returns the overrides of the logger: they do not make another job, but a job may have failed because of them."""
    return sorted(override for override in overrides if _root(override) == "logger")


def _root(override: str) -> str:
    """Returns the root key or group that an override sets: `logger` of `+logger.wandb.tags=[a]`."""
    return re.split(r"[.@=]", override.lstrip("+~"))[0]


def _without_targets(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _without_targets(value) for key, value in node.items() if key != "_target_"}
    return [_without_targets(value) for value in node] if isinstance(node, list | tuple) else node
