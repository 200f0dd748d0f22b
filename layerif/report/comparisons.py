"""Comparisons of arms: paired by question or by seed, corrected for their number, and put into words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from layerif.record.frames import QUESTIONS, is_logarithmic
from layerif.report.arms import Run, comparable, distinct, same_repetition
from layerif.report.mixed import MixedModel, TooLittle, mixed_model
from layerif.stats import (
    ALPHA,
    Difference,
    Variance,
    all_paired_by_question,
    anova,
    cohens_h,
    holm,
    num_resamples,
    odds_ratio,
    paired_by_seed,
    smallest_difference,
    standardised,
    tukey,
)


def comparisons(runs: Sequence[Run], metric: str) -> tuple[pd.DataFrame, list[str]]:
    """Compares every two comparable arms of a model and task.

    Arms are paired by evaluated row where the answers or losses were kept, and by seed otherwise. p Holm is corrected
    for all rows of the table that were tested.

    Args:
        runs: of all arms.
        metric: the name of a metric.

    Returns:
        One row for every two arms, and a remark on every two that could not be paired.
    """
    paired: list[tuple[bool, list[tuple[Run, Run]]]] = []
    remarks, values = [], _values(runs, metric)
    for first, second in itertools.combinations(_arms(runs, metric), 2):
        if not comparable(first[0], second[0]):
            continue
        pairs = [(one, other) for one in first for other in second if same_repetition(one, other)]
        by_row = all(id(run) in values for pair in pairs for run in pair)
        if by_row:
            pairs = [pair for pair in pairs if _asked(*_rows([pair], values)).any()]
        if not pairs:
            shared = ("question" if metric in QUESTIONS else "row") if by_row else "seed"
            remarks.append(f"{first[0].column}: {second[0].arm} and {first[0].arm} share no {shared}, not compared")
            continue
        paired.append((by_row, pairs))
    places = list(dict.fromkeys((run.model, run.task) for run in runs))
    paired.sort(key=lambda kept: places.index((kept[1][0][0].model, kept[1][0][0].task)))
    asked = (_rows(pairs, values) for by_row, pairs in paired if by_row)
    are_answers, resamples = metric in QUESTIONS, num_resamples(len(paired))
    found = iter(all_paired_by_question(asked, are_answers=are_answers, resamples=resamples))
    of_rows = _by_question if are_answers else _by_loss
    rows = [of_rows(pairs, values, next(found)) if by_row else _by_seed(pairs, metric) for by_row, pairs in paired]
    table = pd.DataFrame(rows)
    if rows:
        tested = max(1, num_tested(table))
        table["p Holm"] = holm(table["p"].to_numpy())
        table["smallest found"] = [smallest_difference(found, tested) for found in table.pop("found")]
        table["finding"] = [finding(row, metric, tested) for row in table.to_dict("records")]
    return table, remarks


def num_tested(table: pd.DataFrame) -> int:
    """Returns the number of rows of `comparisons` whose seeds tell chance from effect; p is corrected for them."""
    return int(np.count_nonzero(~np.isnan(table["p"].to_numpy(dtype=float))))


def _arms(runs: Sequence[Run], metric: str) -> list[list[Run]]:
    """Returns the repetitions of each arm, model and task that measured the metric."""
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if metric in run.metrics:
            found.setdefault((run.model, run.task, run.arm), []).append(run)
    return list(found.values())


def _values(runs: Sequence[Run], metric: str) -> dict[int, np.ndarray]:
    """Returns the values of each run that kept them, by its `id`: NaN for a row that it was not asked."""
    kept: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.rows(metric):
            kept.setdefault((run.model, run.task), []).append(run)
    found = {}
    for of_place in kept.values():
        names = sorted(set().union(*(run.rows(metric) for run in of_place)))
        for run in of_place:
            given = run.rows(metric)
            found[id(run)] = np.array([given.get(name, np.nan) for name in names], dtype=float)
    return found


def _rows(pairs: Sequence[tuple[Run, Run]], values: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values (S×Q) of the first and of the second run of each pair."""
    first, second = (np.array([values[id(run)] for run in side]) for side in zip(*pairs, strict=True))
    return first, second


def _asked(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return ~np.isnan(first + second)


def _by_question(
    pairs: Sequence[tuple[Run, Run]], answers: Mapping[int, np.ndarray], found: Difference
) -> dict[str, object]:
    first_SQ, second_SQ = _rows(pairs, answers)
    asked_SQ = _asked(first_SQ, second_SQ)
    won, lost = int((second_SQ > first_SQ).sum()), int((second_SQ < first_SQ).sum())
    num_questions = int(asked_SQ.any(axis=0).sum())
    counts = {"questions": num_questions, "won": won, "lost": lost, "odds ratio": odds_ratio(won, lost)}
    effect = cohens_h(float(first_SQ[asked_SQ].mean()), float(second_SQ[asked_SQ].mean()))
    return _row(pairs, found) | counts | {"effect h": effect}


def _by_loss(
    pairs: Sequence[tuple[Run, Run]], losses: Mapping[int, np.ndarray], found: Difference
) -> dict[str, object]:
    difference_SQ = np.diff(_rows(pairs, losses), axis=0)[0]
    asked_Q = ~np.isnan(difference_SQ).all(axis=0)
    effect = standardised(np.nanmean(difference_SQ[:, asked_Q], axis=0))
    return _row(pairs, found) | {"rows": int(asked_Q.sum()), "effect d": effect}


def _by_seed(pairs: Sequence[tuple[Run, Run]], metric: str) -> dict[str, object]:
    values = np.array([[one.metrics[metric], other.metrics[metric]] for one, other in pairs], dtype=float)
    difference_S = np.diff(np.log(values) if is_logarithmic(metric) else values, axis=1)[:, 0]
    return _row(pairs, paired_by_seed(difference_S)) | {"effect d": standardised(difference_S)}


def _row(pairs: Sequence[tuple[Run, Run]], found: Difference) -> dict[str, object]:
    first, second = pairs[0]
    place = ({"model": first.model} if first.model else {}) | {"task": first.task}
    row = {"from": first.arm, "to": second.arm, "seeds": len(pairs), "difference": found.value, "low": found.low}
    return {**place, **row, "high": found.high, "p": found.p, "found": found}


def verdict(low: float, high: float, p: float) -> str:
    """Puts a difference into words: it counts where its interval excludes zero and its corrected p is below 0.05.

    NaN, which comes from seeds without spread, supports nothing.

    Args:
        low: of the interval.
        high: of the interval.
        p: corrected for the number of comparisons.
    """
    if p < ALPHA and low > 0:
        return "higher than"
    if p < ALPHA and high < 0:
        return "lower than"
    return "not distinguishable from"


def finding(row: Mapping[str, Any], metric: str, num_comparisons: int) -> str:
    """Puts one row of `comparisons` into a sentence, with its grounds and its limits.

    Args:
        row: of `comparisons`.
        metric: the name of the metric.
        num_comparisons: those that p was corrected for.
    """
    where = " ".join(str(row[key]) for key in ("model", "task") if key in row)
    what = f"ln {metric}" if is_logarithmic(metric) else metric
    if np.isnan(row["p"]):
        pair = f"{what} of {row['to']} minus that of {row['from']}"
        seeds = "one seed" if row["seeds"] == 1 else f"each of {row['seeds']} seeds"
        return f"{where}: {pair} is {row['difference']:+.3f} at {seeds}, which decides nothing"
    said = verdict(row["low"], row["high"], row["p Holm"])
    corrected = f"after Holm's correction of {num_comparisons}" if num_comparisons > 1 else "of a single comparison"
    bounds, p = interval(row["low"], row["high"]), p_text(row["p Holm"])
    sentence = f"{where}: {what} of {row['to']} is {said} that of {row['from']} "
    sentence += f"({row['difference']:+.3f}, 95 % interval {bounds}, p {p} {corrected})"
    if said.startswith("not"):
        least = row["smallest found"]
        if np.isinf(least):
            return f"{sentence}; a difference of any size would mostly have been missed"
        return sentence if np.isnan(least) else f"{sentence}; one below {least:.3f} would mostly have been missed"
    return f"{sentence}; one seed, which says nothing about others" if row["seeds"] == 1 else sentence


def interval(low: float, high: float) -> str:
    """Spells the bounds of an interval of differences.

    Args:
        low: a difference.
        high: a difference.
    """
    return f"{low:+.3f} to {high:+.3f}"


def p_text(p: float) -> str:
    """Spells a p value."""
    return "below 0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True, kw_only=True)
class Analysed:
    """The analyses of one group of arms that are alike in all else.

    Attributes:
        where: its place.
        text: the runs that are in it.
        variance: the analysis of variance.
        pairs: every two arms by Tukey's HSD.
        mixed: the mixed model; a text that says why there is none.
    """

    where: str
    text: str
    variance: Variance
    pairs: pd.DataFrame
    mixed: MixedModel | str


def analyses(runs: Sequence[Run], metric: str) -> list[Analysed]:
    """Analyses the variance over allocation × task, compares every two arms by Tukey's HSD, and fits a mixed model.

    Each group of arms that are alike in all else has analyses of its own. It holds the fine-tuned or pruned runs of
    those arms that ran on all tasks of the group, since others would be compared across tasks. Repetitions that no seed
    touched are one run. A group with a single arm, or without repetitions, is left out.

    Args:
        runs: of all arms.
        metric: the name of a metric.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in distinct([run for run in runs if run.is_trained and metric in run.metrics]):
        groups.setdefault((run.model, *run.factors[1:]), []).append(run)
    found = []
    for group in groups.values():
        values = [np.log(run.metrics[metric]) if is_logarithmic(metric) else run.metrics[metric] for run in group]
        columns = {name: [getattr(run, name) for run in group] for name in ("arm", "task", "seed")}
        frame = pd.DataFrame({**columns, "value": values})
        ran_on = {arm: {run.task for run in group if run.arm == arm} for arm in dict.fromkeys(r.arm for r in group)}
        tasks = list(dict.fromkeys(run.task for run in group))
        complete = [arm for arm, its_tasks in ran_on.items() if len(its_tasks) == len(tasks)]
        kept = frame.query("arm in @complete")
        variance = anova(kept) if complete else None
        if variance is None:
            continue
        shared = [word for word in complete[0].split() if "=" in word and all(word in arm.split() for arm in complete)]
        of = " ".join([group[0].model, *shared]).strip()
        where = (f"{of} on " if of else "") + ", ".join(tasks)
        text = f"{where}: {len(kept)} runs, {len(complete)} arms; fitted: {variance.model}"
        left_out = len(ran_on) - len(complete)
        text += f"; without {left_out} arms that did not run on all tasks" if left_out else ""
        mixed = _mixed_or_why_not(kept)
        found.append(Analysed(where=where, text=text, variance=variance, pairs=tukey(kept, variance), mixed=mixed))
    return found


def _mixed_or_why_not(runs: pd.DataFrame) -> MixedModel | str:
    try:
        return mixed_model(runs)
    except TooLittle as why:
        return str(why)
