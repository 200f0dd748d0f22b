"""Records as a run would write them, for the tests of their readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerif.record.record import AllocationRecord, DecisionRecord, Failure, Job, RunRecord, ScoresRecord

LAYERS = ["block.0", "block.1", "block.2", "block.3"]
# The matrices of a block of SmolLM2, with their parameters as multiples of the smallest.
MATRICES = {
    "self_attn.q_proj": 3,
    "self_attn.k_proj": 1,
    "self_attn.v_proj": 1,
    "self_attn.o_proj": 3,
    "mlp.gate_proj": 8,
    "mlp.up_proj": 8,
    "mlp.down_proj": 8,
}


def choices_of(estimator: str, *, task: str = "capital", **others: str) -> dict[str, str]:
    """The choices of a run by group: the given ones, and defaults for the rest."""
    groups = {"model": "smollm2", "task": task, "estimator": estimator, "allocator": "experts", "method": "lora_moe"}
    return groups | {"pruner": "wanda"} | others


def config_of(estimator: str, *, task: str = "capital", seed: int = 0, settings: Mapping[str, object] | None = None):
    """A resolved configuration with these settings, given as values by `section.key`."""
    config: dict[str, Any] = {
        "model": {"cache": "outputs/store/models", "dtype": "float32"},
        "task": {"name": task, "path": None, "num_train": None, "seed": seed},
        "estimator": {} if estimator == "uniform" else {"damping": 0.1},
        "allocator": {"budget": None, "beta": 2.5},
        "method": {"r": 8, "seed": seed},
        "pruner": {"n": None},
        "probe": {"scope": "attention", "num_train": 100},
        "evaluation": {"before": False, "num_questions": None},
        "seed": seed,
        "small": False,
    }
    for key, value in (settings or {}).items():
        section, _, name = key.partition(".")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    if config["method"]:
        config["method"]["model"] = config["model"]
    return config


def decision_of(
    values: Sequence[float] = (1, 2, 3, 2),
    *,
    scores: Sequence[float] = (1.0, 3.0, 2.0, 4.0),
    layers: Sequence[str] = LAYERS,
    kind: str = "experts",
    budget: float = 8,
    source: str = "datainf",
    higher_means: str = "undertrained",
    reliability: float | None = None,
) -> DecisionRecord:
    """A decision; one without scores has an empty sequence of them."""
    return DecisionRecord(
        source=source,
        allocation=AllocationRecord(kind=kind, units=list(layers), values=list(values), budget=budget),
        scores=ScoresRecord(layers=list(layers), values=list(scores), higher_means=higher_means) if scores else None,
        reliability=reliability,
    )


def by_matrix(depth: int = 3, *, seed: int = 0, without: Sequence[str] = ()) -> AllocationRecord:
    """An allocation of random sparsities to the matrices of a model; `without`: names of matrices that get none."""
    sizes = {
        f"model.layers.{block}.{kind}": size
        for block in range(depth)
        for kind, size in MATRICES.items()
        if f"{block}.{kind}" not in without
    }
    values = np.random.default_rng(seed).uniform(0.2, 0.9, len(sizes)).tolist()
    budget = float(np.average(values, weights=list(sizes.values())))
    return AllocationRecord(
        kind="sparsity", units=list(sizes), values=values, budget=budget, sizes=list(sizes.values())
    )


def by_curves(given: AllocationRecord, **options: Any) -> RunRecord:
    """A pruned run that spent loss curves; `options` are those of `record`."""
    one = record(
        "loss_curve",
        [True, False],
        choices={"allocator": "knapsack", "method": "prune", **options.pop("choices", {})},
        **options,
    )
    curves = {"kind": "sparsity", "sense": "cost", "unit": "matrix", "predicted": 1.45}
    one.decision = DecisionRecord(source="loss_curve(form=exact)", allocation=given, curves=curves, reliability=0.93)
    return one


def record(
    estimator: str,
    right: Sequence[bool],
    *,
    task: str = "capital",
    seed: int = 0,
    settings: Mapping[str, object] | None = None,
    choices: Mapping[str, str] | None = None,
    decision: Mapping[str, Any] | None = None,
    **options: Any,
) -> RunRecord:
    """A finished run with these answers; `decision` holds arguments of `decision_of`."""
    accuracy = float(np.mean(right))
    arguments: dict[str, Any] = {"source": estimator, **(decision or {})}
    fields: dict[str, Any] = {
        "name": "test",
        "seed": seed,
        "choices": choices_of(estimator, task=task) | dict(choices or {}),
        "config": config_of(estimator, task=task, seed=seed, settings=settings),
        "overrides": [f"estimator={estimator}", f"task={task}", f"seed={seed}"],
        "decision": decision_of(**arguments),
        "metrics": {
            "accuracy": accuracy,
            "accuracy_low": max(0.0, accuracy - 0.1),
            "accuracy_high": min(1.0, accuracy + 0.1),
        },
        "answers": {"options": {f"q{number}": bool(answer) for number, answer in enumerate(right)}},
        "seconds": {"evidence": 2.0, "fit": 3.0},
        "memory_gb": 1.5,
    }
    return RunRecord(**(fields | options))


def failure(
    estimator: str,
    *,
    error: str = "out of memory",
    seed: int = 0,
    choices: Mapping[str, str] | None = None,
    **options: Any,
) -> Failure:
    """A job that failed."""
    config, made_of = config_of(estimator, seed=seed, **options), choices_of(estimator) | dict(choices or {})
    return Failure(name="test", seed=seed, config=config, choices=made_of, overrides=[], error=error, traceback="…")


def with_before(one: RunRecord, right: Sequence[bool]) -> RunRecord:
    """The run with an evaluation of its untouched model."""
    one.metrics |= {"before/accuracy": float(np.mean(right)), "before/accuracy_low": 0.1, "before/accuracy_high": 0.4}
    one.answers["before/options"] = {f"q{number}": answer for number, answer in enumerate(right)}
    return one


def with_losses(one: RunRecord, losses: Any, *, before: Any = None) -> RunRecord:
    """The run with a loss of each row, and its untouched model with another."""
    for prefix, values in {"": losses, **({} if before is None else {"before/": before})}.items():
        one.metrics[f"{prefix}loss"] = float(np.mean(values))
        one.losses[f"{prefix}loss"] = {f"q{number}": float(value) for number, value in enumerate(values)}
    return one


def from_file(path: str, right: Sequence[bool], **options: Any) -> RunRecord:
    """A run that took its allocation from a file."""
    given = {"choices": {"allocator": "file"}, "settings": {"allocator.path": path}}
    return record("datainf", right, decision={"scores": (), "source": f"file({path})"}, **given, **options)


def written(folder: Path, jobs: Sequence[Job]) -> Path:
    """The folder, with each job in a folder of its own."""
    for number, job in enumerate(jobs):
        (folder / str(number)).mkdir(parents=True)
        job.write(folder / str(number))
    return folder
