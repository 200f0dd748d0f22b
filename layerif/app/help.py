"""The text of `layerif --help`, straight from the YAMLs.

Hydra would load and copy every group for the same text, which takes longer than reading it.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

import yaml

from layerif.files import conf_folder

_ELSEWHERE = ("--config", "-cd", "-cp", "-cn", "hydra.searchpath", "+hydra.searchpath")


def is_asked(arguments: Sequence[str]) -> bool:
    """Returns True if the command line asks for help on our own YAMLs; Hydra lists those of another folder."""
    return bool({"--help", "-h"}.intersection(arguments)) and not any(map(_is_elsewhere, arguments))


def help_text() -> str:
    """Returns the help: the template of `conf/config.yaml` with its header and the groups with their choices."""
    lines = (conf_folder() / "config.yaml").read_text().splitlines()
    # The YAML parser takes a tenth of a second for the whole file, and the help is its end.
    told = yaml.safe_load("\n".join(lines[lines.index("  help:") :]))["help"]
    template = told["template"].replace("${hydra.help.header}", told["header"])
    return Template(template).substitute(APP_CONFIG_GROUPS=_groups())


def _groups() -> str:
    folders = sorted(folder for folder in conf_folder().iterdir() if folder.is_dir())
    choices = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    return "\n".join(f"{group}: {', '.join(names)}" for group, names in choices.items())


def _is_elsewhere(argument: str) -> bool:
    return argument.startswith(_ELSEWHERE)
