"""`method=fusion`: fuse the best layers of two models by a linear probe, and compare it with each model alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pandas as pd
from annotated_types import Ge
from torch import nn

from layerif.app.methods import SpendsNothing
from layerif.app.methods._fusion import FUSED, Seen, accuracies, arms, differences
from layerif.app.setup import Setup
from layerif.checks import Count, check_fields
from layerif.data.render import Example
from layerif.data.rows import AnyExample, wrong_options
from layerif.evidence import Classes
from layerif.files import write_text
from layerif.models.pretrained import Pretrained
from layerif.probe.activations import Activations
from layerif.probe.measurements import Load, Measurements
from layerif.record.record import RunRecord
from layerif.record.text import console, show_table
from layerif.report.comparisons import interval, verdict

FUSION = "fusion.json"
FIRST, SECOND = "model", "other"  # the names of the two models in results
FEWEST_ROWS = 4  # fewer held-out rows leave nothing to tell chance by


@dataclass(frozen=True, kw_only=True)
class Fusion(SpendsNothing):
    """Fits a linear probe on the outputs of the best layers of two models, without looking at evaluated rows.

    Layers are chosen, and probes fitted, on train rows alone. They are judged on validation rows.

    Attributes:
        other: the second model.
        classes: the rows and their classes, see `estimator=linear_probe`. Of `truth`, a question is right where its
            right output seems the more likely one.
        num_layers: the layers of each model.
        folds: of the cross-validation that chooses them.
    """

    name: ClassVar[str] = "fusion"

    other: Pretrained | None = None
    classes: Classes = "truth"
    num_layers: Count = 1
    folds: Annotated[int, Ge(2)] = 5

    def __post_init__(self) -> None:
        check_fields(self, "method")

    def check(self, setup: Setup) -> None:
        if self.other is None:
            raise ValueError(
                "method=fusion needs a second model; add one with +model@method.other=local method.other.path=/folder "
                "(or +model@method.other=hub method.other.name=org/name)"
            )
        decider = setup.decider
        self.other.check()
        if setup.evaluation.before:
            raise ValueError("method=fusion never looks at evaluated rows; use evaluation.before=false, or method=none")
        if decider.num_processes > 1:
            raise ValueError(f"method=fusion works in one process, got {decider.num_processes}; use trainer.devices=1")
        for called, model in (("model", decider.model), ("method.other", self.other)):
            if self.num_layers > (have := len(model.layers().names)):
                raise ValueError(
                    f"method.num_layers={self.num_layers} is more than the {have} blocks of {called}; use "
                    f"method.num_layers<={have}"
                )
        if (have := len(decider.chosen("validation"))) < FEWEST_ROWS:
            raise ValueError(
                f"method=fusion judges on validation rows, and {have} are too few; raise probe.num_validation to "
                f"{FEWEST_ROWS} or more, or use a task with as many"
            )
        self._check_rows("train", decider.chosen("train"))
        self._check_rows("validation", decider.chosen("validation"))

    def _check_rows(self, part: str, rows: Sequence[AnyExample]) -> None:
        """Refuses rows without the classes that the probe tells apart."""
        without = [row.id for row in rows if not isinstance(row, Example) or not wrong_options(row)]
        if without:
            raise ValueError(
                f"{len(without)} {part} rows have no wrong option ({without[0]} first), so that method=fusion has "
                "nothing to tell apart; use a task with options, or leave such rows out with task.keep"
            )
        if part == "train" and self.classes == "answer":
            labels = Counter(row.labels[row.answer] for row in rows if isinstance(row, Example))
            label, count = min(labels.items(), key=lambda item: item[1])
            if count < self.folds:
                raise ValueError(
                    f"the class {label!r} has {count} train rows, fewer than method.folds={self.folds}; raise "
                    "probe.num_train, lower the folds, or use method.classes=truth"
                )

    def preview(self, setup: Setup) -> dict[str, str]:
        train, validation = (len(setup.decider.chosen(part)) for part in ("train", "validation"))
        return {
            "fusion": f"forward passes of two models over {train} train and {validation} validation rows; "
            f"{self.num_layers} of the layers of each"
        }

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        assert self.other is not None
        start = time.perf_counter()
        other = replace(setup.decider, model=self.other, tokenizer=self.other.tokenizer())
        measured: dict[str, Measurements] = {FIRST: setup.decider, SECOND: other}
        train = {called: self._seen(one, _loader(one)) for called, one in measured.items()}
        held_out = {called: self._seen(_on_validation(one), _loader(one)) for called, one in measured.items()}
        record.seconds["evidence"] = time.perf_counter() - start
        start = time.perf_counter()
        of_layer = {called: accuracies(seen, folds=self.folds) for called, seen in train.items()}
        found = arms(train, held_out, of_layer, num_layers=self.num_layers)
        compared = differences(found)
        record.seconds["fuse"] = time.perf_counter() - start
        content = {
            "models": {called: one.model.location()[0] for called, one in measured.items()},
            "rows": {part: len(setup.decider.chosen(part)) for part in ("train", "validation")},
            "accuracy of each layer on train rows": of_layer,
            "arms": [arm.row() for arm in found],
            "differences": compared,
        }
        write_text(folder / FUSION, json.dumps(content, indent=1, allow_nan=False) + "\n")
        record.metrics |= _metrics(content)
        _show(content)

    def _seen(self, measurements: Measurements, load: Load) -> Seen:
        """Measures the train rows of these measurements, or reads them from the store."""
        evidence, _ = Activations().take(measurements, load)
        return Seen.of(evidence, self.classes)


def _on_validation(measurements: Measurements) -> Measurements:
    """Gives measurements that look at validation rows where these look at train rows, and at no others."""
    splits, probe = measurements.splits, measurements.probe
    return replace(
        measurements,
        splits=replace(splits, train=tuple(measurements.chosen("validation")), validation=(), test=()),
        probe=replace(probe, num_train=probe.num_validation),
    )


def _loader(measurements: Measurements) -> Load:
    @cache
    def load() -> nn.Module:
        model: Any = measurements.model.load()
        return model.to(measurements.device)

    return load


def _metrics(content: Mapping[str, Any]) -> dict[str, float]:
    """Gives the accuracies of the arms, and what the fused one has more than the best layers of each model alone."""
    found: dict[str, float] = {}
    names = dict(zip((f"best_{FIRST}", f"best_{SECOND}"), content["arms"][:2], strict=True))
    for name, arm in {**names, FUSED: content["arms"][-1]}.items():
        found |= {f"{name}_accuracy": arm["accuracy"], f"{name}_accuracy_low": arm["low"]}
        found[f"{name}_accuracy_high"] = arm["high"]
    for name, row in zip(names, content["differences"][:2], strict=True):
        found |= {f"{FUSED}_minus_{name}": row["difference"], f"{FUSED}_minus_{name}_low": row["low"]}
        found[f"{FUSED}_minus_{name}_high"] = row["high"]
    return found


def _show(content: Mapping[str, Any]) -> None:
    """Prints the accuracies and the differences."""
    on = console()
    told = ", ".join(f"{called}: {where}" for called, where in content["models"].items())
    rows = content["rows"]
    on.print(f"{told}; fitted on {rows['train']} train rows, judged on {rows['validation']} validation rows")
    shown = [
        {
            "probe": arm["arm"],
            "blocks": "; ".join(f"{called} {', '.join(map(str, places))}" for called, places in arm["layers"].items()),
            "accuracy": arm["accuracy"],
            "95 % interval": f"{arm['low']:.3f} to {arm['high']:.3f}",
        }
        for arm in content["arms"]
    ]
    show_table(pd.DataFrame(shown), "Accuracy on held-out rows", on)
    compared = [
        {
            "from": row["from"],
            "to": row["to"],
            "difference": f"{row['difference']:+.3f}",
            "95 % interval": interval(row["low"], row["high"]),
            "p Holm": row["p Holm"],
            "said": verdict(row["low"], row["high"], row["p Holm"]),
        }
        for row in content["differences"]
    ]
    show_table(pd.DataFrame(compared), "Fused less alone", on)
