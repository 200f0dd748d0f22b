"""`method=diagnose`: gather the evidence, draw the conclusions, leave a report in the run's folder."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from layerif.app.methods._steps import keep
from layerif.decide import Decider
from layerif.diagnose import evidence, plots, text
from layerif.diagnose.agreement import name_of, panel
from layerif.diagnose.conclusions import conclusions
from layerif.diagnose.gradients import gradient_health
from layerif.diagnose.leave_out import left_out_sets
from layerif.diagnose.mislabel import flip
from layerif.diagnose.retrain import Recipe
from layerif.diagnose.retrainings import Retrainings, write
from layerif.estimators._base import GramEstimator
from layerif.estimators.lissa import Lissa
from layerif.files import claim_folder
from layerif.probe.grams.request import Grams
from layerif.record.record import RunRecord

log = logging.getLogger(__name__)

FILE = "diagnose.json"
LEAST_ROWS = 4  # fewer leave nothing to rank


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Can the scores of this model, task and estimator be trusted? Evaluated rows are not looked at.

    seeds: adapters trained independently of one another, and trials of flipped answers. subsets: random sets of
        training rows left out, the same for every seed; each costs one retraining a seed. removed: the share of the
        rows in a set.
    num_train, num_validation: rows to retrain on, and rows whose loss is watched, chosen as the probe chooses its own.
    steps, batch_size, learning_rate, r: of each retraining, see `retrain.Recipe`.
    flipped: the share of the training answers made wrong. resamples: bootstrap draws behind the layers' ranks.
    """

    allocates: ClassVar[None] = None  # any allocator will do

    seeds: int = 3
    subsets: int = 40
    removed: float = 0.5
    num_train: int = 48
    num_validation: int = 32
    steps: int = 18
    batch_size: int = 8
    learning_rate: float = 1e-3
    r: int = 4
    flipped: float = 0.1
    resamples: int = 200

    def __post_init__(self) -> None:
        least = {"seeds": 1, "subsets": 3, "num_train": LEAST_ROWS, "num_validation": LEAST_ROWS, "resamples": 20}
        for name, lowest in {**least, "steps": 1, "batch_size": 1, "r": 1}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"method.{name}={getattr(self, name)} must be at least {lowest}")
        for name in ("removed", "flipped"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"method.{name}={getattr(self, name)} must lie between 0 and 1, a share of the rows")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"method.learning_rate={self.learning_rate} must be finite and above 0")

    def __call__(self, decider: Decider, record: RunRecord, folder: Path) -> None:
        self.check(decider)
        if record.config["evaluation"]["before"]:
            raise ValueError("method=diagnose looks at no evaluated row; use evaluation.before=false, or method=none")
        work = folder / "checkpoints"  # the run removes it once its record stands
        if claim_folder(work, record.identity):
            record.notes.append("carried on from a run that did not finish; seconds are of the rest")
        report = self._report(decider, record, work)
        write(folder / FILE, json.dumps(report, indent=1, allow_nan=False) + "\n")
        write(folder / "diagnose.md", text.markdown(report))
        plots.plot(report, folder)
        record.metrics |= text.headline(report)
        print(text.summary(report))

    def plan(self, decider: Decider) -> dict[str, str]:
        """What a run would do and cost, for a dry run. Raises ValueError for what cannot be done."""
        self.check(decider)
        num_steps = self.seeds * (1 + self.subsets) * self.steps
        return {
            "retraining": f"{self.seeds} seeds × (1 + {self.subsets} sets of {self._left_out} of {self.num_train} rows "
            f"left out) × {self.steps} steps of {self.batch_size} rows, less those left out = {num_steps:,} steps",
            "gradient passes": f"1 over the probe's samples, {self.seeds} with {self.flipped:.0%} of their answers "
            f"flipped, {self.seeds} over {self.num_train} + {self.num_validation} rows at the adapters; "
            "none for what the store has",
            "bootstrap": f"{self.resamples} draws from the Grams, without a gradient",
        }

    def check(self, decider: Decider) -> None:
        """Raise ValueError for whatever would stop the work later."""
        estimator = decider.estimator
        if not isinstance(estimator, GramEstimator) or estimator.needs != Grams():
            raise ValueError(
                f"method=diagnose examines influence taken from Grams, and {type(estimator).__name__} takes it from "
                f"{type(estimator.needs).__name__}; use estimator=datainf, exact, lissa, grad_dot or cosine"
            )
        if isinstance(estimator, Lissa) and estimator.step_size is not None:
            raise ValueError(
                f"method=diagnose solves many subsamples, and estimator.step_size={estimator.step_size} need not "
                "converge on all of them; leave it null, and every matrix gets a step of its own"
            )
        if decider.num_processes > 1:
            raise ValueError(
                f"method=diagnose works in one process, got {decider.num_processes}; use trainer.devices=1"
            )
        if decider.model.adapter is not None:
            raise ValueError(
                f"method=diagnose trains adapters of its own and cannot build on model.adapter="
                f"{decider.model.adapter!r}; merge that into a folder (PEFT's merge_and_unload) and use model=local"
            )
        for part in ("train", "validation"):
            have, asked = len(getattr(decider.splits, part)), getattr(self, f"num_{part}")
            if have < asked:
                raise ValueError(
                    f"method.num_{part}={asked} rows asked for, the task has {have} in {part}; "
                    f"use method.num_{part}<={have}"
                )
            if getattr(decider.probe, f"num_{part}") < LEAST_ROWS:
                raise ValueError(
                    f"probe.num_{part} must be at least {LEAST_ROWS} for method=diagnose: fewer rank nothing"
                )
        left_out_sets(self.num_train, self._left_out, self.subsets, seed=decider.seed)
        flip(decider.chosen("train"), self.flipped, seed=decider.seed)

    @property
    def _left_out(self) -> int:
        return max(1, round(self.removed * self.num_train))

    def _report(self, decider: Decider, record: RunRecord, work: Path) -> dict[str, Any]:
        loaded: list[nn.Module] = []

        def model() -> nn.Module:
            """The bare model, loaded when something first needs it."""
            loaded[:] = loaded or [decider.model.load().to(decider.device)]  # type: ignore[arg-type]
            return loaded[0]

        keep(decider(model), record)
        grams, _ = Grams().take(decider, model)
        own: GramEstimator = decider.estimator  # type: ignore[assignment]
        estimators, retrainings = panel(own), self._retrainings(decider, model, work)
        report: dict[str, Any] = {
            "estimator": name_of(own),
            "aggregation": own.aggregation,
            "source": own.source,
            "layers": list(grams.layers.names),
            "samples": dict(zip(("train", "validation"), map(len, decider.samples()), strict=True)),
        }
        sections: dict[str, Callable[[], Any]] = {
            "instrument": evidence.instrument,
            "gradients": lambda: gradient_health(grams),
            "solver": lambda: evidence.solver(estimators, grams),
            "agreement": lambda: evidence.agreements(estimators, grams),
            "mislabel": lambda: evidence.mislabel(estimators, decider, model, share=self.flipped, trials=self.seeds),
            "leave_out": lambda: evidence.leave_out(estimators, retrainings),
            "stability": lambda: evidence.stability(
                own, grams, retrainings.grams(), resamples=self.resamples, seed=decider.seed
            ),
        }
        for name, section in sections.items():
            log.info("%s", name.replace("_", " "))
            with _timed(record, name):
                report[name] = plain(section())
        report["conclusions"] = plain(conclusions(report))
        return report

    def _retrainings(self, decider: Decider, model: Callable[[], nn.Module], work: Path) -> Retrainings:
        rows = {"num_train": self.num_train, "num_validation": self.num_validation}
        return Retrainings(
            decider=replace(decider, probe=replace(decider.probe, parameters="lora", **rows)),
            recipe=Recipe(steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate, r=self.r),
            seeds=[decider.seed + number for number in range(self.seeds)],
            sets=left_out_sets(self.num_train, self._left_out, self.subsets, seed=decider.seed),
            model=model,
            work=work,
        )


def plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity, which it cannot, become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def _timed(record: RunRecord, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    record.seconds[name] = time.perf_counter() - start
