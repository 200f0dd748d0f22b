"""From a model and a task to scores and an allocation, by way of the evidence the estimator needs."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from layerif import ekfac, loss, probe
from layerif.allocate import Allocation
from layerif.data.batches import Encodings, batches, encode, padding_id
from layerif.data.task import Example, Splits
from layerif.estimators import Estimator
from layerif.layers import CheckpointGrams, LayerGrams, LayerInfluences, LayerMap
from layerif.models import Pretrained, layer_map
from layerif.probe import Probe, measure
from layerif.scores import LayerScores
from layerif.store import Store

log = logging.getLogger(__name__)

Allocator = Callable[[LayerScores, LayerMap], Allocation]


@dataclass(frozen=True)
class Decision:
    """Scores and allocation, and what it took to get them.

    scores: None where the allocator looks at none. num_samples: (train, validation) samples behind the scores, (0, 0)
    where the estimator needs none; num_truncated of them were cut at `probe.max_length`. reused: the Grams were in the
    store. seconds: evidence, score, allocate. reliability: Spearman's rank correlation of the scores of two disjoint
    halves of the samples; None without samples.
    """

    scores: LayerScores | None
    allocation: Allocation
    seconds: dict[str, float]
    num_samples: tuple[int, int] = (0, 0)
    num_truncated: int = 0
    reused: bool = False
    reliability: float | None = None


@dataclass(frozen=True)
class Decider:
    """Everything a decision depends on; calling it decides. device: where models of checkpoints are measured."""

    model: Pretrained
    tokenizer: Any
    splits: Splits
    probe: Probe
    estimator: Estimator
    allocator: Allocator
    store: Store
    seed: int = 0
    device: torch.device | str = "cpu"

    def __call__(self, load: Callable[[], nn.Module] | None = None) -> Decision:
        """load: gives the model, and is called only if a measurement is needed; None loads it here."""
        start = time.perf_counter()
        everything = self.layers()
        allocation = self.rehearse(everything)
        if not getattr(self.allocator, "needs_scores", True):
            return Decision(None, allocation, {"allocate": time.perf_counter() - start})
        grams, reused = None, False
        if self.estimator.needs == "grams":
            grams, reused = self.grams(load or self.model.load)
        elif self.estimator.needs == "checkpoints":
            grams, reused = self.checkpoint_grams(self.estimator.checkpoints)  # type: ignore[attr-defined]
        elif self.estimator.needs == "curvature":
            grams, reused = self.curvature(load or self.model.load)
        measured = time.perf_counter()
        scores = self.estimator.score(everything if grams is None else grams)
        scored = time.perf_counter()
        allocation = self.allocator(scores, everything)
        seconds = {
            "evidence": measured - start,
            "score": scored - measured,
            "allocate": time.perf_counter() - scored,
        }
        if grams is None:
            return Decision(scores, allocation, seconds)
        train, validation = self.samples()
        num_truncated = train.num_truncated + validation.num_truncated
        reliability = split_half(self.estimator, grams) if min(len(train), len(validation)) > 1 else None
        return Decision(scores, allocation, seconds, (len(train), len(validation)), num_truncated, reused, reliability)

    def layers(self) -> LayerMap:
        """All blocks with all their linear layers: what an allocation is spread over."""
        return self.model.layers()

    def rehearse(self, layers: LayerMap) -> Allocation:
        """The allocation of equal scores: what is impossible fails here, before any pass over the data."""
        measured = self.estimator.needs in ("grams", "curvature")
        if measured and self.probe.parameters == "lora" and self.model.adapter is None:
            raise ValueError(
                "probe.parameters=lora needs a LoRA adapter; give it with model.adapter=/folder, "
                "or measure probe.parameters=weights"
            )
        if self.estimator.needs == "curvature":
            ekfac.check_installed()
        if self.estimator.needs == "nothing":
            self.estimator.score(layers)
        equal = LayerScores(layers.names, (1.0,) * len(layers.names), "undertrained", "equal", "none")
        return self.allocator(equal, layers)

    def samples(self) -> tuple[Encodings, Encodings]:
        """The samples that influence is measured on: a seeded choice of train and validation, never from test."""
        return self._samples

    @cached_property
    def _samples(self) -> tuple[Encodings, Encodings]:
        probe = self.probe
        return tuple(  # type: ignore[return-value]
            encode(
                self._chosen(part),
                self.tokenizer,
                template=probe.template,
                max_length=probe.max_length,
                loss_on=probe.loss_on,
                eos=False,
            )
            for part in ("train", "validation")
        )

    def _chosen(self, part: str) -> list[Example]:
        examples = getattr(self.splits, part)
        order = list(range(len(examples)))
        Random(f"{self.seed} {part}").shuffle(order)
        return [examples[index] for index in sorted(order[: getattr(self.probe, f"num_{part}")])]

    def grams(self, load: Callable[[], nn.Module]) -> tuple[LayerGrams, bool]:
        """The Grams of the samples, measured unless the store has them."""
        train, validation = self.samples()
        description = {
            "probe": probe.VERSION,
            "loss": loss.VERSION,
            "model": self.model.fingerprint(),
            "scope": self.probe.scope,
            "parameters": self.probe.parameters,
            "train": _hash(train),
            "validation": _hash(validation),
        }

        def compute(key: str) -> LayerGrams:
            model = load()
            layers = layer_map(model, scope=self.probe.scope, parameters=self.probe.parameters)
            log.info("measuring %d + %d samples in %d layers", len(train), len(validation), len(layers.names))
            pad, size = padding_id(self.tokenizer), self.probe.batch_size
            return measure(
                model,
                layers,
                list(batches(train, size, pad)),
                list(batches(validation, size, pad)),
                memory_gb=self.probe.memory_gb,
                fingerprint=key,
                names=[f"{part} row {row.id}" for part in ("train", "validation") for row in self._chosen(part)],
            )

        grams, reused = self.store.grams(description, compute, about=self.about())
        if reused:
            log.info("scores from the store: %s… was measured before, no gradient pass", grams.fingerprint[:12])
        return grams, reused

    def curvature(self, load: Callable[[], nn.Module]) -> tuple[LayerInfluences, bool]:
        """The influences of the samples under the estimator's own curvature, measured unless the store has them."""
        estimator: Any = self.estimator
        train, validation = self.samples()
        relative = estimator.damping_rule == "relative"
        description = {
            "ekfac": ekfac.VERSION,
            "damping": [estimator.damping, estimator.damping_rule],
            "loss": loss.VERSION,
            "model": self.model.fingerprint(),
            "scope": self.probe.scope,
            "parameters": self.probe.parameters,
            "train": _hash(train),
            "validation": _hash(validation),
        }

        def compute(key: str) -> LayerInfluences:
            model = load()
            layers = layer_map(model, scope=self.probe.scope, parameters=self.probe.parameters)
            log.info("EK-FAC of %d + %d samples in %d layers", len(train), len(validation), len(layers.names))
            return ekfac.measure(
                model,
                layers,
                train,
                validation,
                pad_id=padding_id(self.tokenizer),
                batch_size=self.probe.batch_size,
                damping=estimator.damping,
                relative=relative,
                memory_gb=self.probe.memory_gb,
                fingerprint=key,
            )

        found, reused = self.store.influences(description, compute, about=self.about())
        if reused:
            log.info("scores from the store: %s… was measured before", found.fingerprint[:12])
        return found, reused

    def about(self) -> dict[str, str]:
        """What `layerif-store` shows of this decider's measurements."""
        return {"model": Path(self.model.location()[0]).name}

    def checkpoint_grams(self, checkpoints: Sequence[str]) -> tuple[CheckpointGrams, bool]:
        """The Grams of the samples at every checkpoint, and whether none was measured.

        One of another model is refused before any is measured.
        """
        models = [self.model.at(checkpoint) for checkpoint in checkpoints]
        measured = [
            replace(self, model=at).grams(lambda at=at: at.load().to(self.device))  # type: ignore[arg-type]
            for at in models
        ]
        return CheckpointGrams(tuple(grams for grams, _ in measured)), all(reused for _, reused in measured)


def split_half(estimator: Estimator, grams: LayerGrams | CheckpointGrams | LayerInfluences) -> float | None:
    """Do disjoint samples rank the layers alike? Spearman of every other sample's scores against the others'.

    None where a half ranks nothing (all layers equal).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # zero gradients were named when the whole was scored
        first, second = (estimator.score(half).values for half in grams.halves)
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second)[0])  # type: ignore[arg-type]


def _hash(encodings: Encodings) -> str:
    """Of the token ids and of which of them count in the loss."""
    samples = [(sample.input_ids, sample.loss_from) for sample in encodings]
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()
