"""Functions that a YAML can call as `${name:…}`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from layerif.record.job import folder_name


def register_resolvers() -> None:
    """Make the resolvers known to OmegaConf; calling it again changes nothing."""
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("small", small, replace=True)
    OmegaConf.register_new_resolver("when", when, replace=True)
    OmegaConf.register_new_resolver("folder_of_arm", folder_of_arm, replace=True)


def small(if_small: Any, otherwise: Any, *, _root_: DictConfig) -> Any:
    """`${small:a,b}` in a YAML: a where the root key `small` is true, else b. A list of arms stands in quotes."""
    return if_small if _root_.small else otherwise


def when(value: Any, equals: Any, then: Any, otherwise: Any) -> Any:
    """`${when:${key},x,a,b}` in a YAML: a where the key is x, else b."""
    return then if value == equals else otherwise


def folder_of_arm(arm: str) -> str:
    """`${folder_of_arm:x}` in a YAML: the folder of the same sweep's job that has the arm x and all else alike."""
    hydra = HydraConfig.get()
    overrides = [f"arm={arm}" if override.startswith("arm=") else override for override in hydra.overrides.task]
    return str(Path(hydra.sweep.dir) / folder_name(overrides))
