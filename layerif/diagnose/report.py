"""The trust report of one model, task and estimator: the evidence section by section, then the conclusions."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from layerif.decide import Decider
from layerif.diagnose import sections
from layerif.diagnose.agreement import panel
from layerif.diagnose.conclusions import conclusions
from layerif.diagnose.gradients import gradient_health
from layerif.diagnose.leave_out import left_out_sets
from layerif.diagnose.retrain import Recipe
from layerif.diagnose.retrainings import Retrainings
from layerif.estimators._base import GramEstimator, name_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The amount of evidence that the report gathers.

    Attributes:
        seeds: the number of adapters, trained independently of one another, and of trials of flipped answers.
        subsets: the number of random sets of training rows left out, the same sets for every seed.
        num_left_out: the number of rows in a set.
        num_train, num_validation: the number of rows to retrain on, and of rows whose loss is watched.
        flipped: the share of the training answers made wrong.
        resamples: the number of bootstrap draws behind the layers' ranks.
    """

    seeds: int
    subsets: int
    num_left_out: int
    num_train: int
    num_validation: int
    flipped: float
    resamples: int


def report(
    decider: Decider,
    trials: Trials,
    recipe: Recipe,
    model: Callable[[], nn.Module],
    work: Path,
    seconds: MutableMapping[str, float],
) -> dict[str, Any]:
    """Gathers the evidence on the decider's scores and draws the conclusions.

    Args:
        decider: takes the scores; its estimator works on Grams.
        trials: the amount of evidence to gather.
        recipe: the training of an adapter.
        model: loads the bare model on its device.
        work: the folder of finished retrainings, from which a killed run carries on.
        seconds: receives the seconds of every section.

    Returns:
        The sections by name, with the conclusions under `conclusions`, as JSON can hold them.
    """
    own: GramEstimator = decider.estimator  # type: ignore[assignment]
    grams, _ = own.needs.take(decider, model)
    estimators, retrainings = panel(own), _retrainings(decider, trials, recipe, model, work)
    found: dict[str, Any] = {
        "estimator": name_of(own),
        "aggregation": own.aggregation,
        "source": own.source,
        "layers": list(grams.layers.names),
        "samples": dict(zip(("train", "validation"), map(len, decider.samples()), strict=True)),
    }
    answers: dict[str, Callable[[], Any]] = {
        "instrument": sections.instrument,
        "gradients": lambda: gradient_health(grams),
        "solver": lambda: sections.solver(estimators, grams),
        "agreement": lambda: sections.agreements(estimators, grams),
        "mislabel": lambda: sections.mislabel(estimators, decider, model, share=trials.flipped, trials=trials.seeds),
        "leave_out": lambda: sections.leave_out(estimators, retrainings),
        "stability": lambda: sections.stability(
            own, grams, retrainings.grams(), resamples=trials.resamples, seed=decider.seed
        ),
    }
    for name, answer in answers.items():
        log.info("%s", name.replace("_", " "))
        with _timed(seconds, name):
            found[name] = plain(answer())
    found["conclusions"] = plain(conclusions(found))
    return found


def plain(value: Any) -> Any:
    """Turns a value into one that JSON can hold: NaN and infinity become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _retrainings(
    decider: Decider, trials: Trials, recipe: Recipe, model: Callable[[], nn.Module], work: Path
) -> Retrainings:
    rows = {"num_train": trials.num_train, "num_validation": trials.num_validation}
    return Retrainings(
        decider=replace(decider, probe=replace(decider.probe, parameters="lora", **rows)),
        recipe=recipe,
        seeds=[decider.seed + number for number in range(trials.seeds)],
        sets=left_out_sets(trials.num_train, trials.num_left_out, trials.subsets, seed=decider.seed),
        model=model,
        work=work,
    )


@contextmanager
def _timed(seconds: MutableMapping[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
