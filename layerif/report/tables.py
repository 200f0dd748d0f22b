"""The tables of the report, as frames: results by arm and task, every run, cost, correlations, notes, versions."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from layerif.record.frames import QUESTIONS, headline, is_fraction, is_logarithmic, measured, without_empty
from layerif.record.names import called, estimator_name
from layerif.record.record import Failure, RunRecord, ScoresRecord
from layerif.record.text import spelt
from layerif.report.arms import Run, column_of_model, labelled, titles
from layerif.report.expected import Expected, columns_of
from layerif.report.settings import content, settings
from layerif.stats import spearman_matrix, t_interval, wilson

ITSELF = "itself, on disjoint halves of its samples"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The result of one arm on one task: the mean over seeds and its interval, or the reason why there is none.

    Attributes:
        basis: what the interval was computed from.
        failed: the seeds of failed jobs.
        missing: the seeds that were never run.
        paper: the published number.
        to_paper: our mean minus the published number; only where the number belongs to all runs (`Expected.is_of`).
    """

    mean: float | None = None
    low: float = np.nan
    high: float = np.nan
    basis: str = ""
    failed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    paper: float | None = None
    to_paper: float | None = None

    def lines(self) -> list[str]:
        """Returns the mean first, then the remarks on it."""
        found = [spelt(self.mean)]
        if self.mean is not None:
            found.append(self.basis if np.isnan(self.low) else f"{spelt(self.low)} to {spelt(self.high)}, {self.basis}")
        if self.paper is not None:
            found.append(f"paper {spelt(self.paper)}")
        if self.to_paper is not None:
            is_inside = self.low <= self.paper <= self.high  # type: ignore[operator]
            place = "" if np.isnan(self.low) else f", {'inside' if is_inside else 'outside'} our interval"
            found.append(f"{self.to_paper:+.3f} to the paper{place}")
        if self.failed:
            found.append(f"failed: {', '.join(self.failed)}")
        if self.missing:
            found.append(f"missing: {', '.join(self.missing)}")
        return found


@dataclass(frozen=True, kw_only=True)
class Results:
    """The cells of a metric by arm and column; a column is a task of a model."""

    metric: str
    arms: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Cell]

    def frame(self) -> pd.DataFrame:
        """Returns one row an arm, one column a task."""
        rows = [[arm, *("\n".join(self.cells[arm, column].lines()) for column in self.columns)] for arm in self.arms]
        return pd.DataFrame(rows, columns=["arm", *self.columns])

    def count(self, state: str) -> int:
        """Returns the number of seeds that `failed` or are `missing`."""
        return sum(len(getattr(cell, state)) for cell in self.cells.values())


def table_metrics(runs: Sequence[Run], expected: Expected | None = None) -> list[str]:
    """Returns the metrics that get a table of their own: the published one, then the loss where every arm has it.

    Args:
        runs: of all arms.
        expected: the published numbers; None: there are none.
    """
    found = [name for run in runs for name in run.metrics]
    shown = headline(found)
    if all("loss" in run.metrics for run in runs if headline(run.metrics)):
        shown.sort(key=lambda name: name != "loss")
    if expected is not None and expected.metric in found:
        shown = [expected.metric, *(name for name in shown if name != expected.metric)]
    return shown


def results(runs: Sequence[Run], metric: str, expected: Expected | None = None) -> Results:
    """Returns the mean over seeds of every arm on every task, and the cells that failed or were never run.

    Args:
        runs: of all arms.
        metric: the name of a metric.
        expected: the published numbers; None: there are none.
    """
    of_metric = expected if expected is not None and expected.metric == metric else None
    shown = [run for run in runs if metric in run.metrics or isinstance(run.job, Failure)]
    places = {(run.arm, run.column): [] for run in shown}
    for run in shown:
        places[run.arm, run.column].append(run)
    missing = grid(runs, expected)
    named = [*(arm for arm, _ in places), *(arm for arm, *_ in missing)]
    arms, columns = list(dict.fromkeys(named)), list(dict.fromkeys([c for _, c in places] + [c for _, c, _ in missing]))
    arm_of, column_of = _published_names(runs, expected)
    if expected is not None:  # in the order of the published table
        arms.sort(key=lambda arm: _place(arm_of.get(arm), list(expected.arms)))
        columns.sort(key=lambda column: _place(column_of.get(column), list(expected.columns)))
    cells = {}
    for arm, column in itertools.product(arms, columns):
        lacking = tuple(seed for other, of, seed in missing if (other, of) == (arm, column))
        there = places.get((arm, column), [])
        paper = _paper(there, of_metric, arm_of.get(arm), column_of.get(column))
        cells[arm, column] = _cell(there, metric, lacking, paper, of_metric)
    return Results(metric=metric, arms=arms, columns=columns, cells=cells)


def _place(name: str | None, order: list[str]) -> int:
    return order.index(name) if name in order else -1


def _published_names(runs: Sequence[Run], expected: Expected | None) -> tuple[dict[str, str | None], ...]:
    """Returns the name in `expected` of each arm and column; a row's own name also says what sets it apart."""
    if expected is None:
        return {}, {}
    models = dict.fromkeys(run.model for run in runs)
    arms: dict[str, str | None] = {arm: arm for arm in expected.arms}
    columns: dict[str, str | None] = {
        column_of_model(model, column): column for model in models for column in expected.columns
    }
    for run in runs:
        arms[run.arm] = None if run.prefix else expected.arm(run.job)
        columns[run.column] = expected.column(run.job)
    return arms, columns


def _paper(runs: Sequence[Run], expected: Expected | None, arm: str | None, column: str | None) -> float | None:
    """Returns the published number of a cell, by its runs; without runs, by those of its row and column."""
    if expected is None:
        return None
    if not runs:
        return expected.values.get(arm or "", {}).get(column or "")
    found = {None if run.prefix else expected.value(run.job) for run in runs}
    return found.pop() if len(found) == 1 else None


def _cell(
    runs: Sequence[Run], metric: str, missing: tuple[str, ...], paper: float | None, expected: Expected | None
) -> Cell:
    values = [run.metrics[metric] for run in runs if metric in run.metrics]
    failed = tuple(run.seed for run in runs if isinstance(run.job, Failure))
    if not values:
        return Cell(failed=failed, missing=missing, paper=paper)
    on, back = (np.log, np.exp) if is_logarithmic(metric) else (np.asarray, np.asarray)
    mean, basis = float(back(np.mean(on(values)))), f"t over {len(values)} seeds"
    low, high = (float(back(bound)) for bound in t_interval(on(values)))
    if np.isnan(low):
        rows = next(run for run in runs if metric in run.metrics).rows(metric)
        basis = "1 seed" if len(values) == 1 else f"{len(values)} seeds alike"
        if rows and metric in QUESTIONS:
            low, high = wilson(int(sum(rows.values())), len(rows))
            basis = f"Wilson over {len(rows)} questions, {basis}"
        elif rows:
            low, high = t_interval(list(rows.values()))
            basis = f"t over {len(rows)} rows, {basis}"
        basis += ", no interval" * bool(np.isnan(low))
    if is_fraction(metric):  # Student's t does not know that no mean can be outside
        low, high = np.clip([low, high], 0.0, 1.0).tolist()
    same = paper is not None and expected is not None and all(expected.is_of(run.job) for run in runs)
    to_paper = mean - paper if same and paper is not None else None
    return Cell(
        mean=mean, low=low, high=high, basis=basis, failed=failed, missing=missing, paper=paper, to_paper=to_paper
    )


def grid(runs: Sequence[Run], expected: Expected | None = None) -> list[tuple[str, str, str]]:
    """Returns the arm, column and seed of everything that was never run: the holes in arms × tasks × seeds.

    The arms of one grid share all settings but how their allocation was made; a pruner without seeds of its own leaves
    no holes. `expected` adds the cells that it has numbers for, once a run of its model and settings belongs to one of
    its columns; an arm that ran in several settings lacks them in each.

    Args:
        runs: of all arms.
        expected: the published numbers; None: there are none.
    """
    trained = [run for run in runs if run.is_trained]
    found = _holes(trained)
    if expected is not None:
        found |= _unrun([run for run in trained if expected.is_of(run.job)], expected)
    return list(found)


def _holes(trained: Sequence[Run]) -> dict[tuple[str, str, str], None]:
    grids: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in trained:
        grids[run.model, run.factors[2]].append(run)
    there = {(run.arm, run.column, run.seed) for run in trained}
    found: dict[tuple[str, str, str], None] = {}
    for of_grid in grids.values():
        arms = dict.fromkeys(run.arm for run in of_grid)
        columns = dict.fromkeys(run.column for run in of_grid)
        seeds = dict.fromkeys(run.seed for run in of_grid)
        found |= dict.fromkeys(cell for cell in itertools.product(arms, columns, seeds) if cell not in there)
    return found


def _unrun(published: Sequence[Run], expected: Expected) -> dict[tuple[str, str, str], None]:
    """Returns the cells with a published number that have no run; these runs meet the conditions of all numbers."""
    if not columns_of(expected, [run.job for run in published]):
        return {}
    models, seeds = dict.fromkeys(run.model for run in published), dict.fromkeys(run.seed for run in published)
    ran = {(expected.arm(run.job), expected.column(run.job)) for run in published}
    rows: dict[tuple[str, str | None], dict[str, None]] = defaultdict(dict)  # the names that an arm runs under
    for run in published:
        rows[run.model, expected.arm(run.job)][run.arm] = None
    found: dict[tuple[str, str, str], None] = {}
    for arm, task in ((arm, task) for arm, row in expected.values.items() for task in row):
        if (arm, task) in ran or not expected.columns[task]:
            continue
        for model in models:
            names = rows.get((model, arm), [arm])
            found |= dict.fromkeys(itertools.product(names, [column_of_model(model, task)], seeds))
    return found


def in_full(runs: Sequence[Run], *, every_metric: bool = False) -> pd.DataFrame:
    """Returns one row a run, with its measurements and its cost; a failed one with its error.

    Args:
        runs: of all arms.
        every_metric: show metrics that get no table of their own as well.
    """
    rows = []
    places = list(dict.fromkeys((run.model, run.task) for run in runs))
    arms = list(dict.fromkeys(run.arm for run in runs))
    for run in sorted(runs, key=lambda run: (places.index((run.model, run.task)), arms.index(run.arm))):
        row = {
            "run": run.arm,
            **({"model": run.model} if run.model else {}),
            "task": run.task,
            "seed": run.seed or "any",
        }
        if isinstance(run.job, Failure):
            rows.append(row | {"state": f"failed: {run.job.error}"})
            continue
        shown = measured(run.job, run.prefix, every_metric=every_metric)
        rows.append(row | shown | {"state": None})
    frame = pd.DataFrame(rows, dtype=object)  # so that whole numbers stay whole beside missing ones
    return frame if every_metric else without_empty(frame)


def cost(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Returns the seconds of every phase over all runs, and those that stored evidence saved."""
    seconds: Counter[str] = Counter()
    for record in records:
        seconds.update(record.seconds)
    rows = [{"what": f"{phase}, seconds", "value": float(value)} for phase, value in seconds.items() if value >= 0.05]
    rows.append({"what": f"all {len(records)} runs, seconds", "value": float(sum(seconds.values()))})
    num_reused, saved = _saved(records)
    if num_reused:
        rows.append({"what": "measurements taken from the store", "value": num_reused})
        rows.append({"what": "seconds that this saved", "value": saved})
    rows.append({"what": "highest peak memory of a run, GB", "value": max(r.memory_gb for r in records)})
    return pd.DataFrame(rows, dtype=object)  # so that whole numbers stay whole


def _saved(records: Sequence[RunRecord]) -> tuple[int, float]:
    """Returns the number of measurements from the store, and the seconds that they once took, as far as known."""
    taken = [one for record in records for one in record.measurements if one["reused"]]
    return len(taken), sum(one["seconds"] or 0.0 for one in taken)


def loads(runs: Sequence[Run]) -> pd.DataFrame:
    """Returns the least and the most used expert of every run of a LoRA-MoE, as multiples of an even share, 1/E."""
    rows = []
    for run in runs:
        if isinstance(run.job, RunRecord) and run.job.routing and not run.prefix:
            shares = [(np.array(one["load"]) * len(one["load"]), block) for block, one in run.job.routing.items()]
            least, where_least = min((float(share.min()), block) for share, block in shares)
            most, where_most = max((float(share.max()), block) for share, block in shares)
            place = {"run": run.arm, **({"model": run.model} if run.model else {}), "task": run.task, "seed": run.seed}
            rows.append({**place, "least": least, "in": where_least, "most": most, "and in": where_most})
    return pd.DataFrame(rows)


def influence_of_rows(runs: Sequence[Run]) -> pd.DataFrame:
    """Returns the figures of every run of method=rows: the share of harmful rows, and how wrong answers were found."""
    rows = []
    for run in runs:
        if run.prefix or "harmful" not in run.metrics:
            continue
        found = run.metrics
        place = {"run": run.arm, **({"model": run.model} if run.model else {}), "task": run.task, "seed": run.seed}
        row = {**place, "harmful rows": found["harmful"], "fidelity": found.get("fidelity")}
        if "mislabel_auc" in found:
            low, high = (found.get(f"mislabel_auc_{end}") for end in ("low", "high"))
            interval = "" if low is None else f" ({spelt(low)} to {spelt(high)})"
            row |= {"AUC of wrong answers": f"{spelt(found['mislabel_auc'])}{interval}"}
            row |= {"among the most harmful": found["mislabel_found"]}
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.dropna(axis="columns", how="all")


class MeasuredProfile(NamedTuple):
    """The scores of the layers, the record of the run that measured them first, and their name without the seed."""

    record: RunRecord
    scores: ScoresRecord
    group: str = ""


def profiles(records: Sequence[RunRecord]) -> dict[str, MeasuredProfile]:
    """Returns the distinct layer profiles by model, task and estimator; constant ones say nothing and are left out."""
    found: dict[tuple, MeasuredProfile] = {}
    for record, model, task in zip(records, titles(records, "model"), titles(records, "task"), strict=True):
        scores = record.decision.scores if record.decision else None
        if scores is not None and len(set(scores.values)) > 1:
            scored = record.config.get("score_task")
            task = called(scored, record.choices.get("task@score_task", "")) if scored else task
            name = " ".join(filter(None, [model, task, estimator_name(record)]))
            found.setdefault((name, *scores.values), MeasuredProfile(record, scores))
    names, how = (
        [name for name, *_ in found],
        [settings(one.record, "task", "probe", "estimator") for one in found.values()],
    )
    groups = labelled(names, how, number_alike=False)
    with_seed = [{**one, "seed": {"seed": each.record.seed}} for one, each in zip(how, found.values(), strict=True)]
    measured = (one._replace(group=group) for one, group in zip(found.values(), groups, strict=True))
    return dict(zip(labelled(names, with_seed), measured, strict=True))


def comparable_by(profile: MeasuredProfile) -> tuple:
    """Returns what two profiles must share to be correlated: the model and its layers."""
    return content(profile.record, "model"), profile.scores.layers


def correlations(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Returns the rank correlation of every two layer profiles of one model, and of each with itself.

    A profile is correlated with itself on disjoint halves of its samples.
    """
    found = profiles(records)
    kinds = [comparable_by(one) for one in found.values()]
    alike = np.full((len(found), len(found)), np.nan)
    for number, kind in enumerate(kinds):
        if kind not in kinds[:number]:
            of_kind = [place for place, other in enumerate(kinds) if other == kind]
            values = [one.scores.values for one, other in zip(found.values(), kinds, strict=True) if other == kind]
            alike[np.ix_(of_kind, of_kind)] = spearman_matrix(np.array(values).T)
    rows = [
        (first, second, alike[row, column])
        for (row, first), (column, second) in itertools.combinations(enumerate(found), 2)
        if kinds[row] == kinds[column]
    ]
    for name, one in found.items():
        if one.record.decision and one.record.decision.reliability is not None:
            rows.append((name, ITSELF, one.record.decision.reliability))
    return pd.DataFrame(rows, columns=["profile", "and", "Spearman"])


def notes(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Returns each note and warning, and the number of runs that have it."""
    counted = Counter(note for record in records for note in dict.fromkeys(record.notes))
    return pd.DataFrame([{"note": note, "runs": number} for note, number in counted.items()])


def versions(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Returns the version or versions of each package; the commit of layerif where it is known."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in {**record.versions, "commit of layerif": record.git_sha or "unknown"}.items():
            found.setdefault(package, {})[version] = None
    return pd.DataFrame([{"package": package, "version": ", ".join(kinds)} for package, kinds in found.items()])
