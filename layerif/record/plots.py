"""Plots of one run, its scores and its allocation, and the drawing that the plots of a sweep share with them."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator

from layerif.record.names import arm_name, estimator_name
from layerif.record.record import AllocationRecord, RunRecord, ScoresRecord

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "layerif", "svg.fonttype": "none"}  # the same picture gives the same bytes

# Readers with any colour vision can tell these apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH = 8.0  # inches; every plot is as wide


@dataclass(frozen=True)
class Plot:
    """A drawn figure with its title, and its content in words for readers who cannot see it."""

    figure: Figure
    title: str
    alt: str

    def save(self, file: Path) -> None:
        """Writes the figure to a file, in the format of its name."""
        self.figure.savefig(file, dpi=120 if self.figure.get_figheight() < 20 else 80)  # hundreds of rows take memory

    def data_uri(self) -> str:
        """Returns the figure as SVG for an `img`. Its text stays text: outlines would weigh ten times as much."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def plots_of_run(record: RunRecord) -> dict[str, Plot]:
    """Returns the plots of a record by name, `scores` and `allocation`, as far as it holds them."""
    if record.decision is None:
        return {}
    scores, given = record.decision.scores, record.decision.allocation
    found = {"allocation": plot_allocations({arm_name(record): given})}
    if scores is not None and len(set(scores.values)) > 1:  # constant scores say nothing
        name = f"{record.config['task']['name']} {estimator_name(record)}"
        found = {"scores": plot_scores({name: scores}), **found}
    return found


def plot_scores(profiles: Mapping[str, ScoresRecord], groups: Sequence[str] | None = None) -> Plot:
    """Draws the scores of every layer, each profile as a fraction of its largest; `groups` as for `profiles_plot`."""
    means = " or ".join(sorted({scores.higher_means for scores in profiles.values()}))
    alt = "; ".join(f"{name}: highest at blocks {', '.join(_highest(one.values))}" for name, one in profiles.items())
    values = {name: np.array(scores.values) / max(scores.values) for name, scores in profiles.items()}
    return profiles_plot(values, f"Layer scores (higher = {means})", "score, as a fraction of the largest", alt, groups)


def plot_allocations(allocations: Mapping[str, AllocationRecord], groups: Sequence[str] | None = None) -> Plot:
    """Draws the values that the layers get, one row or bar for each allocation; `groups` as for `profiles_plot`."""
    kinds = " or ".join(dict.fromkeys(given.kind for given in allocations.values()))
    values = {f"{name} (budget {one.budget})": np.array(one.values, dtype=float) for name, one in allocations.items()}
    told = "; ".join(
        f"{name}: {min(one.values):g} to {max(one.values):g}, most at blocks {', '.join(_highest(one.values))}"
        for name, one in allocations.items()
    )
    title = f"Allocated {kinds} per layer"
    if len(values) > 4:  # bars would be as thin as hairs
        return heat_map(values, title, kinds, told)
    figure, axes = _axes(title, "layer (decoder block)", kinds)
    width = 0.8 / len(values)
    for number, (given, (colour, name)) in enumerate(
        zip(values.values(), _colours_and_labels(list(values), groups), strict=True)
    ):
        shifted = np.arange(len(given)) + (number - (len(values) - 1) / 2) * width
        axes.bar(shifted, given, width, color=colour, label=name, edgecolor="white", linewidth=0.3)
    return finished(figure, title, told, legend_of=axes)


def profiles_plot(
    values: Mapping[str, np.ndarray], title: str, label: str, alt: str, groups: Sequence[str] | None = None
) -> Plot:
    """Draws one line for each name, or one row of a heat map where there are more groups than colours.

    Args:
        values: a profile by its name.
        title: of the plot.
        label: of its values.
        alt: its content in words.
        groups: of each profile, the name without the seed. Those of one group have one colour. None: each has its own.
    """
    if len(set(groups or values)) > len(COLOURS):
        place = {group: number for number, group in enumerate(dict.fromkeys(groups or values))}
        together = sorted(zip(groups or values, values, strict=True), key=lambda named: place[named[0]])
        return heat_map({name: values[name] for _, name in together}, title, label, alt)
    return _lines(values, title, label, alt, groups)


def _colours_and_labels(names: Sequence[str], groups: Sequence[str] | None) -> list[tuple[str, str | None]]:
    """The colour of each name, and its label in the legend, which a group has once."""
    groups = groups or names
    colours = dict(zip(dict.fromkeys(groups), itertools.cycle(COLOURS)))
    found, told = [], set()
    for name, group in zip(names, groups, strict=True):
        num = groups.count(group)
        label = name if num == 1 else f"{group} ({num} seeds)"
        found.append((colours[group], None if group in told else label))
        told.add(group)
    return found


def _lines(
    values: Mapping[str, np.ndarray], title: str, label: str, alt: str, groups: Sequence[str] | None = None
) -> Plot:
    figure, axes = _axes(title, "layer (decoder block)", label)
    for given, (colour, name) in zip(values.values(), _colours_and_labels(list(values), groups), strict=True):
        axes.plot(range(len(given)), given, marker="o", markersize=4, color=colour, label=name)
    axes.set_ylim(0, 1.05)
    return finished(figure, title, alt, legend_of=axes)


def heat_map(values: Mapping[str, np.ndarray], title: str, label: str, alt: str) -> Plot:
    """Draws one row for each name; rows of fewer layers end early."""
    depth = max(map(len, values.values()))
    rows = np.array([np.pad(given, (0, depth - len(given)), constant_values=np.nan) for given in values.values()])
    names = [shortened(name, 64) for name in _told_once(list(values))]
    figure, axes = image_of_rows(rows, names, label, cmap="viridis")
    axes.set_xlabel("layer (decoder block)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, x=0.01, y=1 - 0.1 / figure.get_figheight(), ha="left", fontsize=11)
    return finished(figure, title, alt)


def _told_once(names: Sequence[str]) -> Sequence[str]:
    """Returns the names; where there are many, each without the words that it begins with like the one before it."""
    if len(names) <= 40:
        return names
    words = [name.split() for name in names]
    found = [names[0]]
    for before, each in itertools.pairwise(words):
        same = [one == other for one, other in zip(before, each, strict=False)]
        found.append(" ".join(each[[*same, False].index(False) :]))
    return found


def image_of_rows(
    values: np.ndarray, names: Sequence[str], label: str, *, cmap: str, limits: tuple[float, float] | None = None
) -> tuple[Figure, Axes]:
    """Draws a matrix as an image, with a name beside each row and a bar of its colours.

    There may be hundreds of rows. So the names are texts, since a tick costs as much as ten of them; the margins are
    given in inches, see `finished`; and the numbers are in single precision, since they are scaled up to the page.

    Args:
        values: the matrix.
        names: of its rows.
        label: of the bar.
        cmap: the colours.
        limits: the least and the greatest value; None: those of the matrix.
    """
    low, high = limits or (None, None)
    height = 0.22 * len(values) + 1.1
    figure = plt.figure(figsize=(WIDTH, height))
    measure = figure.canvas.get_renderer().get_text_width_height_descent  # type: ignore[attr-defined]
    longest = sorted(names, key=len)[-5:]
    left = 0.15 + max(measure(name, FontProperties(size=8), False)[0] for name in longest) / figure.dpi
    bottom, heights = 0.55 / height, (height - 0.95) / height
    axes = figure.add_axes((left / WIDTH, bottom, (WIDTH - left - 1.05) / WIDTH, heights))
    image = axes.imshow(values.astype(np.float32), aspect="auto", cmap=cmap, vmin=low, vmax=high, interpolation="none")
    axes.set_yticks([])
    for row, name in enumerate(names):
        axes.text(-0.01, row, name, size=8, ha="right", va="center", transform=axes.get_yaxis_transform())
    figure.colorbar(image, cax=figure.add_axes((1 - 0.95 / WIDTH, bottom, 0.2 / WIDTH, heights)), label=label)
    return figure, axes


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no layer 2.5
    return figure, axes


def finished(figure: Figure, title: str, alt: str, *, legend_of: Axes | None = None) -> Plot:
    """Finishes a figure as a plot, with its legend, which may be long, below the data.

    Margins are given in inches: a layout engine measures every text to fit them, which takes as long as drawing.
    """
    if legend_of is not None:
        legend = 0.1 + 0.2 * len(legend_of.get_legend_handles_labels()[1])
        height = 3.5 + legend
        figure.set_size_inches(WIDTH, height)
        figure.subplots_adjust(left=0.09, right=0.985, top=1 - 0.32 / height, bottom=(0.5 + legend) / height)
        figure.legend(loc="lower left", frameon=False, fontsize=9, borderaxespad=0.2)
    plt.close(figure)  # drops it from pyplot's list; it can still be drawn
    return Plot(figure, title, alt)


def _highest(values: Sequence[float]) -> list[str]:
    return [str(index) for index in np.argsort(values, kind="stable")[::-1][:3]]


def shortened(name: str, length: int) -> str:
    """Returns the name with its middle left out where it is longer than `length` characters.

    Args:
        name: of a run or a profile.
        length: the most characters.
    """
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-length // 2 :]}"
