"""`layerif-report FOLDER`: the records below a folder as one table, paired comparisons and plots."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy import stats

from layerif.record import FILE, RunRecord

matplotlib.use("Agg")

RESAMPLES = 10_000
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by everybody


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="layerif-report", description=__doc__)
    parser.add_argument("folder", type=Path, help="a sweep's folder, such as outputs/sweeps/default")
    folder = parser.parse_args(arguments).folder
    try:
        write(folder)
    except ValueError as error:
        print(f"layerif-report: {error}", file=sys.stderr)
        sys.exit(1)


def write(folder: Path, console: Console | None = None) -> None:
    """Print the tables of `folder`, and leave report.md, report.csv, scores.png and allocations.png in it."""
    console = console or _console()
    records = read(folder, console)
    results, pairs, profiles = table(records), comparisons(records), correlations(records)
    show(results, "Results", console)
    if len(pairs):
        show(pairs, f"Paired by question ({RESAMPLES} bootstrap resamples)", console)
    if len(profiles):
        show(profiles, "Rank correlation of layer profiles (Spearman)", console)
    for finding in pairs["finding"] if len(pairs) else ():
        console.print(f"  {finding}", highlight=False)
    text = [f"# {folder.name}\n", _markdown(results)]
    text += [f"\n## Paired by question\n\n{_markdown(pairs)}"] * bool(len(pairs))
    text += [f"\n## Rank correlation of layer profiles (Spearman)\n\n{_markdown(profiles)}"] * bool(len(profiles))
    (folder / "report.md").write_text("\n".join(text) + "\n")
    results.to_csv(folder / "report.csv", index=False)
    plots = [folder / "scores.png", folder / "allocations.png"]
    plot_scores(records, plots[0])
    plot_allocations(records, plots[1])
    for file in (folder / "report.md", folder / "report.csv", *(plot for plot in plots if plot.exists())):
        console.print(f"  {file}", highlight=False, soft_wrap=True)


def read(folder: Path, console: Console) -> list[RunRecord]:
    """All records below `folder`, by task and seed, untrained and uniform ones first; unreadable ones are left out."""
    files = sorted(folder.rglob(FILE))
    if not files:
        raise ValueError(
            f"{str(folder)!r} holds no {FILE}: give the folder of a run or a sweep, such as outputs/sweeps/default"
        )
    records = []
    for file in files:
        try:
            records.append(RunRecord.read(file.parent))
        except ValueError as error:
            console.print(f"[yellow]left out:[/] {error}", highlight=False)
    if not records:
        raise ValueError(f"none of the {len(files)} records below {str(folder)!r} can be read")
    return sorted(records, key=_order)


def _order(record: RunRecord) -> tuple:
    """Baselines before what is compared with them."""
    return record.config["task"]["name"], record.seed, bool(record.config["method"]), record.source != "uniform"


def table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row per evaluated state of a model: the untouched one, and every fine-tuned one.

    Accuracy is a fraction with Wilson's 95 % interval over the questions; it says nothing about other seeds.
    """
    rows = []
    for record in records:
        for prefix in ("before/", ""):
            if f"{prefix}accuracy" not in record.metrics and (prefix or record.metrics):
                continue
            rows.append({"run": _label(record, prefix), **_row(record, prefix)})
    return pd.DataFrame(rows).drop_duplicates(ignore_index=True)


def _row(record: RunRecord, prefix: str) -> dict[str, object]:
    metrics, seconds = record.metrics, record.seconds
    interval = [metrics.get(f"{prefix}accuracy_{end}") for end in ("low", "high")]
    trained = not prefix and bool(record.config["method"])
    return {
        "task": record.config["task"]["name"],
        "seed": record.seed,
        "accuracy": metrics.get(f"{prefix}accuracy"),
        "95 % interval": f"{interval[0]:.3f} to {interval[1]:.3f}" if None not in interval else None,
        "questions": len(record.questions.get(f"{prefix}options", ())) or None,
        "trainable": record.parameters.get("trainable") if trained else 0,
        "evidence s": None if prefix else seconds.get("evidence"),
        "fit s": seconds.get("fit") if trained else None,
    }


def comparisons(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Differences in accuracy between runs of one task and seed, paired by question.

    Interval: percentile bootstrap of the mean difference over questions, 95 %. The finding calls a difference only what
    the interval excludes zero for; a single seed says nothing about others.
    """
    answered = {}
    for record in records:
        for prefix in ("before/", ""):
            if right := record.questions.get(f"{prefix}options"):
                answered.setdefault((record.config["task"]["name"], record.seed), {})[_label(record, prefix)] = right
    rows = []
    for (task, seed), runs in answered.items():
        for (first, of_first), (second, of_second) in itertools.combinations(runs.items(), 2):
            shared = sorted(of_first.keys() & of_second.keys())
            differences = np.array([float(of_second[name]) - float(of_first[name]) for name in shared])
            low, high = bootstrap_interval(differences, seed)
            verdict = "higher than" if low > 0 else "lower than" if high < 0 else "not distinguishable from"
            interval = f"{low:+.3f} to {high:+.3f}"
            rows.append(
                {
                    "task": task,
                    "seed": seed,
                    "from": first,
                    "to": second,
                    "difference": differences.mean(),
                    "95 % interval": interval,
                    "questions": len(shared),
                    "finding": f"{task}: {second} is {verdict} {first} "
                    f"({differences.mean():+.3f}, 95 % interval {interval}, {len(shared)} questions)",
                }
            )
    return pd.DataFrame(rows)


def bootstrap_interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    if np.ptp(differences) == 0:  # every resample is the same
        return float(differences[0]), float(differences[0])
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def profiles(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """The distinct measured layer profiles, by task and estimator; constant ones say nothing and are left out."""
    found: dict[str, RunRecord] = {}
    for record in records:
        if record.scores and len(set(record.scores)) > 1:
            name = f"{record.config['task']['name']} {_estimator(record)}"
            if name in found and found[name].scores != record.scores:
                name = f"{name} seed {record.seed}"
            found.setdefault(name, record)
    return found


def correlations(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Spearman's rank correlation of the layer profiles of one model, and of each with itself on other samples."""
    found = profiles(records)
    rows = []
    for (first, one), (second, other) in itertools.combinations(found.items(), 2):
        if one.layers == other.layers:
            correlation = stats.spearmanr(one.scores, other.scores)[0]
            rows.append({"profile": first, "and": second, "Spearman": correlation})
    for name, record in found.items():
        if record.reliability is not None:
            itself = "itself, on disjoint halves of its samples"
            rows.append({"profile": name, "and": itself, "Spearman": record.reliability})
    return pd.DataFrame(rows)


def plot_scores(records: Sequence[RunRecord], file: Path) -> None:
    """Scores per layer, each profile as a fraction of its largest."""
    found = profiles(records)
    if not found:
        return
    figure, axes = _figure()
    for (name, record), colour in zip(found.items(), itertools.cycle(COLOURS)):
        scores = np.array(record.scores)
        axes.plot(range(len(scores)), scores / scores.max(), marker="o", markersize=4, color=colour, label=name)
    axes.set(xlabel="layer (decoder block)", ylabel="score, as a fraction of the largest", ylim=(0, 1.05))
    means = {record.higher_means for record in found.values()}
    _finish(figure, axes, file, f"Layer scores (higher = {' or '.join(sorted(means))})")


def plot_allocations(records: Sequence[RunRecord], file: Path) -> None:
    """What each layer got, one line per distinct allocation."""
    distinct: dict[tuple, tuple[str, RunRecord]] = {}
    for record in records:
        if record.allocation and (record.config["method"] or len(records) == 1):
            distinct.setdefault(tuple(record.allocation["values"]), (_label(record, ""), record))
    if not distinct:
        return
    figure, axes = _figure()
    kind = next(iter(distinct.values()))[1].allocation["kind"]
    width = 0.8 / len(distinct)
    for number, ((values, (name, record)), colour) in enumerate(zip(distinct.items(), itertools.cycle(COLOURS))):
        shifted = np.arange(len(values)) + (number - (len(distinct) - 1) / 2) * width
        axes.bar(shifted, values, width, color=colour, label=f"{name} (budget {record.allocation['budget']})")
    axes.set(xlabel="layer (decoder block)", ylabel=kind)
    _finish(figure, axes, file, f"Allocated {kind} per layer")


def print_run(record: RunRecord, folder: Path, console: Console | None = None) -> None:
    """One run's summary on the console, and its plots in its folder."""
    console = console or _console()
    scores, values = record.scores, record.allocation["values"]
    layers = pd.DataFrame({"layer": record.layers, "score": scores, record.allocation["kind"]: values})
    highest = [record.layers[index] for index in np.argsort(scores)[::-1][:3]]
    ranking = f"; highest: {', '.join(highest)}" if len(set(scores)) > 1 else ""
    console.print(f"\n{record.source}{ranking}", highlight=False)
    console.print(f"{record.allocation['kind']} {values} (budget {record.allocation['budget']})", highlight=False)
    if record.metrics:
        show(table([record]), record.config["task"]["name"], console)
    for name, value in record.metrics.items():
        if not name.removeprefix("before/").startswith("accuracy"):  # those stand in the table
            console.print(f"  {name}: {_text(value)}", highlight=False)
    for note in record.notes:
        console.print(f"  note: {note}", highlight=False)
    layers.to_csv(folder / "layers.csv", index=False)
    plot_scores([record], folder / "scores.png")
    plot_allocations([record], folder / "allocation.png")


def show(frame: pd.DataFrame, title: str, console: Console) -> None:
    """A data frame as a table; prose (`finding`) goes below it, not into it."""
    frame = frame.drop(columns="finding", errors="ignore")
    shown = Table(title=title, title_justify="left")
    for column in frame.columns:
        is_text = any(isinstance(value, str) for value in frame[column])
        shown.add_column(str(column), justify="left" if is_text else "right")
    for row in frame.itertuples(index=False):
        shown.add_row(*map(_text, row))
    console.print(shown)


def _console() -> Console:
    """As wide as the terminal; a log file has no width, and a table cut to 80 columns cannot be read."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _label(record: RunRecord, prefix: str) -> str:
    if prefix:
        return "before fine-tuning"
    method = next((part for part in [record.config["method"]] if part), None)
    return f"{_estimator(record)} {record.allocation.get('kind', '')}".strip() + ("" if method else " (not trained)")


def _estimator(record: RunRecord) -> str:
    name = record.config["estimator"]["_target_"].split(".")[-2]
    aggregation = record.config["estimator"].get("aggregation", "all")
    return name if aggregation == "all" else f"{name} {aggregation}"


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else str(value)


def _markdown(frame: pd.DataFrame) -> str:
    frame = frame.drop(columns="finding", errors="ignore")
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    rows += [list(map(_text, row)) for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _figure():
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _finish(figure, axes, file: Path, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
