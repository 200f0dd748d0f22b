"""The content of the report, section by section, for the page, Markdown and the console alike."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from layerif.checks import how_many
from layerif.record.frames import headline, is_logarithmic
from layerif.record.names import called
from layerif.record.plots import Plot
from layerif.record.record import Failure, Job
from layerif.record.text import spelt
from layerif.report import comparisons as compare
from layerif.report import plots, tables, verdicts
from layerif.report.arms import Run
from layerif.report.expected import Expected, columns_of
from layerif.report.mixed import MixedModel
from layerif.report.reading import FinishedJobs
from layerif.stats import RESAMPLES, num_resamples

_KEPT = {"questions": "answers", "rows": "losses"}
_BEYOND_USE = (
    "A difference is stated where the comparisons below support it. A fine-tuned or pruned model is called collapsed "
    "where its perplexity, or its loss on rows on which the untouched model does better, is beyond that of the "
    "frequencies of the very tokens that it should predict: the best guess that reads no context."
)
_JOINS = (
    "Groups of profiles join at the mean of 1 − Spearman's rank correlation over the pairs of their members: 0 is the "
    "same order of the layers, and 1 no order in common."
)
_ROWS = (
    "The rows themselves, with their text, are in rows.html of each run's folder. The AUC is the chance that a row "
    "with a planted wrong answer is more harmful than another (0.5: no better than chance), with its 95 % interval "
    "over train and validation rows; the last column is the share of these rows among as many most harmful ones."
)
_NOT_DRAWN = "Further arms that are not drawn here: {}. The allocation.png of each run shows its own."
_LOADS = (
    "Shares of the evaluated tokens, as means over the routers of a block: 1 is an even share, 0 an expert that no "
    "token chose. If every token takes all experts, every load is even."
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the report.

    Attributes:
        title: its heading.
        table: a frame, with its caption.
        findings: one sentence each.
        said: advice on reading it.
        plot: below the table.
        file: the name of the file that the plot is also written to; empty: none.
        console: the columns of the table that fit on a console; None: all.
        grouped_by: the columns of the table by which its rows stand in groups; empty: none.
    """

    title: str
    table: pd.DataFrame | None = None
    caption: str = ""
    findings: Sequence[str] = ()
    said: Sequence[str] = ()
    plot: Plot | None = None
    file: str = ""
    console: Sequence[str] | None = None
    grouped_by: Sequence[str] = ()


def fitting(expected: Expected | None, jobs: Sequence[Job]) -> Expected | None:
    """Returns the published numbers, which also name arms and columns, if a job belongs to one of their columns.

    Args:
        expected: the published numbers; None: there are none.
        jobs: finished and failed ones.
    """
    if expected is None or not expected.values or not any(expected.columns.values()):
        return expected
    return expected if columns_of(expected, jobs) else None


def summary(jobs: FinishedJobs, runs: Sequence[Run], expected: Expected | None) -> list[str]:
    """Writes a few lines on the runs, everything wrong with them, and the numbers that they are held against.

    Args:
        jobs: the jobs below the folder.
        runs: of these jobs.
        expected: the published numbers; None: there are none.
    """
    models = sorted({_model(job) for job in jobs.jobs})
    tasks = list(dict.fromkeys(run.task for run in runs))
    of = f"{', '.join(models)} on {', '.join(tasks)}"
    lines = [f"{how_many(len(jobs.records), 'finished run')} of {of}, {_seeds(runs)}{_small(jobs.jobs)}."]
    if jobs.failures:
        lines.append(f"{how_many(len(jobs.failures), 'run')} failed; the errors are below.")
    if jobs.failed_again:
        again = how_many(len(jobs.failed_again), "run")
        lines.append(f"{again} failed when run again; the numbers are from the run before, and the errors are below.")
    if jobs.unfinished:
        lines.append(f"{how_many(len(jobs.unfinished), 'run')} started and did not end: killed, or still at work.")
    if holes := tables.grid(runs, expected):
        lines.append(f"{how_many(len(holes), 'run')} of the grid of arms, tasks and seeds never ran.")
    if jobs.left_out:
        lines.append(f"Files left out because they cannot be read: {len(jobs.left_out)}.")
    return lines + ([] if expected is None else _about_paper(expected, jobs.jobs, runs))


def _small(jobs: Sequence[Job]) -> str:
    small = [job for job in jobs if job.config.get("small")]
    if not small:
        return ""
    some = "" if len(small) == len(jobs) else f"{len(small)} of {len(jobs)} are "
    return f"; {some}small variants, which stand in for runs of full size"


def _model(job: Job) -> str:
    name = job.choices["model"]
    return name if name not in ("hub", "local") else called(job.config["model"], name)


def _seeds(runs: Sequence[Run]) -> str:
    seeds = list(dict.fromkeys(run.seed for run in runs if run.seeds))
    if not seeds:
        return "of any seed"
    keys = {key for run in runs for key in run.seeds}
    what = next(iter(keys)) if len(keys) == 1 else "seed"
    return f"{what} {', '.join(seeds)}"


def _about_paper(expected: Expected, jobs: Sequence[Job], runs: Sequence[Run]) -> list[str]:
    """Returns the source of the published numbers, and a remark where they do not belong to these runs."""
    if not expected.values:
        return [f"No published numbers: {expected.source}."]
    lines = [f"The paper's numbers: {expected.source}, {expected.metric} of {expected.said_of}."]
    for column in [name for name, conditions in expected.columns.items() if not conditions]:
        means = [f"{arm} {spelt(row[column])}" for arm, row in expected.values.items() if column in row]
        lines.append(f"The paper gives only a mean for {column}, so no run is held against it: {', '.join(means)}.")
    columns = [name for name, conditions in expected.columns.items() if conditions]
    if not columns:
        return lines
    if not columns_of(expected, jobs):
        have = ", ".join(dict.fromkeys(run.task for run in runs))
        return [*lines, f"They are for {', '.join(columns)}; these runs are on {have}, so none is shown here."]
    if not any(expected.metric in run.metrics for run in runs):
        have = ", ".join(dict.fromkeys(name for run in runs for name in headline(run.metrics))) or "nothing"
        lines.append(f"These runs did not measure {expected.metric} (they measured {have}), so none is shown here.")
    elif not any(expected.arm(job) for job in jobs):
        lines.append(f"No run belongs to one of its arms, {', '.join(expected.arms)}.")
    elif not all(expected.is_of(job) for job in jobs):
        lines.append("Differences from them are shown only for such runs at full size; other runs are not comparable.")
    return lines


def sections(jobs: FinishedJobs, runs: Sequence[Run], expected: Expected | None = None) -> list[Section]:
    """Returns the sections that have something to show.

    Args:
        jobs: the jobs below the folder.
        runs: of these jobs.
        expected: the published numbers; None: there are none.
    """
    found, after = [], []
    metrics = tables.table_metrics(runs, expected)
    compared = {metric: compare.comparisons(runs, metric) for metric in metrics}
    for metric, (table, remarks) in compared.items():
        found.append(_results(runs, metric, expected, table))
        after += _comparisons(table, remarks, metric) + _variance(runs, metric)
    if not metrics and jobs.failures:
        found.append(_results(runs, "accuracy", expected, pd.DataFrame()))
    return [
        *_verdicts(runs, {metric: table for metric, (table, _) in compared.items()}),
        *found,
        *after,
        *_layers(jobs, runs),
        *_runs(jobs, runs),
    ]


def _verdicts(runs: Sequence[Run], compared: Mapping[str, pd.DataFrame]) -> list[Section]:
    said = [_BEYOND_USE] if any(run.is_trained and run.metrics for run in runs) else []
    found = verdicts.verdicts(runs, compared)
    return [Section(title="What was found", findings=found, said=said)] if found else []


def _results(runs: Sequence[Run], metric: str, expected: Expected | None, compared: pd.DataFrame) -> Section:
    results = tables.results(runs, metric, expected)
    of = "logarithms of the seeds" if is_logarithmic(metric) else "seeds"
    said = [
        f"Intervals are 95 %: Student's t over the {of} of an arm. For a single seed, and for seeds that are all "
        "alike, they are Wilson's over the questions, or Student's over the rows of a loss."
    ]
    said += filter(None, [verdicts.power(metric, compared)])
    if any(run.is_trained for run in runs) and not any(run.prefix for run in runs):
        said.append("The untouched model was not measured; evaluation.before=true gives it a row in each table.")
    if any(cell.paper is not None for cell in results.cells.values()):
        said.append("The paper's numbers come from single runs, and no interval includes their noise.")
    if results.count("failed") or results.count("missing"):
        said.append("A failed or missing seed is named in its cell and left out of the mean.")
    caption = f"{metric}: {'geometric mean' if is_logarithmic(metric) else 'mean'} over seeds"
    frame = results.frame()
    return Section(
        title=f"Results: {metric}", table=frame, caption=caption, said=said, plot=plots.plot_results(results)
    )


def _comparisons(table: pd.DataFrame, remarks: Sequence[str], metric: str) -> list[Section]:
    if not len(table):
        return [Section(title=f"Comparisons: {metric}", said=remarks)] if remarks else []
    rows = "rows" if "rows" in table else "questions"
    by_row = table[rows].notna().to_numpy() if rows in table else np.zeros(len(table), dtype=bool)
    num_tested = compare.num_tested(table)
    columns = [name for name in ("model", "task", "from", "to") if name in table]
    shown = _shared_apart(table.filter(items=columns)).assign(
        difference=[f"{value:+.3f}" for value in table["difference"]]
    )
    shown["95 % interval"] = _intervals(table)
    shown = shown.assign(**{name: table[name] for name in ("p", "p Holm", "smallest found", "seeds")})
    log = "differences of logarithms, " if is_logarithmic(metric) else ""
    how = []
    if by_row.any() and rows == "rows":
        shown["rows"], shown["effect d"] = table["rows"], table["effect d"]
        how.append(
            f"Paired by row: interval of {RESAMPLES:,} bootstrap draws of seeds and rows, with Student's t over the "
            "means of the seeds and of the rows where that is wider. p: the largest of the bootstrap's (a small one of "
            f"up to {num_resamples(len(table)):,} draws) and both of Student's. Effect d: mean over standard deviation "
            "of the rows' differences."
        )
    elif by_row.any():
        shown["questions"] = table["questions"]
        counts = table[["won", "lost"]].to_numpy(float)
        shown["only one right"] = ["–" if np.isnan(won) else f"{won:.0f} : {lost:.0f}" for won, lost in counts]
        shown["odds ratio"], shown["effect h"] = table["odds ratio"], table["effect h"]
        how.append(
            f"Paired by question: interval of {RESAMPLES:,} bootstrap draws of seeds and questions, "
            "with Student's t over the seeds' means where that is wider. p: the largest of the exact sign test's by "
            "question (McNemar's for one seed), the bootstrap's (a small one of up to "
            f"{num_resamples(len(table)):,} draws) and Student's. Only one right: answers that only the "
            "second got right, and those that only the first did; odds ratio: their ratio. Effect h: Cohen's."
        )
    if not by_row.all():
        shown["effect d"] = table["effect d"]
        how.append("Paired by seed: interval and p by Student's t. Effect d: mean over standard deviation.")
    how.append(
        f"p Holm is corrected for the {num_tested} comparisons of this table that were tested. Smallest found: the "
        f"difference that would be found with 80 % power at 0.05 / {num_tested}. A difference is stated only where "
        "its interval excludes zero and p Holm is below 0.05."
    )
    one = rows.removesuffix("s")
    by = "seed" if not by_row.any() else one if by_row.all() else f"{one} where {_KEPT[rows]} were kept"
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
    """Returns the pairs with the settings that both arms share in a column of their own, so that others stand out."""
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
    has_questions = any(run.rows(metric) for run in runs)
    how = "The analysis takes one value per run, so seeds are the only chance that it sees."
    if has_questions:
        how += " It holds for these questions; the comparisons above allow for other questions, too."
    found = []
    analyses = compare.analyses(runs, metric)
    for one in analyses:
        pairs = one.pairs
        title, caption = f"{metric}, {one.where}" if len(analyses) > 1 else metric, f"{of}: {one.text}"
        why_not = [f"No mixed model is fitted: {one.mixed}."] if isinstance(one.mixed, str) else []
        found.append(
            Section(
                title=f"Analysis of variance: {title}", table=one.variance.table, caption=caption, said=[how, *why_not]
            )
        )
        shown = pairs[["from", "to"]].assign(
            **{
                "difference": [f"{value:+.3f}" for value in pairs["difference"]],
                "95 % interval": _intervals(pairs),
                "p": pairs["p"],
                "smallest found": pairs["smallest found"],
                "said": [
                    _said(*row, has_questions) for row in zip(pairs["low"], pairs["high"], pairs["p"], strict=True)
                ],
            }
        )
        how_pairs = (
            f"Means over tasks and seeds, second minus first; p is for the family of all {len(pairs)} pairs, and so is "
            "the smallest difference that would be found with 80 % power."
        )
        found.append(Section(title=f"Tukey's HSD: {title}", table=shown, caption=caption, said=[how_pairs]))
        if not isinstance(one.mixed, str):
            found.append(_mixed(one.mixed, f"Mixed model: {title}", f"{of}: {one.where}", has_questions))
    return found


def _mixed(mixed: MixedModel, title: str, of: str, has_questions: bool) -> Section:
    table = mixed.table
    shown = table[["from", "to"]].assign(
        **{
            "difference": [f"{value:+.3f}" for value in table["difference"]],
            "95 % interval": _intervals(table),
            "p": table["p"],
            "p Holm": table["p Holm"],
            "said": [
                _said(*row, has_questions) for row in zip(table["low"], table["high"], table["p Holm"], strict=True)
            ],
        }
    )
    spreads = ", ".join(f"{value:.3g} between {name}s" for name, value in mixed.spreads.items() if name != "rest")
    findings = [f"Standard deviation of the values: {spreads}, {mixed.spreads['rest']:.3g} of the rest."]
    how = (
        "Arms are fixed effects, and tasks and seeds are crossed random ones (restricted maximum likelihood). Each arm "
        f"is compared with the first one, by Student's t with {mixed.df} degrees of freedom. p Holm is corrected for "
        f"the {len(table)} comparisons of this table. A spread between few tasks or seeds is known only roughly."
    )
    return Section(title=title, table=shown, caption=of, findings=findings, said=[how])


def _intervals(table: pd.DataFrame) -> list[str]:
    bounds = table[["low", "high"]].to_numpy(float)
    return ["–" if np.isnan(low) else compare.interval(low, high) for low, high in bounds]


def _layers(jobs: FinishedJobs, runs: Sequence[Run]) -> list[Section]:
    by_matrix, num_left_out = plots.plot_matrix_allocations(runs)
    drawn = [
        ("scores.png", plots.plot_score_profiles(jobs.records), ""),
        ("allocations.png", plots.plot_allocation_profiles(runs), ""),
        ("matrices.png", by_matrix, _NOT_DRAWN.format(num_left_out) if num_left_out else ""),
        ("", plots.plot_routing(runs), ""),
    ]
    found = [
        Section(title=plot.title, plot=plot, file=file, said=[said] if said else [])
        for file, plot, said in drawn
        if plot is not None
    ]
    if len(loads := tables.loads(runs)):
        caption = "Least and most used expert, as a multiple of an even share of the tokens, and where"
        found.append(Section(title="Expert load", table=loads, caption=caption, said=[_LOADS]))
    if len(influences := tables.influence_of_rows(runs)):
        caption = "The share of the train rows that raise the mean loss of the validation rows"
        found.append(Section(title="Influence of rows", table=influences, caption=caption, said=[_ROWS]))
    correlations = tables.correlations(jobs.records)
    if len(correlations):
        of, title = "Spearman's rank correlation of layer scores", "Rank correlation of layer profiles"
        plot = plots.plot_correlations(jobs.records) if len(correlations) > 12 else None
        if plot is not None:  # the plot shows the rest, so only the agreement of each with itself is given as numbers
            correlations = correlations.loc[[other == tables.ITSELF for other in correlations["and"]]]
        tree = plots.plot_clusters(jobs.records)
        why_not = [f"No dendrogram is drawn: {tree}."] if isinstance(tree, str) else []
        found.append(Section(title=title, table=correlations, caption=of, plot=plot, said=why_not))
        if not isinstance(tree, str):
            found.append(Section(title=tree.title, plot=tree, file="clusters.png", said=[_JOINS]))
    return found


def _runs(jobs: FinishedJobs, runs: Sequence[Run]) -> list[Section]:
    table, narrow = (
        tables.in_full(runs),
        ("run", "model", "task", "seed", *tables.table_metrics(runs), "all s", "state"),
    )
    narrow = [name for name in narrow if name in table]
    by = [name for name in ("model", "task", "run") if name in table]
    caption = "Measurements and cost by seed, with the seeds of an arm together"
    found = [Section(title="Every run", table=table, caption=caption, console=narrow, grouped_by=by)]
    if jobs.records:
        found.append(Section(title="Cost", table=tables.cost(jobs.records), caption="Summed over all runs"))
    if jobs.failures:
        lines = [
            {"run": r.arm, "task": r.task, "seed": r.seed, "error": r.job.error}
            for r in runs
            if isinstance(r.job, Failure)
        ]
        found.append(Section(title="Failed runs", table=pd.DataFrame(lines), caption="rerun=failed runs them again"))
    if jobs.failed_again:
        said = ["The numbers above are from the runs before. rerun=true runs them again."]
        found.append(Section(title="Failed when run again", findings=jobs.failed_again, said=said))
    if jobs.unfinished:
        found.append(Section(title="Unfinished", findings=jobs.unfinished))
    if jobs.left_out:
        found.append(Section(title="Left out", findings=jobs.left_out))
    if len(notes := tables.notes(jobs.records)):
        found.append(Section(title="Notes and warnings", table=notes, caption="Remarks that the runs left"))
    if jobs.records:
        table = tables.versions(jobs.records)
        found.append(Section(title="Versions", table=table, caption="Software of the finished runs"))
    again = pd.DataFrame({"command": [shlex.join(["layerif", *job.overrides]) for job in jobs.jobs]})
    found.append(Section(title="How to reproduce", table=again, caption="Each run as a command, failed ones last"))
    return found
