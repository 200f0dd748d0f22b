"""The findings of a report in plain words: who is better, who cannot be told apart, and who has collapsed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from layerif.record.frames import is_better, is_logarithmic, is_row_loss
from layerif.record.record import RunRecord
from layerif.record.text import spelt
from layerif.report.arms import Run
from layerif.report.comparisons import verdict
from layerif.stats import POWER

EQUAL = 0.005  # share by which arms of equal size may differ in trainable parameters
_AT_MOST = 8  # pairs of one task that are told apart in words; the table has them all
_APART = "No two arms were measured on the same rows or seeds, or differ in one thing alone, so none are compared."

# By metric: the row of a table that compares one pair of arms by it.
Pair = Mapping[str, Mapping[str, Any]]


def verdicts(runs: Sequence[Run], compared: Mapping[str, pd.DataFrame]) -> list[str]:
    """Puts the comparisons into sentences that need no statistics to be read.

    Args:
        runs: all runs of the report.
        compared: by metric, the first one first, a table of `comparisons`.
    """
    found = []
    places = list(dict.fromkeys((run.model, run.task) for run in runs))
    for model, task in places:
        pairs: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
        for metric, table in compared.items():
            for row in table.to_dict("records"):
                if (row.get("model", ""), row["task"]) == (model, task):
                    pairs.setdefault((row["from"], row["to"]), {})[metric] = row  # type: ignore[assignment]
        where = f"{model} {task}: ".lstrip() if len(places) > 1 else ""
        untouched = {run.arm for run in runs if run.prefix}
        found += [where + sentence for sentence in _of_place(list(pairs.values()), untouched)]
    measured = [run for run in runs if any(metric in run.metrics for metric in compared)]
    if measured and not found:
        is_alone = len({run.arm for run in measured}) == 1
        figures = (
            f"{_named(metric)} {spelt(run.metrics[metric])} on {f'{run.model} {run.task}'.strip()}"
            for run in measured[:1]
            for metric in compared
            if metric in run.metrics
        )
        alone = f"There is one arm, so nothing is compared. {measured[0].arm}: {', '.join(figures)}."
        found.append(alone if is_alone else _APART)
    return found + unequal(runs) + one_rate(runs) + collapsed(runs, list(compared))


def power(metric: str, table: pd.DataFrame) -> str:
    """Says which difference the comparisons of a table could have seen; empty without any."""
    least = table["smallest found"].to_numpy(float) if len(table) else np.array([])
    known = least[~np.isnan(least)]
    if not len(known):
        return (
            "Nothing here tells chance from effect, so no difference of any size could be seen." if len(least) else ""
        )
    low, high = (_spelt_size(metric, size) for size in (known.min(), known.max()))
    sizes = low + _unit(metric) if low == high else f"{low} to {high}{_unit(metric)}, by the pair of arms"
    return f"Smallest difference that these runs would have found with {100 * POWER:.0f} % power: {sizes}."


def unequal(runs: Sequence[Run]) -> list[str]:
    """Warns of arms of one task whose numbers of trainable parameters differ by more than EQUAL."""
    found = []
    for model, task in dict.fromkeys((run.model, run.task) for run in runs):
        sizes: dict[str, float] = {}
        for run in runs:
            if (run.model, run.task) == (model, task) and (size := _trainable(run)):
                sizes[run.arm] = max(sizes.get(run.arm, 0), size)
        if not sizes or max(sizes.values()) <= (1 + EQUAL) * min(sizes.values()):
            continue
        least, most = min(sizes, key=lambda arm: sizes[arm]), max(sizes, key=lambda arm: sizes[arm])
        found.append(
            f"The arms on {f'{model} {task}'.strip()} are not of equal size: {least} trains {sizes[least]:,} "
            f"parameters and {most} {sizes[most]:,}. A difference of more than {EQUAL:.1%} in size may itself be the "
            "reason of a difference in results."
        )
    return found


def one_rate(runs: Sequence[Run]) -> list[str]:
    """Says that arms were compared at one learning rate, where several were fine-tuned at the same one."""
    trained = [run for run in runs if _trainable(run)]
    rates = {(run.job.config.get("method") or {}).get("learning_rate") for run in trained}
    if len({run.arm for run in trained}) < 2 or len(rates) > 1 or None in rates:
        return []
    return [
        f"All arms were fine-tuned at one learning rate, {rates.pop():g}. An arm may do better at another one, so this "
        "compares the arms at this rate only."
    ]


def _trainable(run: Run) -> int:
    is_fine_tuned = run.is_trained and isinstance(run.job, RunRecord)
    return run.job.parameters.get("trainable", 0) if is_fine_tuned else 0  # type: ignore[union-attr]


def collapsed(runs: Sequence[Run], metrics: Sequence[str]) -> list[str]:
    """Names the arms that predict worse than token frequencies alone, and so make no use of what they read.

    The tokens of a task's answers may be so few that their frequencies are a good guess. A loss on rows is therefore
    judged only where the untouched model was measured and is better than they are.
    """
    found = []
    for metric in metrics:
        worst: dict[tuple[str, str, str], float] = {}
        for run in runs:
            if run.is_trained and metric in run.metrics:
                worst.setdefault((run.model, run.task, run.arm), 0.0)
                worst[run.model, run.task, run.arm] = max(worst[run.model, run.task, run.arm], run.metrics[metric])
        for (model, task, arm), value in worst.items():
            bound = _bound(runs, metric, model, task)
            if bound is not None and value > bound:
                found.append(
                    f"Collapsed on {f'{model} {task}'.strip()}: {arm} has a {_named(metric)} of {spelt(value)}, beyond "
                    f"{spelt(bound)}, which is that of the token frequencies alone; it makes no use of what it reads."
                )
    return found


def _bound(runs: Sequence[Run], metric: str, model: str, task: str) -> float | None:
    there = [run for run in runs if (run.model, run.task) == (model, task) and isinstance(run.job, RunRecord)]
    bounds = [run.job.context_free[metric] for run in there if metric in run.job.context_free]  # type: ignore[union-attr]
    untouched = [run.metrics[metric] for run in there if run.prefix and metric in run.metrics]
    if not bounds or (not untouched and not is_logarithmic(metric)) or any(value >= bounds[0] for value in untouched):
        return None
    return bounds[0]


def _of_place(pairs: Sequence[Pair], untouched: set[str]) -> Iterator[str]:
    real = [pair for pair in pairs if any(map(_is_real, pair.values()))]
    alike, apart = _better_than_untouched(real, untouched)
    if alike:
        yield _sentence_of_many(alike)
    yield from map(_sentence, apart[:_AT_MOST])
    if len(apart) > _AT_MOST:
        yield f"{len(apart) - _AT_MOST} more pairs of arms differ; the comparisons below name them."
    rest = [pair for pair in pairs if not any(map(_is_real, pair.values()))]
    if not rest:
        return
    if len(rest) == 1:
        row = next(iter(rest[0].values()))
        subject = f"{row['to']} and {row['from']}"
    else:
        subject = f"{len(rest)} {'other ' * bool(real)}pairs of arms"
    metrics = dict.fromkeys(metric for pair in rest for metric in pair)
    missed = " and ".join(_missed(metric, rest) for metric in metrics)
    yield f"{subject} cannot be told apart: a difference {missed} would mostly have been missed."


def _better_than_untouched(real: Sequence[Pair], untouched: set[str]) -> tuple[list[Pair], list[Pair]]:
    """The pairs in which an arm is better than one untouched model by the same metrics, if several; and the others."""
    groups: dict[tuple, list[Pair]] = {}
    for pair in real:
        by = {metric: row["difference"] for metric, row in pair.items() if _is_real(row)}
        first = next(iter(pair.values()))
        if first["from"] in untouched and all(is_better(metric, difference) for metric, difference in by.items()):
            groups.setdefault((first["from"], *by), []).append(pair)
    alike = max(groups.values(), key=len, default=[])
    alike = alike if len(alike) > 1 else []
    return alike, [pair for pair in real if not any(pair is one for one in alike)]


def _sentence_of_many(pairs: Sequence[Pair]) -> str:
    rows = {metric: [pair[metric] for pair in pairs] for metric, row in pairs[0].items() if _is_real(row)}
    arms = [row["to"] for row in next(iter(rows.values()))]
    amounts = []
    for metric, of_pairs in rows.items():
        sizes = sorted({abs(row["difference"]) for row in of_pairs})
        way = np.sign(of_pairs[0]["difference"])
        bounds = dict.fromkeys(_spelt_size(metric, size, sign=way) for size in (sizes[0], sizes[-1]))
        amounts.append(f"{_named(metric)} {'higher' if way > 0 else 'lower'} by {' to '.join(bounds)}{_unit(metric)}")
    names = f"{', '.join(arms[:-1])} and {arms[-1]}"
    return f"{names} are better than the {next(iter(pairs[0].values()))['from']}: {', '.join(amounts)}."


def _is_real(row: Mapping[str, Any]) -> bool:
    return not verdict(row["low"], row["high"], row["p Holm"]).startswith("not")


def _sentence(pair: Pair) -> str:
    """Says which arm of a pair is better by the metrics that tell them apart, and which metrics do not."""
    real = {metric: row for metric, row in pair.items() if _is_real(row)}
    first = next(iter(real.values()))
    better = {is_better(metric, row["difference"]) for metric, row in real.items()}
    amounts = [_amount(metric, row) for metric, row in real.items()]
    open_ones = [f"by {_named(metric)} they cannot be told apart" for metric in pair if metric not in real]
    seeds = ["one seed says nothing about others"] if first["seeds"] == 1 else []
    if len(better) == 2:
        said = f"{first['to']} is better than {first['from']} in one way and worse in another"
    else:
        said = f"{first['to']} is {'better' if True in better else 'worse'} than {first['from']}"
    return f"{said}: {'; '.join([', '.join(amounts), *open_ones, *seeds])}."


def _amount(metric: str, row: Mapping[str, Any]) -> str:
    bounds = sorted((abs(row["low"]), abs(row["high"])))
    low, high = (_spelt_size(metric, bound, sign=np.sign(row["difference"])) for bound in bounds)
    size = _spelt_size(metric, abs(row["difference"]), sign=np.sign(row["difference"]))
    way = "higher" if row["difference"] > 0 else "lower"
    return f"{_named(metric)} {way} by {size}{_unit(metric)} ({low} to {high})"


def _missed(metric: str, pairs: Sequence[Pair]) -> str:
    """The size below which a difference would mostly have been missed in at least one of the pairs."""
    least = np.array([pair[metric]["smallest found"] for pair in pairs if metric in pair], dtype=float)
    known = least[~np.isnan(least)]
    if not len(known):
        return f"in {_named(metric)} of any size"
    size = known.max()
    if np.isinf(size):
        return f"in {_named(metric)} of any size"
    return f"in {_named(metric)} below {_spelt_size(metric, size)}{_unit(metric)}"


def _named(metric: str) -> str:
    return f"{metric} per token" if is_row_loss(metric) else metric


def _spelt_size(metric: str, size: float, *, sign: float = 1.0) -> str:
    """Spells the size of a difference: of logarithms as a share, of fractions and losses as it is."""
    if np.isinf(size):
        return "none of any size"
    if is_logarithmic(metric):
        return f"{100 * abs(np.expm1(sign * size)):.1f} %"
    return spelt(float(size))


def _unit(metric: str) -> str:
    return " nats" if is_row_loss(metric) else ""
