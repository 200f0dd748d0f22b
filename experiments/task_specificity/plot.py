"""Compares a task's own scores with other tasks' scores and with uniform, by the accuracy under their experts.

    python experiments/task_specificity/plot.py outputs/sweeps/task_specificity_small experiments/task_specificity

It leaves results.md and matrix.png in the second folder. Intervals (95 %) are Student's t over seeds. The interval of a
cell is over its accuracies, that of a difference over its values at the seeds, and that of a mean of tasks over this
mean at each seed. Tasks and questions are the same at all seeds, so that no interval covers others.

Letters in shape suffixes: T tasks, C columns (each task's scores, then uniform), S seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from layerif.record.frames import QUESTIONS
from layerif.record.record import FILE, RunRecord
from layerif.record.text import markdown
from layerif.stats import t_interval

matplotlib.use("Agg")

UNIFORM, ALL = "uniform", "mean of tasks"
METRICS = {"generation_accuracy": "of generated answers", "accuracy": "by the likelihood of the options"}
COMMAND = "layerif -m experiment=task_specificity"


class Grid(NamedTuple):
    """The cells of the seeds that have all of them; `missing` names the cells that other seeds lack."""

    tasks: list[str]
    seeds: list[int]
    metric: str
    accuracy_TCS: np.ndarray
    num_questions: list[int]
    missing: list[str]
    model: str
    is_small: bool

    @property
    def one_answer(self) -> float:
        """The accuracy that one more right answer adds on the task with the fewest questions."""
        return 1 / min(self.num_questions)


def draw(sweep: Path, folder: Path) -> None:
    """Leaves results.md and matrix.png in `folder`, and prints the tables."""
    grid = read(sweep)
    text = [
        said(grid),
        "The table shows the mean accuracy and its 95 % interval over seeds. A row is the task that was trained, and a "
        "column is the task whose scores placed the experts. Accuracies under a task's own scores are bold:",
        markdown(matrix(grid)),
        "The next table shows the differences at each seed, and their mean with its 95 % interval. An interval that "
        "holds 0 shows no difference. One that does not hold 0 shows a difference on these very questions, where a "
        f"single answer is worth up to {grid.one_answer:.3f}. The tests of `layerif-report`, which are paired by "
        "question, say if it extends to other questions.",
        markdown(contrasts(grid)),
    ]
    (folder / "results.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))
    plot_matrix(grid, folder / "matrix.png")


def read(sweep: Path) -> Grid:
    """Reads the cells of all complete seeds.

    Raises:
        SystemExit: no seed has every cell, or a cell was run twice. The message names the cells.
    """
    cells: dict[tuple[str, str, int], RunRecord] = {}
    for file in sorted(sweep.glob(f"*/{FILE}")):
        record = RunRecord.read(file.parent)
        key = record.config["task"]["name"], scores_of(record), record.seed
        if key in cells:
            raise SystemExit(f"{named(*key)} was run twice, with other settings; remove one's folder below {sweep}")
        cells[key] = record
    tasks = sorted({name for task, scores, _ in cells for name in (task, scores)} - {UNIFORM})
    if len(tasks) < 2:
        raise SystemExit(f"{sweep} holds {len(tasks)} tasks, where two are needed; run {COMMAND} (small=true) first")
    columns, seeds = [*tasks, UNIFORM], sorted({seed for *_, seed in cells})
    wanted = [(task, scores, seed) for seed in seeds for task in tasks for scores in columns]
    lacking = [key for key in wanted if key not in cells]
    missing = [named(*key) for key in lacking]
    complete = [seed for seed in seeds if seed not in {seed for *_, seed in lacking}]
    if not complete:
        size = f"{len(tasks)} × {len(columns)}"
        raise SystemExit(f"no seed has all {size} cells; the sweep's command carries on; missing: {listed(missing)}")
    used = {key: cells[key] for key in wanted if key[2] in complete}
    metric = next((name for name in METRICS if all(name in record.metrics for record in used.values())), None)
    if metric is None:
        raise SystemExit(f"not every run below {sweep} has {' or '.join(METRICS)}; add it to evaluation.metrics")
    accuracy = [[[used[t, c, s].metrics[metric] for s in complete] for c in columns] for t in tasks]
    first = next(iter(used.values()))
    return Grid(
        tasks=tasks,
        seeds=complete,
        metric=metric,
        accuracy_TCS=np.array(accuracy),
        num_questions=[len(used[task, UNIFORM, complete[0]].answers[QUESTIONS[metric]]) for task in tasks],
        missing=missing,
        model=first.config["model"].get("name") or first.config["model"].get("path") or "SmolLM2-135M-Instruct",
        is_small=sweep.name.endswith("_small") or "small=true" in map(str.lower, first.overrides),
    )


def scores_of(record: RunRecord) -> str:
    """Returns the task whose scores placed the experts, or uniform."""
    if record.choices["estimator"] == "uniform":
        return UNIFORM
    return (record.config.get("score_task") or record.config["task"])["name"]


def matrix(grid: Grid) -> pd.DataFrame:
    rows = []
    for number, task in enumerate(grid.tasks):
        cells = [cell(values_S, ".3f") for values_S in grid.accuracy_TCS[number]]
        cells[number] = f"**{cells[number]}**"
        names = [*(f"scores of {other}" for other in grid.tasks), UNIFORM]
        rows.append(
            {"trained for": task, "questions": grid.num_questions[number]} | dict(zip(names, cells, strict=True))
        )
    return pd.DataFrame(rows)


def contrasts(grid: Grid) -> pd.DataFrame:
    rows = []
    for name, difference_TS in differences(grid.accuracy_TCS).items():
        values = dict(zip(grid.tasks, difference_TS, strict=True)) | {ALL: difference_TS.mean(axis=0)}
        for task, difference_S in values.items():
            by_seed = {f"seed {seed}": f"{one:+.3f}" for seed, one in zip(grid.seeds, difference_S, strict=True)}
            row = {"difference": name, "trained for": task} | by_seed
            rows.append(row | {"mean and 95 % interval": cell(difference_S, "+.3f")})
    return pd.DataFrame(rows)


def differences(accuracy_TCS: np.ndarray) -> dict[str, np.ndarray]:
    """Returns own accuracies minus the mean under other tasks' scores, and minus uniform's, each T × S."""
    num_tasks = len(accuracy_TCS)
    scored_TTS, uniform_TS = accuracy_TCS[:, :num_tasks], accuracy_TCS[:, num_tasks]
    own_TS = np.array([scored_TTS[task, task] for task in range(num_tasks)])
    others_TS = (scored_TTS.sum(axis=1) - own_TS) / (num_tasks - 1)
    return {"own − mean of the others'": own_TS - others_TS, "own − uniform": own_TS - uniform_TS}


def plot_matrix(grid: Grid, file: Path) -> None:
    """Draws the mean accuracies minus uniform's, with a frame around the tasks' own cells."""
    mean_TC = grid.accuracy_TCS.mean(axis=2)
    gain_TT, num_tasks = mean_TC[:, :-1] - mean_TC[:, -1:], len(grid.tasks)
    most = max(np.abs(gain_TT).max(), 0.01)
    figure, axis = plt.subplots(figsize=(1.3 * num_tasks + 3.4, 0.8 * num_tasks + 2.2), layout="constrained")
    image = axis.imshow(gain_TT, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for (row, column), gain in np.ndenumerate(gain_TT):
        colour = "white" if abs(gain) > 0.6 * most else "black"
        axis.text(column, row, f"{gain:+.3f}", ha="center", va="center", color=colour)
    for own in range(num_tasks):
        axis.add_patch(Rectangle((own - 0.48, own - 0.47), 0.96, 0.94, fill=False, edgecolor="black", linewidth=2.5))
    labels = [f"{task}\n(uniform {mean:.3f})" for task, mean in zip(grid.tasks, mean_TC[:, -1], strict=True)]
    axis.set_yticks(range(num_tasks), labels)
    axis.set_xticks(range(num_tasks), grid.tasks)
    axis.set(xlabel="whose scores placed the experts (framed: its own)", ylabel="trained for")
    figure.colorbar(image, ax=axis, label="accuracy less uniform's")
    figure.suptitle(f"{grid.model}, {counted(len(grid.seeds), 'seed')}{', SMALL: no reproduction' * grid.is_small}")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def said(grid: Grid) -> str:
    """Writes the remark above the tables, which names model, metric and seeds."""
    text = f"{grid.model}; accuracy {METRICS[grid.metric]}; {counted(len(grid.seeds), 'seed')}: "
    text += f"{', '.join(map(str, grid.seeds))}."
    text += " This is the small variant, which takes the same path and is not a reproduction." * grid.is_small
    text += f" Other seeds are left out, because they lack {listed(grid.missing)}." if grid.missing else ""
    return text + " `plot.py` explains the intervals."


def cell(values_S: np.ndarray, digits: str) -> str:
    """Spells the mean and its interval.

    If all seeds are alike the interval is left out, because another seed may still differ.
    """
    mean, (low, high) = f"{values_S.mean():{digits}}", t_interval(values_S)
    if np.ptp(values_S) < 1e-9:
        return mean + " (at every seed)" * (len(values_S) > 1)
    return f"{mean} ({low:{digits}} to {high:{digits}})"


def named(task: str, scores: str, seed: int) -> str:
    return f"{task} by {scores if scores == UNIFORM else f'scores of {scores}'}, seed {seed}"


def listed(names: list[str], most: int = 6) -> str:
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
