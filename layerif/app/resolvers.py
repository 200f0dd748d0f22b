"""The functions that a YAML can call as `${name:…}`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from layerif.record.job import folder_name, sweep_name


def register_resolvers() -> None:
    """Makes the resolvers known to OmegaConf; calling it again changes nothing."""
    for resolver in (folder_name, folder_of_arm, look_up, sweep_name):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def look_up(key: Any, table: Mapping[Any, Any], otherwise: Any) -> Any:
    """Returns the table's value for a key: `${look_up:${key},{x:a,y:b},otherwise}`."""
    return table.get(key, otherwise)


def folder_of_arm(arm: str) -> str:
    """Returns the folder of the same sweep's job that has this arm and all else alike: `${folder_of_arm:x}`."""
    hydra = HydraConfig.get()
    overrides = [f"arm={arm}" if override.startswith("arm=") else override for override in hydra.overrides.task]
    return str(Path(hydra.sweep.dir) / folder_name(overrides))
