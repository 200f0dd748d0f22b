"""Records as a run would write them, for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerif.record.record import Failure, RunRecord

CLASSES = {"datainf": "DataInf"}
LAYERS = ["block.0", "block.1", "block.2", "block.3"]


def config_of(estimator: str, *, task: str = "capital", seed: int = 0, settings: Mapping[str, object] | None = None):
    """settings: `section.key` of the configuration -> value."""
    config: dict[str, Any] = {
        "model": {
            "_target_": "layerif.models.embedded.EmbeddedModel",
            "cache": "outputs/store/models",
            "dtype": "float32",
        },
        "task": {"_target_": "layerif.data.task.Task", "name": task, "path": None, "num_train": None, "seed": seed},
        "estimator": {"_target_": f"layerif.estimators.{estimator}.{CLASSES.get(estimator, estimator.title())}"},
        "allocator": {"_target_": "layerif.allocate.experts.Experts", "budget": None, "beta": 2.5},
        "method": {"_target_": "layerif.adapt.adapters.LoRAMoEModule", "r": 8, "seed": seed},
        "pruner": {"_target_": "layerif.pruning.wanda.Wanda", "n": None},
        "probe": {"_target_": "layerif.probe.settings.Probe", "scope": "attention", "num_train": 100},
        "evaluation": {"_target_": "layerif.evaluate.evaluation.Evaluation", "before": False, "num_questions": None},
        "seed": seed,
        "small": False,
    }
    if estimator != "uniform":
        config["estimator"]["damping"] = 0.1
    for key, value in (settings or {}).items():
        section, _, name = key.partition(".")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    if config["method"]:
        config["method"]["model"] = config["model"]
    return config


def record(
    estimator: str,
    right: Sequence[bool],
    *,
    scores: Sequence[float] = (1.0, 3.0, 2.0, 4.0),
    task: str = "capital",
    seed: int = 0,
    settings: Mapping[str, object] | None = None,
    **options: Any,
) -> RunRecord:
    accuracy = float(np.mean(right))
    fields: dict[str, Any] = {
        "name": "test",
        "seed": seed,
        "config": config_of(estimator, task=task, seed=seed, settings=settings),
        "overrides": [f"estimator={estimator}", f"task={task}", f"seed={seed}"],
        "layers": LAYERS,
        "scores": list(scores),
        "higher_means": "undertrained",
        "source": estimator,
        "allocation": {"kind": "experts", "values": [1, 2, 3, 2], "budget": 8, "layers": LAYERS},
        "metrics": {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1},
        "questions": {"options": {f"q{number}": bool(answer) for number, answer in enumerate(right)}},
        "seconds": {"evidence": 2.0, "fit": 3.0},
        "memory_gb": 1.5,
    }
    return RunRecord(**(fields | options))


def failure(estimator: str, *, error: str = "out of memory", seed: int = 0, **options: Any) -> Failure:
    config = config_of(estimator, seed=seed, **options)
    return Failure(name="test", seed=seed, config=config, overrides=[], error=error, traceback="…")


def with_before(one: RunRecord, right: Sequence[bool]) -> RunRecord:
    one.metrics |= {"before/accuracy": float(np.mean(right)), "before/accuracy_low": 0.1, "before/accuracy_high": 0.4}
    one.questions["before/options"] = {f"q{number}": answer for number, answer in enumerate(right)}
    return one


def from_file(path: str, right: Sequence[bool], **options: Any) -> RunRecord:
    settings = {"allocator._target_": "layerif.allocate.file.SavedAllocation", "allocator.path": path}
    return record("datainf", right, scores=(), settings=settings, source=f"file({path})", higher_means="", **options)


def written(folder: Path, jobs: Sequence[RunRecord | Failure]) -> Path:
    """Each job in a folder of its own."""
    for number, job in enumerate(jobs):
        (folder / str(number)).mkdir(parents=True)
        job.write(folder / str(number))
    return folder
