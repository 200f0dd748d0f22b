"""What the report says, section by section, before anyone asks whether as a page, as Markdown or on the console."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from layerif.record.record import Failure
from layerif.record.text import spelt
from layerif.report import comparisons as compare
from layerif.report import plots, tables
from layerif.report.arms import Job, Run, called, is_logarithmic
from layerif.report.expected import Expected, chosen, columns_of
from layerif.report.plots import Plot
from layerif.report.reading import Sweep
from layerif.report.statistics import num_resamples

_LOADS = (
    "Shares of the evaluated tokens, means over the routers of a block: 1 is an even share, 0 an expert that no token "
    "chose. With as many chosen as there are, every load is even."
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """title; table with its caption; plot; findings: one sentence each; said: how to read it all."""

    title: str
    table: pd.DataFrame | None = None
    caption: str = ""
    findings: Sequence[str] = ()
    said: Sequence[str] = ()
    plot: Plot | None = None
    console: Sequence[str] | None = None  # the columns that fit there; None: all


def fitting(expected: Expected | None, jobs: Sequence[Job]) -> Expected | None:
    """The published numbers, and with them the names of arms and columns; none where all are of columns not run."""
    if expected is None or not expected.values or not any(expected.columns.values()):
        return expected
    return expected if columns_of(expected, [job.config for job in jobs]) else None


def summary(sweep: Sweep, runs: Sequence[Run], expected: Expected | None) -> list[str]:
    """What this is of, everything wrong with it, and what it is held against, in a few lines."""
    models = sorted({_model(job.config) for job in sweep.jobs})
    tasks = list(dict.fromkeys(run.task for run in runs))
    of = f"{', '.join(models)} on {', '.join(tasks)}"
    lines = [f"{_count(sweep.records, 'finished run')} of {of}, {_seeds(runs)}{_small(sweep.jobs)}."]
    if sweep.failures:
        lines.append(f"{_count(sweep.failures, 'run')} failed; the errors are below.")
    if sweep.failed_again:
        again = _count(sweep.failed_again, "run")
        lines.append(f"{again} failed when run again; the numbers are of before, the errors are below.")
    if sweep.unfinished:
        lines.append(f"{_count(sweep.unfinished, 'run')} began and did not end: killed, or still at work.")
    if holes := tables.grid(runs, expected):
        lines.append(f"Missing of the grid of arms, tasks and seeds: {_count(holes, 'run')}.")
    if sweep.left_out:
        lines.append(f"Left out, since not readable: {_count(sweep.left_out, 'file')}.")
    return lines + ([] if expected is None else _about_paper(expected, sweep.jobs, runs))


def _small(jobs: Sequence[Job]) -> str:
    small = [job for job in jobs if job.config.get("small")]
    if not small:
        return ""
    some = "" if len(small) == len(jobs) else f"{len(small)} of {len(jobs)} are "
    return f"; {some}small variants, which stand in for runs of full size"


def _model(config) -> str:
    name = chosen("model", config["model"])
    return name if name not in ("hub", "local") else called(config["model"])


def _count(items: Sequence, what: str) -> str:
    return f"{len(items)} {what}{'s' * (len(items) != 1)}"


def _seeds(runs: Sequence[Run]) -> str:
    seeds = list(dict.fromkeys(run.seed for run in runs if run.seeds))
    keys = {key for run in runs for key in run.seeds}
    what = next(iter(keys)) if len(keys) == 1 else "seed"
    return f"{what} {', '.join(seeds)}"


def _about_paper(expected: Expected, jobs: Sequence[Job], runs: Sequence[Run]) -> list[str]:
    """Where the published numbers are from, and what is to be said where they are not of these runs."""
    configs = [job.config for job in jobs]
    if not expected.values:
        return [f"No published numbers: {expected.source}."]
    lines = [f"The paper's numbers: {expected.source}, {expected.metric} of {expected.said_of}."]
    for column in [name for name, conditions in expected.columns.items() if not conditions]:
        means = [f"{arm} {spelt(row[column])}" for arm, row in expected.values.items() if column in row]
        lines.append(f"Published as a mean alone, which no single run is held against: {column}, {', '.join(means)}.")
    columns = [name for name, conditions in expected.columns.items() if conditions]
    if not columns:
        return lines
    if not columns_of(expected, configs):
        have = ", ".join(dict.fromkeys(run.task for run in runs))
        return [*lines, f"They are for {', '.join(columns)}; these runs are on {have}, so none is shown here."]
    if not any(expected.metric in run.metrics for run in runs):
        have = ", ".join(dict.fromkeys(name for run in runs for name in tables.metrics_of([run]))) or "nothing"
        lines.append(f"These runs did not measure {expected.metric} (they measured {have}), so none is shown here.")
    elif not any(expected.arm(config) for config in configs):
        lines.append(f"No run is of one of its arms, {', '.join(expected.arms)}.")
    elif not all(expected.is_of(config) for config in configs):
        lines.append("Differences to them are taken only of such runs at full size; others are not comparable.")
    return lines


def sections(sweep: Sweep, runs: Sequence[Run], expected: Expected | None = None) -> list[Section]:
    """Every section that has something to show."""
    found, after = [], []
    metrics = tables.metrics_of(runs, expected)
    for metric in metrics:
        found.append(_results(runs, metric, expected))
        after += _comparisons(runs, metric) + _variance(runs, metric)
    if not metrics and sweep.failures:
        found.append(_results(runs, "accuracy", expected))
    return [*found, *after, *_layers(sweep, runs), *_runs(sweep, runs)]


def _results(runs: Sequence[Run], metric: str, expected: Expected | None) -> Section:
    results = tables.results(runs, metric, expected)
    of = "logarithms of the seeds" if is_logarithmic(metric) else "seeds"
    said = [
        f"Intervals are 95 %: Student's t over the {of} of an arm; of a single "
        "seed, or of seeds that are all alike, Wilson's over its questions."
    ]
    if any(cell.paper is not None for cell in results.cells.values()):
        said.append("The paper's numbers are of single runs, whose own noise is in none of the intervals.")
    if results.count("failed") or results.count("missing"):
        said.append("A failed or missing seed is named in its cell and is in no mean.")
    caption = f"{metric}: {'geometric ' * is_logarithmic(metric)}mean over seeds"
    frame = results.frame()
    return Section(
        title=f"Results: {metric}", table=frame, caption=caption, said=said, plot=plots.plot_results(results)
    )


def _comparisons(runs: Sequence[Run], metric: str) -> list[Section]:
    table, remarks = compare.comparisons(runs, metric)
    if not len(table):
        return [Section(title=f"Comparisons: {metric}", said=remarks)] if remarks else []
    by_question = table["questions"].notna().to_numpy() if "questions" in table else np.zeros(len(table), dtype=bool)
    num_tested = compare.num_tested(table)
    columns = [name for name in ("model", "task", "from", "to") if name in table]
    shown = _shared_apart(table.filter(items=columns)).assign(
        difference=[f"{value:+.3f}" for value in table["difference"]]
    )
    shown["95 % interval"] = _intervals(table)
    shown = shown.assign(**{name: table[name] for name in ("p", "p Holm", "smallest found", "seeds")})
    log = "differences of logarithms, " * is_logarithmic(metric)
    how = []
    if by_question.any():
        shown["questions"] = table["questions"]
        counts = table[["won", "lost"]].to_numpy(float)
        shown["only one right"] = ["–" if np.isnan(won) else f"{won:.0f} : {lost:.0f}" for won, lost in counts]
        shown["odds ratio"], shown["effect h"] = table["odds ratio"], table["effect h"]
        how.append(
            f"Paired by question: interval of {num_resamples(len(table)):,} bootstrap draws of seeds and questions, "
            "with Student's t over the seeds' means where that is wider. p: the largest of the exact sign test's by "
            "question (McNemar's for one seed), the bootstrap's and Student's. Only one right: answers that only the "
            "second, and only the first, got right; odds ratio: the one over the other. Effect h: Cohen's."
        )
    if not by_question.all():
        shown["effect d"] = table["effect d"]
        how.append("Paired by seed: interval and p by Student's t. Effect d: mean over standard deviation.")
    how.append(
        f"p Holm is corrected for the {num_tested} comparisons of this table that were tested. Smallest found: the "
        f"difference that would be found with 80 % power at 0.05 / {num_tested}. A difference is called one only where "
        "its interval excludes zero and p Holm is below 0.05."
    )
    by = "seed" if not by_question.any() else "question" if by_question.all() else "question where answers were kept"
    caption = f"{metric}: {log}second minus first, paired by {by}"
    real = [text for text in table["finding"] if " is higher than " in text or " is lower than " in text]
    rest = len(table) - len(real)
    findings = (
        [*real, f"{rest} of {len(table)} comparisons found no difference that the data support."] if rest else real
    )
    findings = list(table["finding"]) if len(table) <= 12 else findings
    narrow = [*shown.columns[: list(shown.columns).index("difference")], "difference", "95 % interval", "p Holm"]
    title = f"Comparisons: {metric}"
    return [
        Section(
            title=title, table=shown, caption=caption, findings=findings, said=[" ".join(how), *remarks], console=narrow
        )
    ]


def _shared_apart(pairs: pd.DataFrame) -> pd.DataFrame:
    """Settings that both arms of a row have, in a column of their own: what differs is then in sight."""
    rows = []
    for row in pairs.to_dict("records"):
        first, second = str(row.pop("from")).split(), str(row.pop("to")).split()
        shared = [word for word in first if "=" in word and word in second]
        apart = [" ".join(word for word in words if word not in shared) for words in (first, second)]
        rows.append({**row, "from": apart[0], "to": apart[1], "both with": " ".join(shared) or None})
    found = pd.DataFrame(rows)
    return found if any(found["both with"]) else found.drop(columns="both with")


def _said(low: float, high: float, p: float, has_questions: bool) -> str:
    said = compare.verdict(low, high, p)
    return f"{said}, on these questions" if has_questions and not said.startswith("not") else said


def _variance(runs: Sequence[Run], metric: str) -> list[Section]:
    of = f"ln {metric}" if is_logarithmic(metric) else metric
    has_questions = any(run.answers(metric) for run in runs)
    how = "One value a run: seeds are the only chance it knows."
    how += " It is of these very questions; the comparisons above ask what others would show, too." * has_questions
    found = []
    analyses = compare.variances(runs, metric)
    for where, text, variance, pairs in analyses:
        title, caption = f"{metric}{f', {where}' * (len(analyses) > 1)}", f"{of}: {text}"
        found.append(Section(title=f"Analysis of variance: {title}", table=variance.table, caption=caption, said=[how]))
        shown = pairs[["from", "to"]].assign(
            **{
                "difference": [f"{value:+.3f}" for value in pairs["difference"]],
                "95 % interval": _intervals(pairs),
                "p": pairs["p"],
                "said": [
                    _said(*row, has_questions) for row in zip(pairs["low"], pairs["high"], pairs["p"], strict=True)
                ],
            }
        )
        how_pairs = f"Means over tasks and seeds, second minus first; p is of the family of all {len(pairs)} pairs."
        found.append(Section(title=f"Tukey's HSD: {title}", table=shown, caption=caption, said=[how_pairs]))
    return found


def _intervals(table: pd.DataFrame) -> list[str]:
    bounds = table[["low", "high"]].to_numpy(float)
    return ["–" if np.isnan(low) else compare.interval(low, high) for low, high in bounds]


def _layers(sweep: Sweep, runs: Sequence[Run]) -> list[Section]:
    drawn = [plots.plot_scores(sweep.records), plots.plot_allocations(runs), plots.plot_routing(runs)]
    found = [Section(title=plot.title, plot=plot) for plot in drawn if plot is not None]
    if len(loads := tables.loads(runs)):
        caption = "Least and most used expert, as a multiple of an even share of the tokens, and where"
        found.append(Section(title="Expert load", table=loads, caption=caption, said=[_LOADS]))
    correlations = tables.correlations(sweep.records)
    if len(correlations):
        of, title = "Spearman's rank correlation of layer scores", "Rank correlation of layer profiles"
        plot = plots.plot_correlations(sweep.records) if len(correlations) > 12 else None
        if plot is not None:  # as numbers, only how well each agrees with itself
            correlations = correlations.loc[[other == tables.ITSELF for other in correlations["and"]]]
        found.append(Section(title=title, table=correlations, caption=of, plot=plot))
    return found


def _runs(sweep: Sweep, runs: Sequence[Run]) -> list[Section]:
    table, narrow = tables.in_full(runs), ("run", "model", "task", "seed", *tables.metrics_of(runs), "all s", "state")
    narrow = [name for name in narrow if name in table]
    found = [Section(title="Every run", table=table, caption="Measurements and cost by seed", console=narrow)]
    if sweep.records:
        found.append(Section(title="Cost", table=tables.cost(sweep.records), caption="Summed over all runs"))
    if sweep.failures:
        lines = [
            {"run": r.arm, "task": r.task, "seed": r.seed, "error": r.job.error}
            for r in runs
            if isinstance(r.job, Failure)
        ]
        found.append(Section(title="Failed runs", table=pd.DataFrame(lines), caption="rerun=failed runs them again"))
    if sweep.failed_again:
        said = ["Above stand the numbers of before. rerun=true runs them again."]
        found.append(Section(title="Failed when run again", findings=sweep.failed_again, said=said))
    if sweep.unfinished:
        found.append(Section(title="Unfinished", findings=sweep.unfinished))
    if sweep.left_out:
        found.append(Section(title="Left out", findings=sweep.left_out))
    if len(notes := tables.notes(sweep.records)):
        found.append(Section(title="Notes and warnings", table=notes, caption="What the runs said of themselves"))
    if sweep.records:
        table = tables.versions(sweep.records)
        found.append(Section(title="Versions", table=table, caption="Software of the finished runs"))
    again = pd.DataFrame({"command": [shlex.join(["layerif", *job.overrides]) for job in sweep.jobs]})
    found.append(Section(title="How to reproduce", table=again, caption="Each run as a command, failed ones last"))
    return found
