"""The report's plots: results with their intervals, layer profiles, allocations, how evenly a router spreads."""

from __future__ import annotations

import base64
import io
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy import stats

from layerif.record.record import RunRecord
from layerif.report.arms import Run, is_logarithmic, runs_of
from layerif.report.tables import Results, profiles

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "layerif", "svg.fonttype": "none"}  # the same picture gives the same bytes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by everybody
WIDTH = 8.0  # inches, of every plot


@dataclass(frozen=True)
class Plot:
    """A drawn figure with its title and what it shows in words, for who cannot see it."""

    figure: Figure
    title: str
    alt: str

    def save(self, file: Path) -> None:
        self.figure.savefig(file, dpi=120)

    def data_uri(self) -> str:
        """As SVG. Its text is text: outlines would weigh ten times as much, and few fonts are wider than ours."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def plots_of_run(record: RunRecord) -> dict[str, Plot]:
    """Scores and allocation, by name; those the record does not hold are left out."""
    found = {"scores": plot_scores([record]), "allocation": plot_allocations(runs_of([record]))}
    return {name: plot for name, plot in found.items() if plot is not None}


def plot_results(results: Results) -> Plot | None:
    """Every arm's mean and 95 % interval, one panel below another for each task."""
    columns = [c for c in results.columns if any(results.cells[arm, c].mean is not None for arm in results.arms)]
    if not columns:
        return None
    shown = {c: [arm for arm in results.arms if results.cells[arm, c].mean is not None] for c in columns}
    heights = [len(arms) for arms in shown.values()]
    height = sum(0.24 * number + 0.75 for number in heights) + 0.2
    figure, panels = plt.subplots(
        len(columns),
        1,
        squeeze=False,
        figsize=(WIDTH, height),
        height_ratios=[n + 0.6 for n in heights],
        layout="constrained",
    )
    told = []
    for axes, (column, arms) in zip(panels[:, 0], shown.items(), strict=True):
        for place, arm in enumerate(reversed(arms)):
            cell = results.cells[arm, column]
            assert cell.mean is not None
            if not np.isnan(cell.low):
                axes.plot([cell.low, cell.high], [place, place], color=COLOURS[0], linewidth=2)
            axes.plot(cell.mean, place, "o", color=COLOURS[0], markersize=6)
            if cell.paper is not None:
                axes.plot(cell.paper, place, "D", color=COLOURS[1], markersize=5, markerfacecolor="none")
        axes.set_yticks(range(len(arms)), [_shortened(arm, 60) for arm in reversed(arms)], fontsize=9)
        axes.set_ylim(-0.6, len(arms) - 0.4)
        axes.set_title(column, loc="left", fontsize=11)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if is_logarithmic(results.metric):
            axes.set_xscale("log")
            low, high = axes.get_xlim()  # plain numbers, as close as they can be told apart
            axes.xaxis.set_major_locator(MaxNLocator(6) if high < 10 * low else LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.xaxis.set_minor_locator(NullLocator())
        best = max(arms, key=lambda arm: results.cells[arm, column].mean or 0)
        told.append(f"{column}: {len(arms)} arms, highest {best} at {results.cells[best, column].mean:.3f}")
    has_paper = any(cell.paper is not None for cell in results.cells.values())
    panels[-1, 0].set_xlabel(f"{results.metric}: mean and 95 % interval" + "; diamonds: the paper" * has_paper)
    return _finished(figure, f"{results.metric} of every arm", ". ".join(told))


def plot_scores(records: Sequence[RunRecord]) -> Plot | None:
    """Scores per layer, each profile as a fraction of its largest."""
    found = profiles(records)
    if not found:
        return None
    means = " or ".join(sorted({record.higher_means for record in found.values()}))
    title = f"Layer scores (higher = {means})"
    alt = "; ".join(f"{name}: highest at blocks {', '.join(_highest(r.scores))}" for name, r in found.items())
    values = {name: np.array(record.scores) / max(record.scores) for name, record in found.items()}
    label = "score, as a fraction of the largest"
    return _lines(values, title, label, alt) if len(values) <= len(COLOURS) else _heat_map(values, title, label, alt)


def plot_correlations(records: Sequence[RunRecord]) -> Plot | None:
    """Spearman's rank correlation of every two layer profiles of equal depth, as a matrix."""
    found = profiles(records)
    if len(found) < 3 or len({len(record.scores) for record in found.values()}) != 1:
        return None
    matrix = np.asarray(stats.spearmanr([record.scores for record in found.values()], axis=1)[0])
    size = len(found)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.24 * size + 1.2), layout="constrained")
    image = axes.imshow(matrix, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_yticks(range(size), [f"{_shortened(name, 52)}  {row}" for row, name in enumerate(found)], fontsize=8)
    axes.set_xticks(range(size), [str(row) for row in range(size)], fontsize=8 if size < 30 else 5)
    if size <= 20:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.6 else "black"
            shown = f"{value:.1f}".replace("-0.0", "0.0")
            axes.text(column, row, shown, ha="center", va="center", size=7, color=colour)
    figure.colorbar(image, ax=axes, label="Spearman", pad=0.01)
    pairs = matrix[np.triu_indices(size, 1)]
    alt = f"{size} profiles: correlations from {pairs.min():.2f} to {pairs.max():.2f}, median {np.median(pairs):.2f}"
    return _finished(figure, "Rank correlation of layer profiles", alt)


def plot_allocations(runs: Sequence[Run]) -> Plot | None:
    """What each layer got, one row or colour per distinct allocation, called after the first run that has it."""
    distinct: dict[tuple, Run] = {}
    for run in runs:
        if isinstance(run.job, RunRecord) and run.job.allocation and not run.prefix:
            distinct.setdefault((run.job.allocation["kind"], *run.job.allocation["values"]), run)
    if not distinct:
        return None
    arms = Counter(run.arm for run in distinct.values())
    kinds = " or ".join(dict.fromkeys(kind for kind, *_ in distinct))
    values, alt = {}, []
    for (_, *given), run in distinct.items():
        place = f"{run.model} {run.task} seed {run.seed}".strip()
        name = run.arm if arms[run.arm] == 1 else f"{place} {run.arm}"
        assert isinstance(run.job, RunRecord)
        values[f"{name} (budget {run.job.allocation['budget']})"] = np.array(given, dtype=float)
        alt.append(f"{name}: {min(given):g} to {max(given):g}, most at blocks {', '.join(_highest(given))}")
    title, told = f"Allocated {kinds} per layer", "; ".join(alt)
    if len(values) > 4:  # bars would be hairs
        return _heat_map(values, title, kinds, told)
    figure, axes = _axes(title, "layer (decoder block)", kinds)
    width = 0.8 / len(values)
    for number, ((name, given), colour) in enumerate(zip(values.items(), itertools.cycle(COLOURS))):
        shifted = np.arange(len(given)) + (number - (len(values) - 1) / 2) * width
        axes.bar(shifted, given, width, color=colour, label=name)
    return _finished(figure, title, told, legend_of=axes)


def plot_routing(runs: Sequence[Run]) -> Plot | None:
    """How undecided the routers of each block are: their entropy over ln(experts); 0 where they are certain."""
    values = {}
    for run in runs:
        if isinstance(run.job, RunRecord) and run.job.routing and not run.prefix:
            shares = [_evenness(run.job.routing.get(layer)) for layer in run.job.layers]
            values[f"{run.model} {run.task} {run.arm} seed {run.seed}".strip()] = np.array(shares)
    if not any(np.isfinite(shares).any() for shares in values.values()):
        return None
    title, label = "Router entropy per layer", "entropy, as a fraction of ln(experts)"
    alt = "; ".join(
        f"{name}: lowest {np.nanmin(shares):.2f}" for name, shares in values.items() if np.isfinite(shares).any()
    )
    return _lines(values, title, label, alt) if len(values) <= len(COLOURS) else _heat_map(values, title, label, alt)


def _evenness(block: Mapping | None) -> float:
    num_experts = len(block["load"]) if block else 0
    return float(block["entropy"] / np.log(num_experts)) if block and num_experts > 1 else np.nan


def _lines(values: Mapping[str, np.ndarray], title: str, label: str, alt: str) -> Plot:
    figure, axes = _axes(title, "layer (decoder block)", label)
    for (name, given), colour in zip(values.items(), itertools.cycle(COLOURS)):
        axes.plot(range(len(given)), given, marker="o", markersize=4, color=colour, label=name)
    axes.set_ylim(0, 1.05)
    return _finished(figure, title, alt, legend_of=axes)


def _heat_map(values: Mapping[str, np.ndarray], title: str, label: str, alt: str) -> Plot:
    """One row per name; rows of other depths end early."""
    depth = max(map(len, values.values()))
    rows = [np.pad(given, (0, depth - len(given)), constant_values=np.nan) for given in values.values()]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.22 * len(rows) + 1.3), layout="constrained")
    image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(rows)), [_shortened(name, 64) for name in values], fontsize=8)
    axes.set_xlabel("layer (decoder block)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.colorbar(image, ax=axes, label=label, pad=0.01)
    return _finished(figure, title, alt)


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _finished(figure: Figure, title: str, alt: str, *, legend_of: Axes | None = None) -> Plot:
    """With its legend below the data, which may be long.

    Margins are given in inches: measuring every text to fit them, as a layout engine does, takes as long as drawing.
    """
    if legend_of is not None:
        legend = 0.1 + 0.2 * len(legend_of.get_legend_handles_labels()[1])
        height = 3.5 + legend
        figure.set_size_inches(WIDTH, height)
        figure.subplots_adjust(left=0.09, right=0.985, top=1 - 0.32 / height, bottom=(0.5 + legend) / height)
        figure.legend(loc="lower left", frameon=False, fontsize=9, borderaxespad=0.2)
    plt.close(figure)  # of pyplot's own list; it can still be drawn
    return Plot(figure, title, alt)


def _highest(values: Sequence[float]) -> list[str]:
    return [str(index) for index in np.argsort(values, kind="stable")[::-1][:3]]


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-length // 2 :]}"
