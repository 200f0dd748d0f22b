"""What makes two runs the same job: the same choices, the same settings, and the same content behind them.

A choice is the name of a YAML in `conf/` (`estimator=datainf`), a setting is a key of the resolved configuration. The
paths of classes (`_target_`) are neither: a file that moves makes no finished job another one. Nothing heavy is
imported here, because `layerif --help` must answer at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

# Root keys and groups that may differ between two runs of the same job. `small` may not: a record says that it is of a
# small variant.
INCIDENTAL = ("dry_run", "rerun", "outputs", "store", "name", "logger", "launcher", "sweeper")
# Groups that change other groups, and so are seen in the settings.
_CHANGES = ("experiment", "arm", "size")
# Keys that name no folder: incidental ones (a dry run has a folder of its own), and the variant, which the folder above
# is named after.
_NOT_IN_FOLDERS = ({*INCIDENTAL} - {"dry_run"}) | {"small", "size"}
_KEPT_IN = {"outputs": "outputs", "store": "${outputs}/store"}


def choices_of_run() -> dict[str, str]:
    """The choices that the run at hand was composed from, by group: `{"estimator": "datainf", …}`.

    A configuration that an earlier run left (`--config-path RUN/.hydra`) was composed then, and its choices stand
    beside it.
    """
    if not HydraConfig.initialized():
        return {}
    hydra = HydraConfig.get()
    found = hydra.runtime.choices
    sources = [Path(source.path) for source in hydra.runtime.config_sources if source.provider == "main"]
    beside = [file for folder in sources if (file := folder / "hydra.yaml").is_file()]
    if "estimator" not in found and beside:
        found = OmegaConf.select(OmegaConf.load(beside[0]), "hydra.runtime.choices", default={})
    # Below a group stand Hydra's own choices and the parts of an experiment.
    return {str(group): str(choice) for group, choice in found.items() if "/" not in str(group)}


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration without incidental keys, and without root keys that are null.

    What follows from where results are kept (the folder of the converted model, say) is as incidental as that place.
    """
    given = OmegaConf.to_container(config)
    assert isinstance(given, dict)
    plain = OmegaConf.to_container(OmegaConf.create(given | _KEPT_IN), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in INCIDENTAL and value is not None}


def identity(
    choices: Mapping[str, str], settings: Mapping[str, Any], inputs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What equal jobs have equal, as JSON holds it.

    Args:
        choices: as from `choices_of`.
        settings: as from `settings_of`.
        inputs: hashes of the content that settings only name (model, rows, files).
    """
    made_of = {group: choice for group, choice in choices.items() if group not in (*INCIDENTAL, *_CHANGES)}
    parts = {"choices": made_of, "settings": _without_targets(settings), "inputs": dict(inputs or {})}
    # A number that JSON does not know may be what is wrong with a failed job: it is compared as a word.
    return json.loads(json.dumps(parts), parse_constant=str)


def folder_name(overrides: Iterable[str]) -> str:
    """The folder of a sweep's job, from its overrides; hashed where they hold what a folder name cannot."""
    named = ",".join(sorted(override for override in overrides if _root(override) not in _NOT_IN_FOLDERS))
    if not named:
        return "default"
    if len(named) <= 120 and re.fullmatch(r"[\w.,=+-]+", named):
        return named
    readable = re.sub(r"[^\w.,=-]+", "-", named)[:60].strip("-")
    return f"{readable}-{hashlib.sha256(named.encode()).hexdigest()[:10]}"


def sweep_name(name: str, recipe: str | None, small: bool) -> str:
    """The name of a sweep's folder, which tells its recipe and its size."""
    return name + (f"_{recipe}" if recipe else "") + ("_small" if small else "")


def tracking_of(overrides: Iterable[str]) -> list[str]:
    """The overrides that say how a job is tracked: that makes no other job, and may yet be why it failed."""
    return sorted(override for override in overrides if _root(override) == "logger")


def _root(override: str) -> str:
    """The root key or group that an override sets: `logger` of `+logger.wandb.tags=[a]`."""
    return re.split(r"[.@=]", override.lstrip("+~"))[0]


def _without_targets(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _without_targets(value) for key, value in node.items() if key != "_target_"}
    return [_without_targets(value) for value in node] if isinstance(node, list | tuple) else node
