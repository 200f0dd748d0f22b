"""`expected.json` of an experiment: the published numbers, and the runs that they are held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from layerif.checks import did_you_mean, is_finite, is_number
from layerif.files import conf_folder, parse_json
from layerif.record.frames import is_logarithmic
from layerif.record.names import name_in_conf, origins
from layerif.record.record import Job

_GROUPS = ("model", "task", "estimator", "allocator", "method", "pruner")
_EXAMPLE = '"of": {"model": "mistral_7b", "method": "lora_moe", "allocator.budget": 160}'


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Published numbers, with the conditions that a run must meet to be held against them.

    A condition is written as on the command line. A bare group (`estimator`) stands for the choice; it is also met by a
    choice that starts from the given one (`experts_gemma` from `experts`), and a model of the hub by a folder called
    like it. A dotted key stands for a value of the resolved configuration. Conditions on the pruner are met only by a
    method that prunes.

    Attributes:
        source: where the numbers are printed.
        metric: its name in records; a fraction.
        of: the conditions of all numbers: model, method, budget or target, and all else that the source fixes. A
            small variant (`small=true`) never meets it.
        arms: the conditions of each arm, by name.
        columns: the conditions of each column, by name. A column without conditions is a mean over others: no run
            belongs to it.
        values: arm → column → number, as far as it was published.
    """

    source: str
    metric: str
    of: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, file: Path) -> Expected:
        """Reads and checks a file.

        Raises:
            ValueError: names the key that is wrong.
        """
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}; give an experiment's expected.json") from error
        _check(content, file)
        return cls(**content)

    def arm(self, job: Job) -> str | None:
        """Returns the first arm whose conditions the job meets, all of them."""
        return next((name for name, conditions in self.arms.items() if meets(job, conditions)), None)

    def column(self, job: Job) -> str | None:
        """Returns the first column whose conditions the job meets."""
        return next((name for name, needed in self.columns.items() if needed and meets(job, needed)), None)

    def is_of(self, job: Job) -> bool:
        """Tells if the job ran with the conditions of the numbers, and so may be held against them."""
        return meets(job, {"small": False, **self.of})

    def value(self, job: Job) -> float | None:
        """Returns the number that was published for the arm and column of the job."""
        return self.values.get(self.arm(job) or "", {}).get(self.column(job) or "")

    @property
    def said_of(self) -> str:
        """The conditions of all numbers in words: the model by its own name, the others as on the command line."""
        others = [f"{key}={_spelt(value)}" for key, value in self.of.items() if key != "model"]
        model = [name_in_conf("model", name) or name for key, name in self.of.items() if key == "model"]
        return " with ".join([*model, *filter(None, [", ".join(others)])])


def meets(job: Job, conditions: Mapping[str, Any]) -> bool:
    """Tells if a job meets all conditions, see `Expected`.

    Args:
        job: its record or failure.
        conditions: by keys as on the command line.
    """
    return all(_meets(job, key, value) for key, value in conditions.items())


def _meets(job: Job, key: str, value: Any) -> bool:
    if key.split(".")[0] == "pruner" and not _meets(job, "method", "prune"):
        return False  # every configuration has this group, but other methods ignore it
    if key in _GROUPS and isinstance(value, str):
        return _is_choice(job, key, value)
    node: Any = job.config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return value is None and part not in (node or ())
        node = node[part]
    return _same(node, value)


def _is_choice(job: Job, group: str, wanted: str) -> bool:
    published = name_in_conf(group, wanted) if group == "model" else None
    if published is not None:  # a model is the same from the hub and from a folder
        name, folder = str(job.config["model"].get("name")), Path(str(job.config["model"].get("path"))).name
        return name.lower() == published.lower() or folder.lower() == Path(published).name.lower()
    return wanted in origins(group, job.choices.get(group, ""))


def _same(one: Any, other: Any) -> bool:
    """Compares two values as the command line does, where 2468 and "2468" are the same."""
    return one == other or str(one) == str(other)


def _spelt(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_choice(group: str, name: str) -> None:
    available = sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))
    if name not in available:
        nearest = did_you_mean(name, available)
        raise ValueError(
            f"{group}={name} is not a choice of the group {group!r}{nearest}; available: {', '.join(available)}"
        )


def _check(content: Any, file: Path) -> None:
    def refuse(key: str, got: object, allowed: str) -> None:
        raise ValueError(f"{file}: {key} is {json.dumps(got)[:80]}; it must be {allowed}")

    if not isinstance(content, dict):
        refuse("the whole", content, "an object")
    if "model" in content:
        given = json.dumps(content["model"])[:80]
        raise ValueError(
            f"{file}: model ({given}) is not a key of its own; name it in 'of', with all that the numbers were "
            f"measured with, as on the command line, such as {_EXAMPLE}"
        )
    names = [field.name for field in fields(Expected)]
    for key in names:
        if key not in content:
            example = f", such as {_EXAMPLE}" if key == "of" else ""
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
                    _check_choice(key, value)
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
            if not is_number(value) or not is_finite(value):
                refuse(f"values.{arm}.{column}", value, "a finite number")
            if is_logarithmic(content["metric"]) and value <= 0:
                refuse(f"values.{arm}.{column}", value, "above 0")
            if "accuracy" in content["metric"] and not 0 <= value <= 1:
                refuse(f"values.{arm}.{column}", value, "a fraction (published percentages divided by 100)")


def columns_of(expected: Expected, jobs: Sequence[Job]) -> list[str]:
    """Returns the columns that some job belongs to.

    Args:
        expected: the published numbers.
        jobs: finished and failed ones.
    """
    met = {expected.column(job) for job in jobs}
    return [name for name in expected.columns if name in met]
