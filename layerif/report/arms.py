"""The arm, column and seed of every job, with names as short as tell them apart.

Names come from choices and settings, never from the paths of classes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerif.record.frames import BEFORE, QUESTIONS, metrics_of
from layerif.record.names import (
    UNTOUCHED,
    arm_name,
    called,
    has_method,
)
from layerif.record.record import Failure, Job, RunRecord
from layerif.report.expected import Expected
from layerif.report.settings import SIZE, content, flat, repeated, settings


@dataclass(frozen=True, kw_only=True)
class Run:
    """The part of one job that belongs to one arm.

    Attributes:
        job: its record or failure.
        arm: the name of the method or setting on trial; untouched models are an arm, too.
        model: its name; empty where all jobs share one model.
        task: the column of the table.
        seeds: everything that tells repetitions apart, by key; empty for an untouched model that always answered alike.
        factors: see `comparable`.
        prefix: of its metrics in the record.
    """

    job: Job
    arm: str
    model: str
    task: str
    seeds: Mapping[str, object]
    factors: tuple[str, str, str]
    prefix: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that are numbers; empty for a failed job."""
        return {} if isinstance(self.job, Failure) else metrics_of(self.job, self.prefix)

    def rows(self, metric: str) -> Mapping[str, float]:
        """Returns the value of each evaluated row behind a metric, by its id; empty where none was kept.

        It is 1 or 0 for a right or wrong answer, and nats for a loss.
        """
        if isinstance(self.job, Failure):
            return {}
        kept = self.job.answers if metric in QUESTIONS else self.job.losses
        return kept.get(f"{self.prefix}{QUESTIONS.get(metric, metric)}", {})

    @property
    def seed(self) -> str:
        """The seeds in words; the number alone where there is only one."""
        if len(self.seeds) == 1:
            return str(next(iter(self.seeds.values())))
        return ", ".join(f"{key}={value}" for key, value in self.seeds.items())

    @property
    def column(self) -> str:
        """The model and the task: the column of a table."""
        return column_of_model(self.model, self.task)

    @property
    def is_trained(self) -> bool:
        """Tells fine-tuned and pruned models from untouched ones."""
        return not self.prefix and has_method(self.job)


def column_of_model(model: str, task: str) -> str:
    """Returns the column of a task, with its model where there are several.

    Args:
        model: its name; empty where all jobs share one model.
        task: its name.
    """
    return f"{model} {task}".strip()


def comparable(first: Run, second: Run) -> bool:
    """Tells if two runs differ in one thing: how the allocation was made, its size, or all other settings.

    Everything is compared with an untouched model.

    Args:
        first: the run that is compared with; it may be of an untouched model.
        second: the run that is compared.
    """
    if (first.model, first.task) != (second.model, second.task) or second.prefix:
        return False
    differing = sum(one != other for one, other in zip(first.factors, second.factors, strict=True))
    return bool(first.prefix) or differing <= 1


def same_repetition(first: Run, second: Run) -> bool:
    """Tells if all seeds that both runs have are equal.

    Args:
        first: one run.
        second: another run.
    """
    return all(second.seeds.get(key, value) == value for key, value in first.seeds.items())


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs without repetitions of an arm that have the same measurements, because no seed touches them."""

    def measured(run: Run) -> tuple:
        routing = {} if isinstance(run.job, Failure) else run.job.routing  # seeds may differ and all answers be alike
        return run.model, run.task, run.arm, run.metrics, *map(run.rows, QUESTIONS), routing

    return _distinct(runs, key=measured)


def runs_of(jobs: Sequence[Job], expected: Expected | None = None) -> list[Run]:
    """Makes every job a run of its arm, and takes each untouched model once. No run hides another.

    Arms and columns are called as in `expected` where they meet its conditions. Otherwise an arm is called after what
    made its allocation, and after those settings that not all arms share.

    Args:
        jobs: finished and failed ones.
        expected: the published numbers; None: there are none.
    """
    models, columns = titles(jobs, "model"), _columns(jobs, expected)
    seeds = _seeds(jobs)
    trained = [number for number, job in enumerate(jobs) if has_method(job) or not job_metrics(job)]
    arms = _arm_names([jobs[number] for number in trained], [columns[number] for number in trained], expected)
    names = dict(zip(trained, arms, strict=True))
    found = []
    for number, name in names.items():
        place = {"model": models[number], "task": columns[number], "seeds": seeds[number]}
        found.append(Run(job=jobs[number], arm=name, factors=_factors(jobs[number]), **place))
    found = _numbered(found)
    return [*_untouched(jobs, models, columns, seeds), *sorted(found, key=lambda run: "uniform" not in run.arm.split())]


def _untouched(jobs: Sequence[Job], models, columns, seeds) -> list[Run]:
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        if any(name.startswith(BEFORE) for name in job_metrics(job)):
            places[models[number], columns[number]].append(number)
    found = []
    for (model, column), numbers in places.items():
        evaluations = [settings(jobs[number], "evaluation") for number in numbers]
        labels = labelled([UNTOUCHED] * len(numbers), evaluations, number_alike=False)
        for label in dict.fromkeys(labels):
            alike = [number for number, other in zip(numbers, labels, strict=True) if other == label]
            distinct = _distinct(alike, key=lambda number: _before(jobs[number]))
            for number in distinct:
                place = {"model": model, "task": column, "seeds": {} if len(distinct) == 1 else seeds[number]}
                found.append(Run(job=jobs[number], arm=label, factors=("", "", ""), prefix=BEFORE, **place))
    return found


def _before(job: Job) -> dict[str, Any]:
    assert isinstance(job, RunRecord)
    values = {**job.answers, **job.metrics}
    return {name: value for name, value in values.items() if name.startswith(BEFORE)}


def _numbered(runs: list[Run]) -> list[Run]:
    """Returns the runs, with a number after the arm if the same job ran twice: these are not two seeds of one arm."""
    places = [(run.model, run.task, run.arm, run.seed) for run in runs]
    times, counts = Counter(places), defaultdict(lambda: itertools.count(1))
    return [
        Run(**{**vars(run), "arm": f"{run.arm} ({next(counts[place])})"}) if times[place] > 1 else run
        for run, place in zip(runs, places, strict=True)
    ]


def job_metrics(job: Job) -> Mapping[str, Any]:
    """Returns the metrics of a job; empty for a failed one."""
    return {} if isinstance(job, Failure) else job.metrics


def _arm_names(jobs: Sequence[Job], columns: Sequence[str], expected: Expected | None) -> list[str]:
    given = [None if expected is None else expected.arm(job) for job in jobs]
    names = [name or arm_name(job) for name, job in zip(given, jobs, strict=True)]
    own = [number for number, name in enumerate(given) if name is None]
    groups = [own] if own else []
    groups += [[number for number, other in enumerate(given) if other == name] for name in dict.fromkeys(given) if name]
    for group in groups:  # the names already tell the arms of a published table apart, but not the runs of one arm
        found = [settings(jobs[number]) for number in group]
        found = found if group is own else _apart(found, [columns[number] for number in group])
        for number, label in zip(group, labelled([names[n] for n in group], found, number_alike=False), strict=True):
            names[number] = label
    return names


def _apart(found: Sequence[Mapping[Hashable, dict[str, object]]], columns: Sequence[str]):
    """Returns the settings of the jobs of one arm, without those that follow from the column, such as the pruner.

    The size of an allocation always stays.
    """
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for sections, column in zip(found, columns, strict=True):
        for key, value in itertools.chain.from_iterable(section.items() for section in sections.values()):
            place = "" if key in SIZE else column
            values[key, place].add(json.dumps(value, sort_keys=True, default=str))
    differing = {key for (key, _), those in values.items() if len(those) > 1}
    return [
        {section: {key: value for key, value in of.items() if key in differing} for section, of in sections.items()}
        for sections in found
    ]


def _columns(jobs: Sequence[Job], expected: Expected | None) -> list[str]:
    given = [None if expected is None else expected.column(job) for job in jobs]
    return [name or title for name, title in zip(given, titles(jobs, "task"), strict=True)]


def _seeds(jobs: Sequence[Job]) -> list[dict[str, object]]:
    """Returns the root seed of each job, and others that are swept; the root one goes where all jobs share it."""
    every = [
        {key: value for key, value in flat(job.config).items() if key.endswith(".seed") and key not in again}
        for job, again in ((job, repeated(job)) for job in jobs)
    ]
    swept = set()
    for key in {key for values in every for key in values}:
        having = [(values[key], job.seed) for values, job in zip(every, jobs, strict=True) if key in values]
        if any(value != root for value, root in having) and len({str(value) for value, _ in having}) > 1:
            swept.add(key)
    shared = len({job.seed for job in jobs}) == 1 and bool(swept)
    found = []
    for values, job in zip(every, jobs, strict=True):
        own = {key: value for key, value in values.items() if key in swept}
        found.append(own if shared and own else {"seed": job.seed} | own)
    return found


def titles(jobs: Sequence[Job], section: str) -> list[str]:
    """Returns the name of the model or task of each job; empty where all share one model.

    Args:
        jobs: finished and failed ones.
        section: `model` or `task`.
    """
    contents = [content(job, section) for job in jobs]
    distinct = _distinct(contents)
    if section == "model" and len(distinct) == 1:
        return [""] * len(jobs)
    names = [called(one, str(one["choice"])) for one in distinct]
    given = [{key: value for key, value in flat(one).items() if value is not None} for one in distinct]
    labels = labelled(names, [{name: one} for name, one in zip(names, given, strict=True)])
    return [labels[distinct.index(one)] for one in contents]


def _distinct(items: Sequence, key: Callable = lambda item: item) -> list:
    kept: list[tuple] = []
    for item in items:
        value = key(item)
        if not any(value == other for other, _ in kept):
            kept.append((value, item))
    return [item for _, item in kept]


def _factors(job: Job) -> tuple[str, str, str]:
    """Returns the way the allocation was made, its size, and all other settings, see `comparable`."""
    made, rest = [], []
    for (section, choice), values in settings(job).items():  # type: ignore[misc]
        kept = {key: value for key, value in values.items() if key not in SIZE}
        if section == "choice":
            made.append(kept.pop("method"))
        (made if section in ("method", "estimator", "probe", "allocator", "score_task") else rest).append(
            [section, choice, kept]
        )
    decision = job.decision if isinstance(job, RunRecord) else None
    # A budget that is not met to the last weight, because levels are steps or values were rounded, is the same size.
    size = [decision.allocation.kind, round(decision.allocation.budget, 2)] if decision else None
    allocation, size, rest = (json.dumps(part, sort_keys=True, default=str) for part in (made, size, rest))
    return allocation, size, rest


def labelled(
    names: Sequence[str], found: Sequence[Mapping[Hashable, Mapping[str, object]]], *, number_alike: bool = True
) -> list[str]:
    """Returns the names with those settings that differ from another's.

    Args:
        names: one for each run or profile.
        found: the settings of each, by section; a section is compared with the same section of others.
        number_alike: put a number after names that are alike even then.
    """
    by_section: dict[Hashable, list[Mapping[str, object]]] = defaultdict(list)
    for section, values in itertools.chain.from_iterable(sections.items() for sections in found):
        by_section[section].append(values)
    differing = {
        section: [
            key
            for key in dict.fromkeys(itertools.chain.from_iterable(every))
            if len({json.dumps(values.get(key), sort_keys=True, default=str) for values in every}) > 1
        ]
        for section, every in by_section.items()
    }
    labels = []
    for name, sections in zip(names, found, strict=True):
        for section, values in sections.items():
            name = " ".join([name, *(_spelt_setting(key, values[key]) for key in values if key in differing[section])])
        labels.append(name)
    if not number_alike:
        return labels
    numbers = {label: itertools.count(1) for label, times in Counter(labels).items() if times > 1}
    return [f"{label} ({next(numbers[label])})" if label in numbers else label for label in labels]


def _spelt_setting(key: str, value: object) -> str:
    """Spells a setting as on the command line; a long value is cut to its end, where paths differ."""
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value)
    return f"{key}={text}" if len(text) <= 40 else f"{key}=…{text[-39:]}"
