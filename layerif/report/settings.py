"""The settings of a job that tell it apart from others, by section and by keys as on the command line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping

from layerif.record.names import allocator_choice, estimator_choice, origins, selection_choice
from layerif.record.record import Job

SIZE = ("allocator.budget", "allocator.target", "allocator.keep")  # the keys that set the size of an allocation
_WITHOUT_SCORES = ("file", "shape", "depth", "position")  # allocators that look at neither scores nor curves
# Settings that repeat others, unless the user gives them a value of their own: pruner, calibration windows, formats.
_REPEATS = {
    "estimator.pruner": "pruner",
    "estimator.calibration": "method.calibration",
    "estimator.formats": "method.formats",
    "allocator.formats": "method.formats",
}


def settings(job: Job, *sections: str) -> dict[Hashable, dict[str, object]]:
    """Returns the configuration by section, without seeds and without settings that names already tell.

    Methods, estimators, allocators and pruners are compared with their like, because the settings of another choice
    follow from that choice.

    Args:
        job: its record or failure.
        *sections: the sections to return; all where none is given.
    """
    choices = {
        "method": job.choices.get("method", ""),
        "pruner": job.choices.get("pruner") if _has_pruner(job) else None,
        "estimator": estimator_choice(job),
        "allocator": allocator_choice(job),
        "selection": selection_choice(job),
    }
    found: dict[Hashable, dict[str, object]] = defaultdict(dict)
    if not sections:
        found["choice", None] = {group: choices[group] for group in ("method", "pruner", "selection")}
    told, again = _told(job), repeated(job)
    for key, value in flat(job.identity["settings"]).items():
        section = key.split(".")[0]
        is_told = f"{key}.".startswith(told) or key.split(".")[-1] == "seed" or (key, value) == ("score_task", None)
        if not is_told and key not in again and (not sections or section in sections):
            # An estimator that is told to repeat nothing differs from one that repeats, of which no key is left.
            found[section, choices.get(section)][key] = "null" if key in _REPEATS and value is None else value
    return found


def _told(job: Job) -> tuple[str, ...]:
    """Returns the starts of those keys, each with a dot at its end, that names tell or that the job does not use."""
    told = ["model.", "method.model.", "method.pruner.", "method.adapter.model.", "evaluation.before."]
    told += ["estimator.aggregation.", "estimator.of.aggregation.", "method.search."]
    told += [f"score_task.{key}." for key in job.identity["settings"].get("score_task") or () if key != "path"]
    told += [f"task.{key}." for key in content(job, "task")]
    if not _has_pruner(job):
        told.append("pruner.")
    is_greedy = content(job, "method").get("search") == "greedy"
    if is_greedy or allocator_choice(job) in _WITHOUT_SCORES:
        told += ["estimator.", "probe."]
        told += [f"allocator.{key}." for key in ("shape", "slope", "spare", "rule")]
    if allocator_choice(job) == "position":
        told.append("allocator.kind.")
    return tuple(told)


def repeated(job: Job) -> set[str]:
    """Returns the keys of the job that only repeat another setting of it."""
    every = flat(job.config)
    found = set()
    for again, first in _REPEATS.items():
        has_first = any(key.startswith(f"{first}.") for key in every)
        for key in (key for key in every if f"{key}.".startswith(f"{again}.")):
            of = first + key.removeprefix(again)
            if every[key] == every[of] if of in every else key == again and not has_first:
                found.add(key)
    return found


def _has_pruner(job: Job) -> bool:
    """Tells if the pruner matters: the method prunes, or the estimator prices its masks."""
    is_priced = "pruner" in job.config["estimator"] and allocator_choice(job) not in _WITHOUT_SCORES
    return job.choices.get("method") == "prune" or is_priced


def content(job: Job, section: str) -> dict[str, object]:
    """Returns the settings that make it the same model or task; the number of samples is not among them.

    Args:
        job: its record or failure.
        section: `model` or `task`.
    """
    incidental = ("num_train", "num_validation", "seed")
    settings = {key: value for key, value in job.identity["settings"][section].items() if key not in incidental}
    return {**settings, "choice": origins(section, job.choices.get(section, ""))[-1]}


def flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    """Returns the values by keys as on the command line: `a.b.c`.

    Args:
        values: nested settings.
        prefix: stands before every key.
    """
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
