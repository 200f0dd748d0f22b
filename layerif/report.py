"""`layerif-report FOLDER`: the records below a folder as one table, paired comparisons and plots."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
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
    results, pairs = table(records), comparisons(records, console)
    tables = {
        "Results": results,
        f"Paired by question ({RESAMPLES} bootstrap resamples)": pairs.drop(columns="finding", errors="ignore"),
        "Rank correlation of layer profiles (Spearman)": correlations(records),
    }
    text = [f"# {folder.name}\n"]
    for title, frame in tables.items():
        if len(frame):
            show(frame, title, console)
            text.append(f"## {title}\n\n{_markdown(frame)}\n")
    for finding in pairs["finding"] if len(pairs) else ():
        console.print(f"  {finding}", highlight=False, markup=False)
    (folder / "report.md").write_text("\n".join(text))
    results.to_csv(folder / "report.csv", index=False)
    plot_scores(records, folder / "scores.png")
    plot_allocations(records, folder / "allocations.png")
    files = [folder / name for name in ("report.md", "report.csv", "scores.png", "allocations.png")]
    for file in filter(Path.exists, files):
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
    place = _called(record.config["model"]), _called(record.config["task"]), record.seed
    return *place, bool(record.config["method"]), record.source != "uniform"


@dataclass(frozen=True)
class State:
    """A model as a run found it (prefix "before/") or left it ("").

    where: task and seed, and the model unless all records share one. place: the same in words; states of one place can
    be compared. label: unlike that of every other state of the place.
    """

    record: RunRecord
    prefix: str
    where: Mapping[str, object]
    place: str
    label: str

    @property
    def answers(self) -> dict[str, bool]:
        return self.record.questions.get(f"{self.prefix}options", {})


def states(records: Sequence[RunRecord]) -> list[State]:
    """All there is to compare, place by place, untouched models first (the same one once); no run hides another."""
    places: dict[tuple[str, str, int], list[RunRecord]] = defaultdict(list)
    for record, model, task in zip(records, _titles(records, "model"), _titles(records, "task"), strict=True):
        places[model, task, record.seed].append(record)
    found = []
    for (model, task, seed), runs in places.items():
        where = ({"model": model} if model else {}) | {"task": task, "seed": seed}
        place = f"{model} {task}".strip() + f" seed {seed}" * (len({seed for *_, seed in places}) > 1)
        before = [run for run in runs if "before/accuracy" in run.metrics]
        untouched = _distinct(before, key=lambda run: run.questions.get("before/options"))
        labels = _labels(["before fine-tuning"] * len(untouched), [_settings(run, "evaluation") for run in untouched])
        found += [State(run, "before/", where, place, label) for run, label in zip(untouched, labels, strict=True)]
        only_scored = [run for run in runs if not run.config["method"] and not run.metrics]
        for alike in (only_scored, [run for run in runs if run.config["method"]]):
            labels = _labels([_name(run) for run in alike], [_settings(run) for run in alike])
            found += [State(run, "", where, place, label) for run, label in zip(alike, labels, strict=True)]
    return found


def table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row per evaluated state of a model: the untouched one (once for all seeds), and every fine-tuned one.

    Accuracy is a fraction with Wilson's 95 % interval over the questions, of one seed: seeds are not pooled.
    """
    rows: dict[Hashable, dict[str, object]] = {}
    for number, state in enumerate(states(records)):
        record, prefix = state.record, state.prefix
        low, high = (record.metrics.get(f"{prefix}accuracy_{end}") for end in ("low", "high"))
        trained = not prefix and bool(record.config["method"])
        row = {
            "run": state.label,
            **state.where,
            "accuracy": record.metrics.get(f"{prefix}accuracy"),
            "95 % interval": None if low is None or high is None else f"{low:.3f} to {high:.3f}",
            "questions": len(state.answers) or None,
            "trainable": record.parameters.get("trainable") if trained else 0,
            "evidence s": None if prefix else record.seconds.get("evidence"),
            "fit s": record.seconds.get("fit") if trained else None,
        }
        kept = rows.setdefault(str(row | {"seed": None}) if prefix else number, row)
        if kept is not row:
            kept["seed"] = f"{kept['seed']}, {row['seed']}"
    return pd.DataFrame(list(rows.values()))


def comparisons(records: Sequence[RunRecord], console: Console | None = None) -> pd.DataFrame:
    """Differences in accuracy between runs of one model, task and seed, paired by question.

    Interval: percentile bootstrap of the mean difference over questions, 95 %. The finding calls a difference only what
    the interval excludes zero for. Seeds are not pooled: a finding holds for its own and says nothing about others.
    """
    rows = []
    for first, second in itertools.combinations([state for state in states(records) if state.answers], 2):
        if first.where != second.where or second.prefix:
            continue
        shared = sorted(first.answers.keys() & second.answers.keys())
        if not shared:
            said = f"{first.place}: {second.label} and {first.label} share no question and are not compared"
            (console or _console()).print(said, highlight=False, markup=False)
            continue
        differences = np.array([float(second.answers[name]) - float(first.answers[name]) for name in shared])
        low, high = bootstrap_interval(differences, first.record.seed)
        verdict = "higher than" if low > 0 else "lower than" if high < 0 else "not distinguishable from"
        mean, interval = differences.mean(), f"{low:+.3f} to {high:+.3f}"
        row = {"from": first.label, "to": second.label, "difference": mean, "95 % interval": interval}
        finding = f"{first.place}: {second.label} is {verdict} {first.label} ({mean:+.3f}, 95 % interval {interval}, "
        rows.append({**first.where, **row, "questions": len(shared), "finding": f"{finding}{len(shared)} questions)"})
    return pd.DataFrame(rows)


def bootstrap_interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    if np.ptp(differences) == 0:  # every resample is the same
        return float(differences[0]), float(differences[0])
    rng = np.random.default_rng(seed)
    found = stats.bootstrap((differences,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def profiles(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """The distinct measured layer profiles by what they are of; constant ones say nothing and are left out."""
    found: dict[tuple, RunRecord] = {}
    for record, model, task in zip(records, _titles(records, "model"), _titles(records, "task"), strict=True):
        if len(set(record.scores)) > 1:
            name = " ".join(filter(None, [model, task, _estimator(record)]))
            found.setdefault((name, *record.scores), record)
    settings = [_settings(record, "seed", "task", "probe", "estimator") for record in found.values()]
    return dict(zip(_labels([name for name, *_ in found], settings), found.values(), strict=True))


def correlations(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Spearman's rank correlation of the layer profiles of one model, and of each with itself on other samples."""
    found = profiles(records)
    rows = []
    for (first, one), (second, other) in itertools.combinations(found.items(), 2):
        if one.layers == other.layers and _content(one, "model") == _content(other, "model"):
            rows.append({"profile": first, "and": second, "Spearman": stats.spearmanr(one.scores, other.scores)[0]})
    itself = "itself, on disjoint halves of its samples"
    measured_twice = [(name, one.reliability) for name, one in found.items() if one.reliability is not None]
    rows += [{"profile": name, "and": itself, "Spearman": reliability} for name, reliability in measured_twice]
    return pd.DataFrame(rows)


def plot_scores(records: Sequence[RunRecord], file: Path) -> None:
    """Scores per layer, each profile as a fraction of its largest."""
    found = profiles(records)
    if not found:
        return
    means = " or ".join(sorted({record.higher_means for record in found.values()}))
    with _axes(file, f"Layer scores (higher = {means})") as axes:
        for (name, record), colour in zip(found.items(), itertools.cycle(COLOURS)):
            scores = np.array(record.scores)
            axes.plot(range(len(scores)), scores / scores.max(), marker="o", markersize=4, color=colour, label=name)
        axes.set(xlabel="layer (decoder block)", ylabel="score, as a fraction of the largest", ylim=(0, 1.05))


def plot_allocations(records: Sequence[RunRecord], file: Path) -> None:
    """What each layer got, one colour per distinct allocation, called after the first run that has it."""
    distinct: dict[tuple, State] = {}
    for state in states(records) if len(records) > 1 else [State(records[0], "", {}, "", _name(records[0]))]:
        if state.record.allocation and not state.prefix and (state.record.config["method"] or len(records) == 1):
            distinct.setdefault((state.record.allocation["kind"], *state.record.allocation["values"]), state)
    if not distinct:
        return
    width, labels = 0.8 / len(distinct), Counter(state.label for state in distinct.values())
    kinds = " or ".join(dict.fromkeys(kind for kind, *_ in distinct))
    with _axes(file, f"Allocated {kinds} per layer") as axes:
        for number, (((_, *values), state), colour) in enumerate(zip(distinct.items(), itertools.cycle(COLOURS))):
            shifted = np.arange(len(values)) + (number - (len(distinct) - 1) / 2) * width
            name = state.label if labels[state.label] == 1 else f"{state.place} {state.label}"
            axes.bar(shifted, values, width, color=colour, label=f"{name} (budget {state.record.allocation['budget']})")
        axes.set(xlabel="layer (decoder block)", ylabel=kinds)


def print_run(record: RunRecord, folder: Path, console: Console | None = None) -> None:
    """One run's summary on the console, and its plots in its folder."""
    console = console or _console()
    scores, values = record.scores, record.allocation["values"]  # no scores with an allocation from a file
    highest = ", ".join(record.layers[index] for index in np.argsort(scores)[::-1][:3])
    ranking = f"; highest: {highest}" if len(set(scores)) > 1 else ""
    console.print(f"\n{record.source}{ranking}", highlight=False, markup=False)
    console.print(f"{record.allocation['kind']} {values} (budget {record.allocation['budget']})", highlight=False)
    if record.metrics and (record.questions or record.parameters):  # a report of method=diagnose has no accuracy
        show(table([record]), record.config["task"]["name"], console)
    for name, value in record.metrics.items():
        if not name.removeprefix("before/").startswith("accuracy"):  # those stand in the table
            console.print(f"  {name}: {_text(value)}", highlight=False)
    for note in record.notes:
        console.print(f"  note: {note}", highlight=False)
    columns = {"layer": record.layers, **({"score": scores} if scores else {}), record.allocation["kind"]: values}
    pd.DataFrame(columns).to_csv(folder / "layers.csv", index=False)
    plot_scores([record], folder / "scores.png")
    plot_allocations([record], folder / "allocation.png")


def show(frame: pd.DataFrame, title: str, console: Console) -> None:
    shown = Table(title=title, title_justify="left")
    for column in frame.columns:
        is_text = any(isinstance(value, str) for value in frame[column])
        is_short = column not in ("run", "model", "from", "to", "profile", "and")
        shown.add_column(str(column), justify="left" if is_text else "right", no_wrap=is_short, overflow="fold")
    for row in frame.itertuples(index=False):
        shown.add_row(*(escape(_text(value)) for value in row))
    console.print(shown)


def _console() -> Console:
    """As wide as the terminal; a log file has no width, and a table cut to 80 columns cannot be read."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _name(record: RunRecord) -> str:
    kind = record.allocation.get("kind", "")
    if _is_from_file(record):
        name = "allocation from file"
    else:
        made_by = _estimator(record) if record.scores else record.source  # a fixed shape looks at no scores
        name = f"{made_by} {kind}".strip()
    return name if record.config["method"] else f"{name} (not trained)"


def _estimator(record: RunRecord) -> str:
    return _estimator_of(record.config["estimator"])


def _estimator_of(settings: Mapping) -> str:
    name = settings["_target_"].split(".")[-2]
    if "of" in settings:  # reversed
        return f"{name} {_estimator_of(settings['of'])}"
    aggregation = settings.get("aggregation", "all")
    return name if aggregation == "all" else f"{name} {aggregation}"


def _is_from_file(record: RunRecord) -> bool:
    return record.config["allocator"]["_target_"].endswith(".File")


def _titles(records: Sequence[RunRecord], section: str) -> list[str]:
    """What each record's model or task is called; a model that all share needs no name."""
    contents = [_content(record, section) for record in records]
    distinct = _distinct(contents)
    if section == "model" and len(distinct) == 1:
        return [""] * len(records)
    names = [_called(content) for content in distinct]
    labels = _labels(names, [{name: _flat(content)} for name, content in zip(names, distinct, strict=True)])
    return [labels[distinct.index(content)] for content in contents]


def _content(record: RunRecord, section: str) -> dict[str, object]:
    """What makes it the same model or task: not where it is kept, nor how many samples are learned from."""
    incidental = ("cache", "num_train", "num_validation", "seed")
    return {key: value for key, value in record.config[section].items() if key not in incidental}


def _called(content: Mapping) -> str:
    return Path(content.get("name") or content.get("path") or content["_target_"].split(".")[-1].lower()).name


def _distinct(items: Sequence, key: Callable = lambda item: item) -> list:
    return [item for number, item in enumerate(items) if key(item) not in map(key, items[:number])]


def _settings(record: RunRecord, *sections: str) -> dict[Hashable, dict[str, object]]:
    """The configuration by section (all, or those given), without what has a name or a column already.

    Estimators and allocators are kept apart, to be compared with their like: what follows from the choice is no news.
    """
    told = ["model.", "method.model.", "evaluation.before.", "estimator.aggregation."]
    told += [f"task.{key}." for key in _content(record, "task")] + ["estimator.", "probe."] * _is_from_file(record)
    choices = {"estimator": _estimator(record).split()[0], "allocator": record.config["allocator"]["_target_"]}
    found: dict[Hashable, dict[str, object]] = defaultdict(dict)
    for key, value in _flat(record.config).items():
        section = key.split(".")[0]
        follows = key.endswith(".seed") and value == record.seed
        if section in (sections or (section,)) and not follows and not f"{key}.".startswith(tuple(told)):
            found[section, choices.get(section)][key] = value
    return found


def _flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    """Keys as on the command line: `a.b.c`."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _labels(names: Sequence[str], settings: Sequence[Mapping[Hashable, Mapping[str, object]]]) -> list[str]:
    """Each name with those of its settings that differ from another's; a number for what is alike even so."""
    labels = []
    for name, sections in zip(names, settings, strict=True):
        for section, values in sections.items():
            others = [other[section] for other in settings if section in other]
            differing = [key for key, value in values.items() if any(other.get(key) != value for other in others)]
            name = " ".join([name, *(f"{key}={_setting(values[key])}" for key in differing)])
        labels.append(name)
    numbers = {label: itertools.count(1) for label, times in Counter(labels).items() if times > 1}
    return [f"{label} ({next(numbers[label])})" if label in numbers else label for label in labels]


def _setting(value: object) -> str:
    """As on the command line; of a long one the end, where paths differ."""
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else str(value)


def _markdown(frame: pd.DataFrame) -> str:
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    rows += [list(map(_text, row)) for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@contextmanager
def _axes(file: Path, title: str):
    """A plot, saved on leaving it.

    Margins are given in inches: measuring every text to fit them, as a layout engine does, takes as long as drawing.
    """
    figure, axes = plt.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_title(title, loc="left", fontsize=11)
    yield axes
    legend = 0.1 + 0.2 * len(axes.get_legend_handles_labels()[1])
    height = 3.5 + legend
    figure.set_size_inches(8, height)
    figure.subplots_adjust(left=0.09, right=0.985, top=1 - 0.32 / height, bottom=(0.5 + legend) / height)
    figure.legend(loc="lower left", frameon=False, fontsize=9, borderaxespad=0.2)  # may be long: not over the data
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
