"""From measurements to scores and an allocation: what the estimator needs is taken, scored, and spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from layerif.allocate.allocation import Allocation
from layerif.estimators import Estimator
from layerif.estimators._reliability import agreement, split_half
from layerif.estimators.avss import Avss
from layerif.evidence import LayerGrams
from layerif.layers import LayerMap
from layerif.probe import ekfac
from layerif.probe.measurements import Load, Measurements
from layerif.scores import LayerScores

Allocator = Callable[[LayerScores, LayerMap], Allocation]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Scores and allocation, and what it took to get them.

    scores: None where the allocator looks at none. source: what the scores, or else the allocation, are from.
    num_samples: (train, validation) samples behind the scores, 0 where the estimator needs none; num_truncated of them
    were cut at `probe.max_length`. reused: the evidence was in the store. seconds: evidence, score, allocate.
    reliability: Spearman's rank correlation of the scores of two disjoint halves of the samples; None where the
    evidence is not kept sample by sample. fidelity: where the Grams are not exact (projection, half precision), the
    rank correlation of `scores` and of `influences` with exact ones on some `train` and `validation` samples.
    notes: what else the record should say.
    """

    scores: LayerScores | None
    allocation: Allocation
    source: str
    seconds: dict[str, float]
    num_samples: tuple[int, int] = (0, 0)
    num_truncated: int = 0
    reused: bool = False
    reliability: float | None = None
    fidelity: dict[str, float] | None = None
    notes: tuple[str, ...] = ()

    def record(self):
        from layerif.record.record import AllocationRecord, DecisionRecord, ScoresRecord

        scores = (
            None
            if self.scores is None
            else ScoresRecord(
                layers=list(self.scores.layers), values=list(self.scores.values), higher_means=self.scores.higher_means
            )
        )
        samples = {} if self.scores is None else dict(zip(("train", "validation"), self.num_samples, strict=True))
        return DecisionRecord(
            source=self.source,
            allocation=AllocationRecord(**self.allocation.to_dict()),
            scores=scores,
            reliability=self.reliability,
            fidelity=self.fidelity,
            samples=samples,
        )


@dataclass(frozen=True, kw_only=True)
class Decider(Measurements):
    """Everything a decision depends on; calling it decides."""

    estimator: Estimator
    allocator: Allocator

    def __call__(self, load: Load | None = None) -> Decision:
        """load: gives the model, and is called only if a measurement is needed; None loads it here."""
        start = time.perf_counter()
        everything = self.layers()
        allocation = self.rehearse(everything)
        if not getattr(self.allocator, "needs_scores", True):
            source: str = self.allocator.source  # type: ignore[attr-defined]
            seconds = {"allocate": time.perf_counter() - start}
            return Decision(scores=None, allocation=allocation, source=source, seconds=seconds)
        evidence, reused = self._evidence(load or self.model.load)
        measured = time.perf_counter()
        scores = self.estimator.score(evidence)
        scored = time.perf_counter()
        allocation = self.allocator(scores, everything)
        return Decision(
            scores=scores,
            allocation=allocation,
            source=scores.source,
            seconds={
                "evidence": measured - start,
                "score": scored - measured,
                "allocate": time.perf_counter() - scored,
            },
            reused=reused,
            **self._samples_behind(evidence),
        )

    def preview(self):
        return self.rehearse(self.layers())

    @property
    def measures(self):
        return self.estimator.needs != "nothing" and getattr(self.allocator, "needs_scores", True)

    def inputs(self):
        from pathlib import Path

        from layerif.files import hash_file
        from layerif.models.pretrained import hash_folder

        hashes = {}
        for part in ("estimator", "allocator"):
            if path := getattr(getattr(self, part), "path", None):
                hashes[part] = hash_file(Path(path))
        for checkpoint in getattr(self.estimator, "checkpoints", ()):
            hashes[checkpoint] = hash_folder(Path(checkpoint))
        return hashes

    def rehearse(self, layers: LayerMap) -> Allocation:
        """The allocation of equal scores: what is impossible fails here, before any pass over the data."""
        needs = self.estimator.needs
        if needs in ("grams", "curvature") and self.probe.parameters == "lora" and self.model.adapter is None:
            raise ValueError(
                "probe.parameters=lora needs a LoRA adapter; give it with model.adapter=/folder, "
                "or measure probe.parameters=weights"
            )
        if needs == "training" and self.model.adapter is None:
            raise ValueError(
                "estimator=ila weighs what a fine-tune changed and needs its adapter; train one (for example "
                "method=lora allocator=rank) and give its folder with model.adapter=/run/adapter method=none"
            )
        if needs == "curvature":
            ekfac.check_installed()
            if self.probe.projection is not None:
                raise ValueError(
                    f"estimator=ekfac has no use for probe.projection={self.probe.projection}: it works on whole "
                    "gradients; leave it null, or take an estimator on Grams"
                )
        if needs == "nothing":
            self.estimator.score(layers)
        equal = LayerScores(layers.names, (1.0,) * len(layers.names), "undertrained", "equal", "none")
        return self.allocator(equal, layers)

    def fidelity(self, grams: LayerGrams) -> dict[str, float] | None:
        """How well scores and influences rank like exact ones in float32, on some of the samples measured that way too.

        None where these Grams are exact themselves, where `probe.fidelity_samples` is 0, and where a second model does
        not fit the device.
        """
        try:
            compared = self.with_exact(grams)
        except torch.cuda.OutOfMemoryError:
            return None
        if compared is None:
            return None
        some, reference = compared
        num_validation, num_train = next(iter(reference.grams.values())).val_train.shape
        return {"train": num_train, "validation": num_validation, **agreement(self.estimator, some, reference)}

    def _evidence(self, load: Load) -> tuple[Any, bool]:
        """What the estimator needs, and whether the store had it."""
        estimator: Any = self.estimator
        taken: dict[str, Callable[[], tuple[Any, bool]]] = {
            "nothing": lambda: (self.layers(), False),
            "grams": lambda: self.grams(load),
            "checkpoints": lambda: self.checkpoint_grams(estimator.checkpoints),
            "curvature": lambda: self.curvature(load, damping=estimator.damping, damping_rule=estimator.damping_rule),
            "weights": lambda: self.spectra(load),
            # Only `avss` counts below a bound of its own; all others share the pass with its default.
            "activations": lambda: self.activations(load, epsilon=getattr(estimator, "epsilon", Avss.epsilon)),
            "training": lambda: self.gates(
                load,
                num_steps=estimator.num_steps,
                samples_per_step=estimator.samples_per_step,
                learning_rate=estimator.learning_rate,
                start=estimator.start,
            ),
        }
        return taken[estimator.needs]()

    def _samples_behind(self, evidence: Any) -> dict[str, Any]:
        """What a decision says of the samples behind its scores."""
        if self.estimator.needs in ("nothing", "weights"):
            return {"notes": getattr(evidence, "notes", ())}
        train, validation = self.samples()
        if not hasattr(evidence, "halves"):  # a look at train samples that cannot be taken apart again
            num_samples = len(train), 0
            notes = self._notes(num_samples, self._not_compared(evidence))
            return {"num_samples": num_samples, "num_truncated": train.num_truncated, "notes": notes}
        num_samples = len(train), len(validation)
        fidelity = self.fidelity(evidence) if isinstance(evidence, LayerGrams) else None
        return {
            "num_samples": num_samples,
            "num_truncated": train.num_truncated + validation.num_truncated,
            "reliability": split_half(self.estimator, evidence) if min(num_samples) > 1 else None,
            "fidelity": fidelity,
            "notes": self._notes(num_samples, self._not_compared(evidence) if fidelity is None else ""),
        }

    def _not_compared(self, evidence: Any) -> str:
        """Why evidence that is not exact has no fidelity."""
        if self.probe.fidelity_samples == 0:
            return "probe.fidelity_samples=0"
        if not isinstance(evidence, LayerGrams):
            return "only Grams of one model are"
        return "a second model, in float32, does not fit the device; probe.fidelity_samples=0 does not try"

    def _notes(self, num_samples: tuple[int, int], not_compared: str) -> tuple[str, ...]:
        notes = []
        inexact = [self.model.dtype] if self.model.dtype in ("bfloat16", "float16") else []
        if self.probe.projection is not None and self.estimator.needs in ("grams", "checkpoints"):
            inexact.append(f"a projection to {self.probe.projection} dimensions")
        if inexact and not_compared:
            notes.append(f"probed in {' and '.join(inexact)}; not compared with exact float32 ({not_compared})")
        for part, num in zip(("train", "validation"), num_samples, strict=True):
            asked = getattr(self.probe, f"num_{part}")
            if 0 < num < asked:
                notes.append(f"probe.num_{part}={asked} asked for, the task has {num}")
            if num == 1:
                notes.append(f"one {part} sample ranks nothing reliably: give the task more {part} rows")
        return tuple(notes)
