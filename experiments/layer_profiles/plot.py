"""Draws the layer profiles of all estimators side by side, their rank correlations and their costs.

python experiments/layer_profiles/plot.py outputs/sweeps/layer_profiles experiments/layer_profiles
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from layerif.record.names import has_method
from layerif.record.record import FILE, RunRecord, ScoresRecord
from layerif.stats import spearman, spearman_matrix

Profiles = dict[str, dict[str, RunRecord]]  # task -> estimator -> its run


def draw(sweep: Path, folder: Path) -> None:
    """Leaves profiles.png, spearman.png, spearman.csv, tasks.csv and costs.csv in `folder`, and prints the tables."""
    profiles = read(sweep)
    heat_maps(profiles, folder / "profiles.png")
    correlations = estimators_alike(profiles)
    correlations.round(2).to_csv(folder / "spearman.csv")
    matrix(correlations, folder / "spearman.png")
    print(correlations.round(2).to_string())
    for name, table in {"tasks": across_tasks(profiles), "costs": costs(profiles, trainings(sweep))}.items():
        table.round(2).to_csv(folder / f"{name}.csv")
        print(table.round(2).to_string())


def read(sweep: Path) -> Profiles:
    found: Profiles = {}
    for record in records(sweep):
        if not has_method(record):
            estimator = record.choices["estimator"]
            runs = found.setdefault(record.config["task"]["name"], {})
            if estimator in runs:
                raise SystemExit(f"{sweep} holds {estimator} twice for one task, of different settings; remove one")
            runs[estimator] = record
    if not found:
        raise SystemExit(f"{sweep} holds no scores; run experiments/layer_profiles/run.py first")
    return found


def trainings(sweep: Path) -> dict[str, float]:
    """Returns the seconds that each task's adapter took to train."""
    return {record.config["task"]["name"]: record.seconds["fit"] for record in records(sweep) if has_method(record)}


def records(sweep: Path) -> list[RunRecord]:
    return [RunRecord.read(file.parent) for file in sorted(sweep.glob(f"*/{FILE}"))]


def order(profiles: Profiles) -> list[str]:
    """Orders the estimators by direction and then by likeness, the leading direction of their rank correlations."""
    directions = {name: scores(run).higher_means for runs in profiles.values() for name, run in runs.items()}
    names = sorted(directions)
    leading = np.linalg.eigh(estimators_alike(profiles, names).fillna(0).to_numpy())[1][:, -1]
    leading = leading * np.sign(leading[np.abs(leading).argmax()])  # an eigenvector has no sign of its own
    place = dict(zip(names, leading, strict=True))
    return sorted(names, key=lambda name: (directions[name], -place[name]))


def heat_maps(profiles: Profiles, file: Path) -> None:
    """Draws a panel for each task, with layers across and estimators down.

    A row shows the ranks of the estimator's scores, from 0 (lowest) to 1 (highest).
    """
    names = order(profiles)
    size = (max(9.0, 4 * len(profiles) + 2), 0.32 * len(names) + 1.6)
    figure, axes = plt.subplots(1, len(profiles), figsize=size, sharey=True, squeeze=False, layout="constrained")
    images = []
    for axis, (task, runs) in zip(axes[0], profiles.items(), strict=True):
        depth = max(len(scores(run).layers) for run in runs.values())
        ranks = [ranked(scores(runs[name]).values) if name in runs else np.full(depth, np.nan) for name in names]
        images.append(axis.imshow(ranks, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest"))
        axis.set_title(task)
        axis.set_xlabel("block")
        axis.set_xticks(range(0, depth, 5))
    directions = {name: scores(run).higher_means for runs in profiles.values() for name, run in runs.items()}
    axes[0, 0].set_yticks(range(len(names)), [f"{name} ({directions[name][0]})" for name in names])
    figure.colorbar(images[0], ax=axes, label="rank of the score")
    figure.suptitle("Rank of each block under each estimator; (u) high is undertrained, (i) high is important")
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def scores(run: RunRecord) -> ScoresRecord:
    """Returns the scores of a run that has some."""
    assert run.decision is not None
    assert run.decision.scores is not None
    return run.decision.scores


def ranked(values: list[float]) -> np.ndarray:
    """Returns the ranks of the values, from 0 (lowest) to 1 (highest)."""
    return (pd.Series(values).rank().to_numpy() - 1) / (len(values) - 1)


def estimators_alike(profiles: Profiles, names: list[str] | None = None) -> pd.DataFrame:
    """Correlates the ranks of the blocks by every two estimators, as a mean over tasks."""
    names = names or order(profiles)
    tables = []
    for runs in profiles.values():
        there = [name for name in names if name in runs]
        alike = spearman_matrix(np.array([scores(runs[name]).values for name in there]).T)
        tables.append(pd.DataFrame(alike, index=there, columns=there).reindex(index=names, columns=names))
    return pd.DataFrame(
        np.nanmean(np.stack([table.to_numpy() for table in tables]), axis=0), index=names, columns=names
    )


def across_tasks(profiles: Profiles) -> pd.DataFrame:
    """Makes a table that shows if a profile follows the task.

    Each estimator has its rank correlation between two tasks and, for comparison, between two halves of the samples of
    one task (where the evidence is kept sample by sample), and its highest block on each task.
    """
    rows = {}
    for name in order(profiles):
        runs = {task: estimators[name] for task, estimators in profiles.items() if name in estimators}
        between = [spearman(scores(one).values, scores(other).values) for one, other in combinations(runs.values(), 2)]
        of_halves = [run.decision.reliability for run in runs.values() if run.decision]
        halves = [value for value in of_halves if value is not None]
        rows[name] = {
            "between tasks": mean(between) if between else np.nan,
            "lowest": min(between, default=np.nan),
            "between halves": mean(halves) if halves else np.nan,
            **{f"highest, {task}": int(np.argmax(scores(run).values)) for task, run in runs.items()},
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def matrix(correlations: pd.DataFrame, file: Path) -> None:
    size = 0.48 * len(correlations) + 2.2
    figure, axis = plt.subplots(figsize=(size + 1, size))
    image = axis.imshow(correlations, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_xticks(range(len(correlations)), correlations.columns, rotation=60, ha="right")
    axis.set_yticks(range(len(correlations)), correlations.index)
    for (row, column), value in np.ndenumerate(correlations.to_numpy()):
        colour = "white" if abs(value) > 0.6 else "black"
        axis.text(column, row, f"{value:.1f}".replace("-0.0", "0.0"), ha="center", va="center", size=7, color=colour)
    figure.colorbar(image, ax=axis, label="Spearman, mean over tasks", shrink=0.8)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def costs(profiles: Profiles, trainings: dict[str, float]) -> pd.DataFrame:
    """Makes a table of the seconds that each estimator takes for its evidence and its scores, as means over the tasks.

    The record of the run that took a pass states its seconds. Every estimator that shares the pass is shown all of it,
    and `shared by` counts them. The seconds are unknown (NaN) if the store held the evidence before any run here. The
    training is that of the adapter which the estimator looks at.
    """
    runs = [(task, name, run) for task, estimators in profiles.items() for name, run in estimators.items()]
    paid = {run.fingerprint: run.seconds["evidence"] for *_, run in runs if not reused(run)}
    sharing: dict[str, set[str]] = {}
    for _, name, run in runs:
        sharing.setdefault(run.fingerprint, set()).add(name)
    rows = {}
    for name in order(profiles):
        own = [(task, run) for task, estimator, run in runs if estimator == name]
        measures = any(run.fingerprint != "none" for _, run in own)
        rows[name] = {
            "direction": scores(own[0][1]).higher_means,
            "training s": mean(trainings.get(task) if adapter(run) else 0.0 for task, run in own),
            "evidence s": mean(paid.get(run.fingerprint) if measures else 0.0 for _, run in own),
            "shared by": max(len(sharing[run.fingerprint]) for _, run in own) if measures else 0,
            "score s": mean(run.seconds["score"] for _, run in own),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def reused(run: RunRecord) -> bool:
    return any(note.startswith("scores from the store") for note in run.notes)


def adapter(run: RunRecord) -> str | None:
    return run.config.get("model", {}).get("adapter")


def mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else np.nan


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
