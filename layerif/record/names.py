"""The names of one job, its arm, estimator and model, by its choices and settings.

The report names many jobs so that they can be told apart, see `layerif.report.arms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from layerif.files import conf_folder
from layerif.record.record import Job

UNTOUCHED = "untouched model"


def arm_name(job: Job) -> str:
    """Returns the name of the arm that a job belongs to: the source of its allocation, then the settings of it.

    It comes from the configuration alone, which a failed job has, too.
    """
    kind, given = allocator_choice(job), job.config["allocator"]
    if job.choices["method"] == "rows":  # it spends no allocation
        return f"rows by {estimator_name(job)}"
    if (job.config.get("method") or {}).get("search") == "greedy":
        name = "greedy search"
    elif kind == "file":
        name = "allocation from file"
    elif kind == "depth":  # this allocator and the next two need no scores
        slope = "by trials" if given.get("slope") is None else f"{given['slope']:g}"
        name = f"depth(slope={slope}, spare={given.get('spare', 0)})"
    elif kind == "position":
        kind, rule = given.get("kind", "layers"), given.get("rule", "last")
        place = "all but spaced" if rule == "but_spaced" else rule
        name = f"{place} {kind} {'kept' if kind == 'blocks' else 'trained'}"
    elif kind == "shape":
        shape = given["shape"]
        counts = shape if isinstance(shape, Sequence) and not isinstance(shape, str) else str(shape)
        name = f"shape({'-'.join(map(str, counts))}) {given.get('kind', 'experts')}"
    else:
        name = f"{estimator_name(job)} {kind}"
    if scored := job.config.get("score_task"):
        name = f"{name} by scores of {called(scored, job.choices.get('task@score_task', ''))}"
    return name if has_method(job) else f"{name} (not trained)"


def has_method(job: Job) -> bool:
    """Tells if a job did more than score and allocate."""
    return job.choices["method"] != "none"


def estimator_name(job: Job) -> str:
    """Returns the name of the estimator, with its aggregation if that is not the default: `reversed datainf top25`."""
    inner = job.config["estimator"]
    while "of" in inner:
        inner = inner["of"]
    aggregation = inner.get("aggregation", "all")
    return estimator_choice(job) if aggregation == "all" else f"{estimator_choice(job)} {aggregation}"


def estimator_choice(job: Job) -> str:
    """Returns the choice of the estimator, and after it the one that it turns round: `reversed datainf`."""
    node, group, found = job.config["estimator"], "estimator", [job.choices.get("estimator", "")]
    while "of" in node:
        node, group = node["of"], "estimator@estimator.of" if group == "estimator" else f"{group}.of"
        found.append(job.choices.get(group, ""))
    return " ".join(filter(None, found))


def selection_choice(job: Job) -> str:
    """Returns the choice of the train rows, and after it the estimator that it asks: `influence datainf`.

    A job of a version without selections took all rows.
    """
    parts = job.choices.get("selection", "all"), job.choices.get("estimator@selection.estimator", "")
    return " ".join(filter(None, parts))


def allocator_choice(job: Job) -> str:
    """Returns the allocator by the choice that its own starts from: `experts` for `experts_gemma`."""
    return origins("allocator", job.choices.get("allocator", ""))[-1]


def called(node: Mapping[str, Any], choice: str) -> str:
    """Returns the last part of the name or path of a model or task, or else its choice."""
    given = [node.get(key) for key in ("name", "path")]  # "???" where a failed job was given none
    return Path(str(next((value for value in given if value not in (None, "", MISSING)), choice))).name


@cache
def origins(group: str, choice: str) -> tuple[str, ...]:
    """Returns the choice and those that it starts from, by the defaults of its YAML: `("experts_gemma", "experts")`."""
    found = [choice]
    for default in _yaml(group, choice).get("defaults", []):
        if isinstance(default, str) and default != "_self_" and "@" not in default:
            found += origins(group, default)
    return tuple(found)


@cache
def name_in_conf(group: str, choice: str) -> str | None:
    """Returns the setting `name` of a choice, or of one that it starts from.

    The choice `mistral_7b` has `mistralai/Mistral-7B-v0.1`.
    """
    names = (_yaml(group, one).get("name") for one in origins(group, choice))
    return next((name for name in names if name not in (None, MISSING)), None)


@cache
def _yaml(group: str, choice: str) -> dict[str, Any]:
    ours = {file.stem: file for file in (conf_folder() / group).glob("*.yaml")}
    if choice not in ours:  # the YAML lies in a folder of the user's
        return {}
    content: Any = OmegaConf.to_container(OmegaConf.load(ours[choice]))
    return content
