"""Layer profiles of all estimators side by side, their rank correlations, and what they cost.

python experiments/layer_profiles/plot.py outputs/sweeps/layer_profiles experiments/layer_profiles
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from layerif.record import FILE, RunRecord

Profiles = dict[str, dict[str, RunRecord]]  # task -> estimator -> its run


def draw(sweep: Path, folder: Path) -> None:
    """Leave profiles.png, spearman.png, costs.csv and spearman.csv in `folder`."""
    profiles = read(sweep)
    heat_maps(profiles, folder / "profiles.png")
    correlations = spearman(profiles)
    correlations.round(2).to_csv(folder / "spearman.csv")
    matrix(correlations, folder / "spearman.png")
    costs(profiles).round(2).to_csv(folder / "costs.csv")
    print(costs(profiles).round(2).to_string())
    print(correlations.round(2).to_string())


def read(sweep: Path) -> Profiles:
    found: Profiles = {}
    for file in sorted(sweep.glob(f"*/{FILE}")):
        record = RunRecord.read(file.parent)
        if not record.config["method"]:
            estimator = record.config["estimator"]["_target_"].split(".")[-2]
            found.setdefault(record.config["task"]["name"], {})[estimator] = record
    if not found:
        raise SystemExit(f"{sweep} holds no scores; run experiments/layer_profiles/run.py first")
    return found


def order(profiles: Profiles) -> list[str]:
    """Estimators by direction, then by likeness: the leading direction of their rank correlations."""
    names = sorted({name for runs in profiles.values() for name in runs})
    correlations = spearman(profiles, names).fillna(0).to_numpy()
    leading = np.linalg.eigh(correlations)[1][:, -1]
    return [names[index] for index in np.argsort(leading)]


def heat_maps(profiles: Profiles, file: Path) -> None:
    """One panel a task: layers across, estimators down, each row its scores' ranks from 0 (lowest) to 1 (highest)."""
    names = order(profiles)
    size = (max(9.0, 4 * len(profiles) + 2), 0.32 * len(names) + 1.6)
    figure, axes = plt.subplots(1, len(profiles), figsize=size, sharey=True, squeeze=False, layout="constrained")
    images = []
    for axis, (task, runs) in zip(axes[0], profiles.items(), strict=True):
        depth = max(len(run.layers) for run in runs.values())
        ranks = [ranked(runs[name].scores) if name in runs else np.full(depth, np.nan) for name in names]
        images.append(axis.imshow(ranks, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest"))
        axis.set_title(task)
        axis.set_xlabel("block")
        axis.set_xticks(range(0, depth, 5))
    directions = {name: run.higher_means for runs in profiles.values() for name, run in runs.items()}
    axes[0, 0].set_yticks(range(len(names)), [f"{name} ({directions[name][0]})" for name in names])
    figure.colorbar(images[0], ax=axes, label="rank of the score")
    figure.suptitle("Rank of each block under each estimator; (u) high is undertrained, (i) high is important")
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def ranked(scores: list[float]) -> np.ndarray:
    return (pd.Series(scores).rank().to_numpy() - 1) / (len(scores) - 1)


def spearman(profiles: Profiles, names: list[str] | None = None) -> pd.DataFrame:
    """Rank correlation of every two estimators over the blocks, mean over tasks."""
    names = names or order(profiles)
    tables = []
    for runs in profiles.values():
        columns = {name: runs[name].scores for name in names if name in runs}
        tables.append(pd.DataFrame(columns).corr("spearman").reindex(index=names, columns=names))
    return pd.DataFrame(
        np.nanmean(np.stack([table.to_numpy() for table in tables]), axis=0), index=names, columns=names
    )


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


def costs(profiles: Profiles) -> pd.DataFrame:
    """Seconds for the evidence (where it was in the store: those of the run that took it) and for the scores.

    Runs that share evidence share its fingerprint; the one that was not reused paid for all.
    """
    paid: dict[str, float] = {}
    for runs in profiles.values():
        for run in runs.values():
            paid[run.fingerprint] = max(paid.get(run.fingerprint, 0.0), run.seconds["evidence"])
    rows = {}
    for name in order(profiles):
        runs = [runs[name] for runs in profiles.values() if name in runs]
        rows[name] = {
            "direction": runs[0].higher_means,
            "evidence s": float(np.mean([0.0 if run.fingerprint == "none" else paid[run.fingerprint] for run in runs])),
            "score s": float(np.mean([run.seconds["score"] for run in runs])),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
