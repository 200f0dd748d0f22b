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
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from layerif.layers import depths, short_names
from layerif.record.names import arm_name, estimator_name
from layerif.record.record import AllocationRecord, RunRecord, ScoresRecord

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.hashsalt": "layerif", "svg.fonttype": "none"}  # the same picture gives the same bytes

# Readers with any colour vision can tell these apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH = 8.0  # inches; every plot is as wide
_ROW = 0.22  # inches; the height of a row of a heat map


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
    draw = plot_matrices if given.is_by_matrix else plot_allocations
    found = {"allocation": draw({arm_name(record): given})}
    if scores is not None and len(set(scores.values)) > 1:  # constant scores say nothing
        name = f"{record.config['task']['name']} {estimator_name(record)}"
        found = {"scores": plot_scores({name: scores}), **found}
    return found


def plot_scores(profiles: Mapping[str, ScoresRecord], groups: Sequence[str] | None = None) -> Plot:
    """Draws the scores of every layer, each profile as a fraction of its largest; `groups` as for `profiles_plot`."""
    means = " or ".join(sorted({scores.higher_means for scores in profiles.values()}))
    alt = "; ".join(
        f"{name}: highest at blocks {', '.join(_highest(list(one.by_block().values())))}"
        for name, one in profiles.items()
    )
    of_blocks = {name: np.array(list(scores.by_block().values())) for name, scores in profiles.items()}
    values = {name: one / max(one) for name, one in of_blocks.items()}
    (only,) = profiles.values() if len(profiles) == 1 else (None,)
    # Intervals of several profiles would hide one another, and those of matrices do not add up.
    intervals = only.intervals if only is not None and len(only.values) == len(only.by_block()) else None
    shaded = "" if intervals is None else "; shaded: 95 % interval"
    title = f"Layer scores (higher = {means}{shaded})"
    plot = profiles_plot(values, title, "score, as a fraction of the largest", alt, groups)
    if only is not None and intervals is not None:
        bounds_L2 = np.array(intervals) / max(only.values)
        (axes,) = plot.figure.axes
        axes.fill_between(range(len(bounds_L2)), *bounds_L2.T, color=COLOURS[0], alpha=0.2, linewidth=0)
        axes.set_ylim(0, 1.05 * max(1.0, float(bounds_L2.max())))
    return plot


def plot_allocations(allocations: Mapping[str, AllocationRecord], groups: Sequence[str] | None = None) -> Plot:
    """Draws the values of the blocks, one row or bar for each allocation; `groups` as for `profiles_plot`.

    A block whose matrices have values of their own has their mean.
    """
    kinds = " or ".join(dict.fromkeys(given.kind for given in allocations.values()))
    values = {f"{name} ({spelt_budget(one)})": by_depth(one.by_block()) for name, one in allocations.items()}
    told = "; ".join(
        f"{name}: {np.nanmin(one):g} to {np.nanmax(one):g}, most at blocks {', '.join(_highest(one))}"
        for name, one in zip(allocations, values.values(), strict=True)
    )
    means = " (means where matrices differ)" if any(one.is_by_matrix for one in allocations.values()) else ""
    title = f"Allocated {kinds} per layer{means}"
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


def plot_matrices(allocations: Mapping[str, AllocationRecord]) -> Plot:
    """Draws the values of the matrices, one panel for each allocation: a row for each kind of matrix, a column a block.

    All panels of one kind of allocation have the same colours. Matrices without a value stay grey.
    """
    tables = {name: one.by_matrix() for name, one in allocations.items()}
    rows_of = {name: short_names(list(table)) for name, table in tables.items()}
    given_kinds = " or ".join(dict.fromkeys(one.kind for one in allocations.values()))
    title, top, gap, bottom = f"Allocated {given_kinds} per matrix", 0.25, 0.45, 0.55  # in inches
    height = top + sum(gap + _ROW * len(rows) for rows in rows_of.values()) + bottom
    figure = plt.figure(figsize=(WIDTH, height))
    left = _breadth_of(figure, [row for rows in rows_of.values() for row in rows])
    lower, told, is_grey = height - top, [], False
    for name, one in allocations.items():
        alike = [value for other in allocations.values() if other.kind == one.kind for value in other.values]
        depth, rows, own = depths(list(one.by_block())), rows_of[name], _ROW * len(rows_of[name])
        lower -= gap + own
        axes = figure.add_axes((left / WIDTH, lower / height, (WIDTH - left - 1.05) / WIDTH, own / height))
        axes.set_facecolor("#d0d0d0")
        axes.set_title(shortened(f"{name} ({spelt_budget(one)})", 90), loc="left", fontsize=9)
        values = np.array([by_depth(of, depth) for of in tables[name].values()])
        image = _image(axes, values, rows, "viridis", (min(alike), max(alike)))
        bar = figure.add_axes((1 - 0.95 / WIDTH, lower / height, 0.2 / WIDTH, own / height))
        figure.colorbar(image, cax=bar, label=one.kind)
        spans = (f"{row} {np.nanmin(of):.3g} to {np.nanmax(of):.3g}" for row, of in zip(rows, values, strict=True))
        told.append(f"{name}: {', '.join(spans)}")
        is_grey |= bool(np.isnan(values).any())
    grey = "; grey: no value, because the matrix was left out" if is_grey else ""
    figure.axes[-2].set_xlabel(f"layer (decoder block){grey}")
    figure.suptitle(title, x=0.01, y=1 - 0.1 / height, ha="left", fontsize=11)
    return finished(figure, title, "; ".join(told))


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

    The margins are given in inches, see `finished`.

    Args:
        values: the matrix.
        names: of its rows.
        label: of the bar.
        cmap: the colours.
        limits: the least and the greatest value; None: those of the matrix.
    """
    height = _ROW * len(values) + 1.1
    figure = plt.figure(figsize=(WIDTH, height))
    left = _breadth_of(figure, names)
    bottom, heights = 0.55 / height, (height - 0.95) / height
    axes = figure.add_axes((left / WIDTH, bottom, (WIDTH - left - 1.05) / WIDTH, heights))
    image = _image(axes, values, names, cmap, limits)
    figure.colorbar(image, cax=figure.add_axes((1 - 0.95 / WIDTH, bottom, 0.2 / WIDTH, heights)), label=label)
    return figure, axes


def _breadth_of(figure: Figure, names: Sequence[str]) -> float:
    """Returns the breadth of the margin, in inches, that holds the names of rows."""
    measure = figure.canvas.get_renderer().get_text_width_height_descent  # type: ignore[attr-defined]
    longest = sorted(names, key=len)[-5:]
    return 0.15 + max(measure(name, FontProperties(size=8), False)[0] for name in longest) / figure.dpi


def _image(
    axes: Axes, values: np.ndarray, names: Sequence[str], cmap: str, limits: tuple[float, float] | None
) -> AxesImage:
    """Draws a matrix with a name beside each row.

    There may be hundreds of rows. So the names are texts, since a tick costs as much as ten of them, and the numbers
    are in single precision, since they are scaled up to the page.
    """
    low, high = limits or (None, None)
    image = axes.imshow(values.astype(np.float32), aspect="auto", cmap=cmap, vmin=low, vmax=high, interpolation="none")
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no layer 2.5
    for row, name in enumerate(names):
        axes.text(-0.01, row, name, size=8, ha="right", va="center", transform=axes.get_yaxis_transform())
    return image


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


def by_depth(values: Mapping[str, float], depth: Mapping[str, int] | None = None) -> np.ndarray:
    """Returns the values of blocks at the places of their numbers; blocks without a value have NaN.

    Args:
        values: by block.
        depth: the numbers of the blocks, see `layerif.layers.depths`; None: these blocks are all.
    """
    depth = depths(list(values)) if depth is None else depth
    found = np.full(max(depth.values()) + 1, np.nan)
    for block, value in values.items():
        found[depth[block]] = value
    return found


def spelt_budget(given: AllocationRecord) -> str:
    """Spells the budget that an allocation spends; of a mean, which may have many decimals, four figures."""
    return f"budget {given.budget:.4g}" if isinstance(given.budget, float) else f"budget {given.budget}"


def _highest(values: Sequence[float] | np.ndarray) -> list[str]:
    """The places of the highest values; NaN is none."""
    known = np.nan_to_num(np.array(values, dtype=float), nan=-np.inf)
    return [str(index) for index in np.argsort(known, kind="stable")[::-1][:3]]


def shortened(name: str, length: int) -> str:
    """Returns the name with its middle left out where it is longer than `length` characters.

    Args:
        name: of a run or a profile.
        length: the most characters.
    """
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-length // 2 :]}"
