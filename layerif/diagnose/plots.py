"""The pictures of a report, one file for each question; `report` is the content of `diagnose.json`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from layerif.record.plots import COLOURS

STYLES = ("-", "--", "-.", ":", (0, (4, 4)))


def plot(report: Mapping[str, Any], folder: Path) -> None:
    """Draws leave_out.png, ranks.png, agreement.png, mislabel.png and gradients.png into `folder`."""
    colours = dict(zip(report["leave_out"]["lds"], itertools.cycle(COLOURS)))
    with _figure(folder / "leave_out.png", (12, 4), columns=3) as (convex, model, bars):
        _convex(convex, report["instrument"])
        _changes(model, report)
        _lds(bars, report["leave_out"], colours)
    with _figure(folder / "ranks.png", (max(6.0, 0.3 * len(report["layers"])), 4)) as (axes,):
        _ranks(axes, report)
    with _figure(folder / "agreement.png", (7.5, 6.5)) as (axes,):
        _agreement(axes, report["agreement"])
    with _figure(folder / "mislabel.png", (10, 4), columns=2) as (found, by_layer):
        _found(found, report["mislabel"], colours)
        _by_layer(by_layer, report)
    with _figure(folder / "gradients.png", (max(7.0, 0.32 * len(report["layers"])), 3.4)) as (axes,):
        _gradients(axes, report)


def _convex(axes: Axes, found: Mapping[str, Any]) -> None:
    for (name, changes), colour, marker in zip(found["predicted"].items(), COLOURS, "o+", strict=False):
        axes.scatter(
            changes, found["actual"], s=18, color=colour, marker=marker, label=f"{name}: LDS {found['lds'][name]:.3f}"
        )
    _diagonal(axes, [*found["actual"], *itertools.chain(*found["predicted"].values())])
    axes.set(title="Logistic regression, exact", xlabel="predicted change of the mean loss", ylabel="actual change")
    axes.locator_params(axis="x", nbins=5)
    axes.legend(frameon=False, fontsize=8)


def _changes(axes: Axes, report: Mapping[str, Any]) -> None:
    found, own = report["leave_out"], report["estimator"]
    axes.scatter(found["predicted"][own], found["actual"], s=18, color=COLOURS[0])
    title = f"LoRA, {found['num_subsets']} sets of {found['left_out']} of {found['num_train']} rows"
    predicted = f"predicted change of the mean loss\n({own}; only its order counts)"
    axes.set(title=title, xlabel=predicted, ylabel="actual change (nats)")
    axes.locator_params(axis="x", nbins=5)


def _lds(axes: Axes, found: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    names = sorted(found["lds"], key=lambda name: found["lds"][name]["value"] or -1.0)
    for place, name in enumerate(names):
        _bar(axes, place, found["lds"][name], colours[name])
    if found["seed_agreement"] is not None:
        axes.axvline(
            found["seed_agreement"], color="0.3", linestyle="--", linewidth=1, label="two seeds' actual changes"
        )
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set(
        title="LDS, 95 % interval for these seeds",
        xlabel="Spearman, predicted with actual change",
        ylim=(-0.6, len(names) + 0.2),
    )
    axes.set_yticks(range(len(names)), names)


def _ranks(axes: Axes, report: Mapping[str, Any]) -> None:
    ranks = report["stability"]["ranks"]
    for l, rank in enumerate(ranks):
        if rank["value"] is not None:
            axes.plot([l, l], [rank["low"], rank["high"]], color=COLOURS[5], linewidth=4, solid_capstyle="butt")
            axes.plot(l, rank["value"], "o", color=COLOURS[0], markersize=5)
    axes.set(
        title=f"Rank of each layer by {report['estimator']}, and the range of 95 % of bootstrap draws",
        xlabel="layer (decoder block)",
        ylabel="rank (1 = highest score)",
        ylim=(len(ranks) + 0.5, 0.5),
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _agreement(axes: Axes, found: Mapping[str, Any]) -> None:
    names, matrix = found["names"], np.array(found["spearman"], dtype=float)
    image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            axes.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color="w" if abs(value) > 0.6 else "k"
            )
    axes.grid(False)
    axes.set_title("Spearman of layer scores", loc="left", fontsize=11)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _found(axes: Axes, found: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    for (name, each), style in zip(found["estimators"].items(), itertools.cycle(STYLES)):
        looked_at = np.linspace(0, 1, len(each["curve"]))
        label = f"{name}: AUC {each['auc']['value']:.2f}"
        axes.plot(looked_at, each["curve"], linestyle=style, color=colours[name], label=label)  # some curves coincide
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="a random order")
    axes.set(title="Wrong answers found", xlabel="share of rows looked at, most harmful first", ylabel="share found")
    axes.legend(frameon=False, fontsize=8)


def _by_layer(axes: Axes, report: Mapping[str, Any]) -> None:
    aucs = list(report["mislabel"]["auc_by_layer"].values())
    axes.plot(range(len(aucs)), aucs, "o-", markersize=4, color=COLOURS[0])
    axes.axhline(0.5, color="0.6", linewidth=0.8)
    axes.set(
        title=f"The same by single layers ({report['estimator']})",
        xlabel="layer (decoder block)",
        ylabel="AUC",
        ylim=(0, 1),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _gradients(axes: Axes, report: Mapping[str, Any]) -> None:
    """Draws the norms as a map of matrices over layers. A dead matrix stays white, with a cross."""
    layers, norms = report["layers"], report["gradients"]["train_norms"]
    owner = {name: max((layer for layer in layers if name.startswith(f"{layer}.")), key=len) for name in norms}
    kinds = list(dict.fromkeys(name.removeprefix(f"{owner[name]}.").removesuffix(".weight") for name in norms))
    grid = np.full((len(kinds), len(layers)), np.nan)
    for name, value in norms.items():
        kind = name.removeprefix(f"{owner[name]}.").removesuffix(".weight")
        place = kinds.index(kind), layers.index(owner[name])
        grid[place] = np.log10(value) if value else np.nan
        if name in report["gradients"]["dead"]:
            axes.plot(place[1], place[0], "x", color=COLOURS[1])
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.grid(False)
    axes.set_title("log10 of the gradients' norm (root mean square); × dead", loc="left", fontsize=11)
    axes.set_xlabel("layer (decoder block)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes)


def _bar(axes: Axes, place: int, estimate: Mapping[str, float | None], colour: str) -> None:
    if estimate["value"] is not None and estimate["low"] is not None:
        axes.plot([estimate["low"], estimate["high"]], [place, place], color=colour, linewidth=3, alpha=0.5)  # type: ignore[list-item]
        axes.plot(estimate["value"], place, "o", color=colour)


def _diagonal(axes: Axes, values: Sequence[float]) -> None:
    ends = [min(values), max(values)]
    axes.plot(ends, ends, color="0.6", linewidth=0.8)


@contextmanager
def _figure(file: Path, size: tuple[float, float], columns: int = 1) -> Iterator[Sequence[Axes]]:
    """Gives axes side by side, and saves the figure at the end of the `with` block."""
    figure, grid = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    yield grid[0]
    for axes in grid[0]:
        if axes.get_title():
            axes.set_title(axes.get_title(), loc="left", fontsize=11)
            axes.set_title("", loc="center")
    figure.savefig(file, dpi=150)
    plt.close(figure)
