"""Plots of a sweep: results with their intervals, layer profiles, allocations, and the entropy of routers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from layerif.checks import how_many
from layerif.record import plots
from layerif.record.frames import is_better, is_logarithmic
from layerif.record.plots import COLOURS, WIDTH, Plot, by_depth, finished, image_of_rows, profiles_plot, shortened
from layerif.record.record import AllocationRecord, RunRecord
from layerif.report import clusters
from layerif.report.arms import Run
from layerif.report.tables import Results, comparable_by, profiles
from layerif.stats import spearman_matrix

_MOST_PANELS = 6


def plot_results(results: Results) -> Plot | None:
    """Draws the mean and 95 % interval of every arm, one panel below another for each task."""
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
        axes.set_yticks(range(len(arms)), [shortened(arm, 60) for arm in reversed(arms)], fontsize=9)
        axes.set_ylim(-0.6, len(arms) - 0.4)
        axes.set_title(column, loc="left", fontsize=11)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if is_logarithmic(results.metric):
            axes.set_xscale("log")
            low, high = axes.get_xlim()  # plain numbers, as close together as a reader can tell apart
            axes.xaxis.set_major_locator(MaxNLocator(6) if high < 10 * low else LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.xaxis.set_minor_locator(NullLocator())
        pick = max if is_better(results.metric, 1.0) else min
        best = pick(arms, key=lambda arm: results.cells[arm, column].mean or 0.0)
        told.append(f"{column}: {len(arms)} arms, best {best} at {results.cells[best, column].mean:.3f}")
    has_paper = any(cell.paper is not None for cell in results.cells.values())
    diamonds = "; diamonds: the paper" if has_paper else ""
    panels[-1, 0].set_xlabel(f"{results.metric}: mean and 95 % interval{diamonds}")
    return finished(figure, f"{results.metric} of every arm", ". ".join(told))


def plot_score_profiles(records: Sequence[RunRecord]) -> Plot | None:
    """Draws the distinct layer profiles of all runs; None where no scores differ between layers."""
    found = profiles(records)
    if not found:
        return None
    groups = [profile.group for profile in found.values()]
    return plots.plot_scores({name: profile.scores for name, profile in found.items()}, groups)


def plot_correlations(records: Sequence[RunRecord]) -> Plot | None:
    """Draws Spearman's rank correlation of every two layer profiles; None where there are few, or of other depths."""
    found = profiles(records)
    if len(found) < 3 or len({len(profile.scores.values) for profile in found.values()}) != 1:
        return None
    matrix = spearman_matrix(np.array([profile.scores.values for profile in found.values()]).T)
    size = len(found)
    names = [f"{shortened(name, 52)}  {row}" for row, name in enumerate(found)]
    figure, axes = image_of_rows(matrix, names, "Spearman", cmap="RdBu_r", limits=(-1, 1))
    axes.set_xticks(range(0, size, 1 + size // 40))
    axes.tick_params(labelsize=8 if size < 30 else 6)
    if size <= 20:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.6 else "black"
            shown = f"{value:.1f}".replace("-0.0", "0.0")
            axes.text(column, row, shown, ha="center", va="center", size=7, color=colour)
    pairs = matrix[np.triu_indices(size, 1)]
    alt = f"{size} profiles: correlations from {pairs.min():.2f} to {pairs.max():.2f}, median {np.median(pairs):.2f}"
    return finished(figure, "Rank correlation of layer profiles", alt)


def plot_clusters(records: Sequence[RunRecord]) -> Plot | str:
    """Draws the dendrogram of the layer profiles, or says in plain words why there is none."""
    from scipy.cluster.hierarchy import dendrogram

    found = profiles(records)
    if len(found) < clusters.FEWEST_PROFILES:
        verb, number = "is" if len(found) == 1 else "are", how_many(len(found), "profile")
        return f"there {verb} {number}, and a tree needs at least {clusters.FEWEST_PROFILES}"
    first, *others = map(comparable_by, found.values())
    if any(kind != first for kind in others):
        return "the profiles are of several models, whose layers are not the same ones"
    tree = clusters.tree({name: one.scores.values for name, one in found.items()})
    size = len(tree.names)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.24 * size + 1.0), layout="constrained")
    with plt.rc_context({"lines.linewidth": 1.5}):
        dendrogram(
            tree.joins,
            orientation="right",
            ax=axes,
            labels=[shortened(name, 52) for name in tree.names],
            color_threshold=0,
            above_threshold_color=COLOURS[0],
        )
    axes.tick_params(axis="y", labelsize=8 if size < 30 else 6)
    axes.set_xlim(max(1.0, 1.05 * float(tree.joins[:, 2].max())), 0)
    axes.set_xlabel("1 − Spearman")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    one, other, alike = tree.closest()
    alt = f"{size} profiles; the most alike are {one} and {other}, at Spearman {alike:.2f}"
    return finished(figure, "Clusters of layer profiles", alt)


def plot_allocation_profiles(runs: Sequence[Run]) -> Plot | None:
    """Draws each distinct allocation, called after the first run that has it."""
    distinct = _distinct_allocations(runs)
    if not distinct:
        return None
    arms = Counter(run.arm for run, _ in distinct)
    return plots.plot_allocations(
        {run.arm if arms[run.arm] == 1 else _in_full(run): given for run, given in distinct},
        [_arm_in_full(run) for run, _ in distinct],
    )


def plot_matrix_allocations(runs: Sequence[Run]) -> tuple[Plot | None, int]:
    """Draws the first allocation of each arm that gives matrices values of their own, six at most.

    Returns:
        The plot, None where there is nothing to draw; and the number of arms that are left out.
    """
    first: dict[str, tuple[Run, AllocationRecord]] = {}
    for run, given in _distinct_allocations(runs):
        if given.is_by_matrix:
            first.setdefault(_arm_in_full(run), (run, given))
    arms = Counter(run.arm for run, _ in first.values())
    found = {run.arm if arms[run.arm] == 1 else name: given for name, (run, given) in first.items()}
    shown = dict(itertools.islice(found.items(), _MOST_PANELS))
    return (plots.plot_matrices(shown) if shown else None), len(found) - len(shown)


def _distinct_allocations(runs: Sequence[Run]) -> list[tuple[Run, AllocationRecord]]:
    """Returns the allocations that differ, each with the first run that has it."""
    found: dict[tuple, tuple[Run, AllocationRecord]] = {}
    for run in runs:
        if isinstance(run.job, RunRecord) and run.job.decision and not run.prefix:
            given = run.job.decision.allocation
            found.setdefault((given.kind, *given.units, *given.values), (run, given))
    return list(found.values())


def plot_routing(runs: Sequence[Run]) -> Plot | None:
    """Draws the entropy of each block's routers over ln(experts): 0 where they are certain, 1 where undecided."""
    values, groups = {}, []
    for run in runs:
        if isinstance(run.job, RunRecord) and run.job.routing and not run.prefix:
            groups.append(_arm_in_full(run))
            decision = run.job.decision
            blocks = [*(decision.allocation.by_block() if decision else ()), *run.job.routing]
            values[_in_full(run)] = by_depth({block: _evenness(run.job.routing.get(block)) for block in blocks})
    if not any(np.isfinite(shares).any() for shares in values.values()):
        return None
    alt = "; ".join(
        f"{name}: lowest {np.nanmin(shares):.2f}" for name, shares in values.items() if np.isfinite(shares).any()
    )
    return profiles_plot(values, "Router entropy per layer", "entropy, as a fraction of ln(experts)", alt, groups)


def _in_full(run: Run) -> str:
    return f"{_arm_in_full(run)} seed {run.seed}"


def _arm_in_full(run: Run) -> str:
    return f"{run.column} {run.arm}"


def _evenness(block: Mapping | None) -> float:
    num_experts = len(block["load"]) if block else 0
    return float(block["entropy"] / np.log(num_experts)) if block and num_experts > 1 else np.nan
