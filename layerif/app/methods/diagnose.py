"""`method=diagnose`: report if the scores of this model, task and estimator can be trusted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge

from layerif.adapt.sizes import Capacity, adapted_shapes, too_large_rank
from layerif.adapt.train import CHECKPOINTS
from layerif.app.methods import SpendsNothing
from layerif.app.methods._steps import loader, record_decision
from layerif.app.setup import Setup
from layerif.checks import Count, Positive, Share, check_fields, check_value
from layerif.decide import Decider
from layerif.diagnose import plots, text
from layerif.diagnose.agreement import curvature_panel
from layerif.diagnose.leave_out import left_out_sets
from layerif.diagnose.mislabel import flip
from layerif.diagnose.report import Trials, report
from layerif.diagnose.retrain import Recipe
from layerif.diagnose.sections import num_chosen_sets
from layerif.estimators._base import GramEstimator
from layerif.estimators.lissa import Lissa
from layerif.files import claim_folder, write_text
from layerif.models.blocks import layer_map
from layerif.probe.grams.request import Grams
from layerif.record.record import RunRecord

DIAGNOSIS = "diagnose.json"
LEAST_ROWS = 4  # fewer rows leave nothing to rank

NumRows = Annotated[int, Ge(LEAST_ROWS), "fewer rows rank nothing"]


@dataclass(frozen=True, kw_only=True)
class Diagnose(SpendsNothing):
    """Examines whether the scores can be trusted, without looking at evaluated rows.

    Attributes:
        seeds: adapters trained independently of one another, and trials of flipped answers.
        subsets: random sets of training rows left out, the same for every seed; each costs one retraining a seed.
        removed: the share of the rows in a set.
        num_train, num_validation: rows to retrain on, and rows whose loss is watched, chosen as the probe chooses its
            own.
        steps, batch_size, learning_rate, r: of each retraining, see `layerif.diagnose.retrain.Recipe`.
        flipped: the share of the training answers made wrong.
        resamples: bootstrap draws behind the layers' ranks.
    """

    name: ClassVar[str] = "diagnose"

    seeds: Count = 3
    subsets: Annotated[int, Ge(3)] = 40
    removed: Share = 0.5
    num_train: NumRows = 48
    num_validation: NumRows = 32
    steps: Count = 18
    batch_size: Count = 8
    learning_rate: Positive = 1e-3
    r: Count = 4
    flipped: Share = 0.1
    resamples: Annotated[int, Ge(20)] = 200

    def __post_init__(self) -> None:
        check_fields(self, "method")

    def check(self, setup: Setup) -> None:
        decider = setup.decider
        _check_estimator(decider)
        if setup.evaluation.before:
            raise ValueError(
                "method=diagnose never looks at evaluated rows; use evaluation.before=false, or method=none"
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
                    f"method.num_{part}={asked} is more than the {have} {part} rows of the task; "
                    f"use method.num_{part}<={have}"
                )
            check_value(f"probe.num_{part}", getattr(decider.probe, f"num_{part}"), NumRows)
        self._check_rank(setup)
        curvature_panel(decider.estimator)  # type: ignore[arg-type]
        left_out_sets(self.num_train, self._num_left_out, self.subsets, seed=decider.seed)
        flip(decider.chosen("train"), self.flipped, seed=decider.seed)

    def preview(self, setup: Setup) -> dict[str, str]:
        num_top = num_chosen_sets(setup.decider.estimator)  # type: ignore[arg-type]
        num_steps = self.seeds * (1 + self.subsets + num_top) * self.steps
        return {
            "retraining": f"{self.seeds} seeds × (1 + {self.subsets} random and {num_top} chosen sets of "
            f"{self._num_left_out} of {self.num_train} rows left out) × {self.steps} steps of {self.batch_size} rows, "
            f"less those left out = {num_steps:,} steps",
            "gradient passes": f"1 over the probe's samples, {self.seeds} with {self.flipped:.0%} of their answers "
            f"flipped, {2 * self.seeds} over {self.num_train} + {self.num_validation} rows at the adapters; "
            "none for what the store has",
            "bootstrap": f"{self.resamples} draws from the Grams, without a gradient",
        }

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        model, work = loader(setup), folder / CHECKPOINTS
        if claim_folder(work, record.identity):
            record.notes.append("carried on from a run that did not finish; seconds count the rest alone")
        record_decision(setup.decider(model), record)
        recipe = Recipe(steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate, r=self.r)
        found = report(setup.decider, self._trials, recipe, model, work, record.seconds)
        write_text(folder / DIAGNOSIS, json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_text(folder / "diagnose.md", text.report_markdown(found))
        plots.plot(found, folder)
        record.metrics |= text.headline_metrics(found)
        print(text.report_summary(found))

    def _check_rank(self, setup: Setup) -> None:
        skeleton, probe = setup.model.skeleton(), setup.decider.probe
        adapted = layer_map(skeleton, scope=probe.scope, skip_unsupported=probe.skip_unsupported)
        targets = [param.removesuffix(".weight") for param in adapted.matrices]
        shapes = adapted_shapes(skeleton, targets)
        if too_large := too_large_rank(shapes, dict.fromkeys(shapes, Capacity(1, self.r))):
            raise ValueError(f"{too_large}; lower method.r")

    @property
    def _num_left_out(self) -> int:
        return max(1, round(self.removed * self.num_train))

    @property
    def _trials(self) -> Trials:
        return Trials(
            seeds=self.seeds,
            subsets=self.subsets,
            num_left_out=self._num_left_out,
            num_train=self.num_train,
            num_validation=self.num_validation,
            flipped=self.flipped,
            resamples=self.resamples,
        )


def _check_estimator(decider: Decider) -> None:
    estimator = decider.estimator
    if not isinstance(estimator, GramEstimator) or estimator.needs != Grams():
        raise ValueError(
            f"method=diagnose examines influence taken from the Grams of one model, and {type(estimator).__name__} "
            f"takes {type(estimator.needs).__name__}; use estimator=datainf, exact, lissa, grad_dot or cosine"
        )
    if isinstance(estimator, Lissa) and estimator.step_size is not None:
        raise ValueError(
            f"method=diagnose solves many subsamples, and estimator.step_size={estimator.step_size} may not "
            "converge on all of them; leave it null, and every matrix gets a step of its own"
        )
