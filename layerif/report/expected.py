"""`expected.json` of an experiment: the published numbers, and which runs they are to be held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from layerif.checks import did_you_mean
from layerif.files import conf_folder

_GROUPS = ("model", "task", "estimator", "allocator", "method", "pruner")
_EXAMPLE = '"of": {"model": "mistral_7b", "method": "lora_moe", "allocator.budget": 160}'


@dataclass(frozen=True, kw_only=True)
class Expected:
    """source: where the numbers are printed. metric: as in records, a fraction.

    of: what was run for all of the numbers: model, method, budget or target, and what else the source fixes. Of a small
    variant (`small=true`) they never are. arms, columns: by name, what was run for theirs. values: arm → column →
    number; what was not published is left out. A column without conditions is a mean over others: no run is of it.

    Conditions are as on the command line: a bare group (`estimator`) means the choice, a dotted key a value of the
    resolved configuration. A model of the hub is also met by a folder called like it, a pruner only by a method that
    prunes.
    """

    source: str
    metric: str
    of: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, file: Path) -> Expected:
        """Raises ValueError naming the key that is wrong."""
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}; give an experiment's expected.json") from error
        _check(content, file)
        return cls(**content)

    def arm(self, config: Mapping[str, Any]) -> str | None:
        """The first arm whose conditions a resolved configuration meets, all of them."""
        return next((name for name, conditions in self.arms.items() if meets(config, conditions)), None)

    def column(self, config: Mapping[str, Any]) -> str | None:
        """The first column whose conditions a resolved configuration meets."""
        return next((name for name, needed in self.columns.items() if needed and meets(config, needed)), None)

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Whether a run is of what the numbers are of, and so may be held against them."""
        return meets(config, {"small": False, **self.of})

    def value(self, config: Mapping[str, Any]) -> float | None:
        """What was published of the arm and column that a resolved configuration belongs to."""
        return self.values.get(self.arm(config) or "", {}).get(self.column(config) or "")

    @property
    def said_of(self) -> str:
        """The model by its own name, the other conditions as on the command line."""
        others = [f"{key}={_spelt(value)}" for key, value in self.of.items() if key != "model"]
        model = [choice("model", name).get("name", name) for key, name in self.of.items() if key == "model"]
        return " with ".join([*model, *filter(None, [", ".join(others)])])


def meets(config: Mapping[str, Any], conditions: Mapping[str, Any]) -> bool:
    return all(_meets(config, key, value) for key, value in conditions.items())


def _meets(config: Mapping[str, Any], key: str, value: Any) -> bool:
    if key.split(".")[0] == "pruner" and not _meets(config, "method", "prune"):
        return False  # every configuration has the group, and no other method looks at it
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return value is None and part not in (node or ())
        node = node[part]
    if key not in _GROUPS or not isinstance(value, str):
        return _same(node, value)
    wanted = choice(key, value)
    if key == "model" and "name" in wanted:  # from the hub or from a folder, it is the same
        name, folder = str(node.get("name")), Path(str(node.get("path"))).name
        return name.lower() == wanted["name"].lower() or folder.lower() == Path(wanted["name"]).name.lower()
    return not node if not wanted else all((node or {}).get(name) == content for name, content in wanted.items())


def _same(one: Any, other: Any) -> bool:
    """2468 and "2468" are the same on the command line."""
    return one == other or str(one) == str(other)


def _spelt(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def chosen(group: str, node: Mapping[str, Any]) -> str:
    """The choice that a resolved node was made by: the YAML with its class, and its name where it has one."""
    target = str(node.get("_target_"))
    files = sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))
    alike = [name for name in files if choice(group, name).get("_target_") == target]
    named = [name for name in alike if choice(group, name).get("name", node.get("name")) == node.get("name")]
    exact = [name for name in named if "name" in choice(group, name)]
    return (exact or named or [target.rpartition(".")[2].lower()])[0]


@cache
def choice(group: str, name: str) -> dict[str, Any]:
    """`_target_` and `name` of a choice, from its YAML and those it starts from. ValueError for an unknown one."""
    folder = conf_folder() / group
    file = folder / f"{name}.yaml"
    if not file.exists():
        available = sorted(file.stem for file in folder.glob("*.yaml"))
        nearest = did_you_mean(name, available)
        raise ValueError(
            f"{group}={name} is no choice of the group {group!r}{nearest}; available: {', '.join(available)}"
        )
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    found: dict[str, Any] = {}
    for default in content.get("defaults", []):
        if isinstance(default, str) and default != "_self_" and "@" not in default:
            found |= choice(group, default)
    return found | {key: content[key] for key in ("_target_", "name") if content.get(key) not in (None, MISSING)}


def _check(content: Any, file: Path) -> None:
    def refuse(key: str, got: object, allowed: str) -> None:
        raise ValueError(f"{file}: {key} is {json.dumps(got)[:80]}; it must be {allowed}")

    if not isinstance(content, dict):
        refuse("the whole", content, "an object")
    if "model" in content:
        given = json.dumps(content["model"])[:80]
        raise ValueError(
            f"{file}: model ({given}) is no key of its own; name it in 'of', with all that the numbers were measured "
            f"with, as on the command line, such as {_EXAMPLE}"
        )
    names = [field.name for field in fields(Expected)]
    for key in names:
        if key not in content:
            example = f", such as {_EXAMPLE}" * (key == "of")
            raise ValueError(f"{file} has no {key!r}; it needs {', '.join(names)}{example}")
    for key in content:
        if key not in names:
            raise ValueError(f"{file}: {key} is not known{did_you_mean(key, names)}; it needs {', '.join(names)}")
    for key in ("source", "metric"):
        if not isinstance(content[key], str) or not content[key]:
            refuse(key, content[key], "a text")
    if not isinstance(content["of"], dict) or not any(key.split(".")[0] == "model" for key in content["of"]):
        refuse("of", content["of"], f"an object of conditions, one of them the model's, such as {_EXAMPLE}")
    for part in ("arms", "columns", "values"):
        if not isinstance(content[part], dict) or (not content[part] and part != "values"):
            refuse(part, content[part], "an object that is not empty")
        for name, inner in content[part].items():
            if not isinstance(inner, dict):
                refuse(f"{part}.{name}", inner, "an object")
    named = {f"{part}.{name}": inner for part in ("arms", "columns") for name, inner in content[part].items()}
    for place, conditions in {"of": content["of"], **named}.items():
        for key, value in conditions.items():
            if key in _GROUPS:
                if not isinstance(value, str):
                    refuse(f"{place}.{key}", value, "the name of a choice")
                try:
                    choice(key, value)
                except ValueError as error:
                    raise ValueError(f"{file}: {place}: {error}") from error
    _check_values(content, refuse)


def _check_values(content: Mapping[str, Any], refuse: Any) -> None:
    for arm, row in content["values"].items():
        if arm not in content["arms"]:
            refuse(f"values.{arm}", row, f"of an arm: {', '.join(content['arms'])}")
        for column, value in row.items():
            if column not in content["columns"]:
                refuse(f"values.{arm}.{column}", value, f"of a column: {', '.join(content['columns'])}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                refuse(f"values.{arm}.{column}", value, "a number")
            if "accuracy" in content["metric"] and not 0 <= value <= 1:
                refuse(f"values.{arm}.{column}", value, "a fraction (published percentages divided by 100)")


def columns_of(expected: Expected, configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that some run belongs to."""
    met = {expected.column(config) for config in configs}
    return [name for name in expected.columns if name in met]
