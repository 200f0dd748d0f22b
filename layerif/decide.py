"""From a model and a task to scores and an allocation, by way of the evidence the estimator needs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from scipy.stats import ConstantInputWarning, spearmanr
from torch import Tensor, nn

from layerif import ekfac, loss, probe
from layerif.allocate import Allocation
from layerif.data.batches import Encodings, batches, encode, padding_id
from layerif.data.task import Example, Splits
from layerif.estimators import Estimator
from layerif.estimators.lissa import Diverges
from layerif.layers import CheckpointGrams, LayerGrams, LayerInfluences, LayerMap
from layerif.models import Pretrained, layer_map
from layerif.probe import Probe, Projection, measure
from layerif.probe.shards import Shards, spread
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
    halves of the samples; None without samples. fidelity: where the Grams are not exact (projection, half precision),
    the rank correlation of `scores` and of `influences` with exact ones on some `train` and `validation` samples.
    """

    scores: LayerScores | None
    allocation: Allocation
    seconds: dict[str, float]
    num_samples: tuple[int, int] = (0, 0)
    num_truncated: int = 0
    reused: bool = False
    reliability: float | None = None
    fidelity: dict[str, float] | None = None


@dataclass(frozen=True)
class Decider:
    """Everything a decision depends on; calling it decides.

    device: where models are measured. spread: the model does not fit one device, so its weights are divided among all
    processes for the measurement (FSDP).
    """

    model: Pretrained
    tokenizer: Any
    splits: Splits
    probe: Probe
    estimator: Estimator
    allocator: Allocator
    store: Store
    seed: int = 0
    device: torch.device | str = "cpu"
    spread: bool = False

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
        fidelity = self.fidelity(grams) if isinstance(grams, LayerGrams) else None
        return Decision(
            scores, allocation, seconds, (len(train), len(validation)), num_truncated, reused, reliability, fidelity
        )

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
                self.chosen(part),
                self.tokenizer,
                template=probe.template,
                max_length=probe.max_length,
                loss_on=probe.loss_on,
                eos=False,
            )
            for part in ("train", "validation")
        )

    def chosen(self, part: str) -> list[Example]:
        """The rows of `train` or `validation` behind the samples, in their order."""
        examples = getattr(self.splits, part)
        return [examples[row] for row in self._rows(part)]

    def _rows(self, part: str) -> list[int]:
        """Fewer are a subset of more."""
        order = list(range(len(getattr(self.splits, part))))
        Random(f"{self.seed} {part}").shuffle(order)
        return sorted(order[: getattr(self.probe, f"num_{part}")])

    def grams(self, load: Callable[[], nn.Module]) -> tuple[LayerGrams, bool]:
        """The Grams of the samples, measured unless the store has them, and whether it had.

        load: gives the model on its device. With several processes all call this and all receive the Grams; the store
        is the first one's.
        """
        projection = [self.probe.projection, self.probe.projection_seed] if self.probe.projection else None
        description = self._description(probe=probe.VERSION, projection=projection)
        shards = Shards.current()
        if shards.rank > 0:
            found = shards.share(None)[0]
            return found or (self._measure(load, self.store.key(description)), False)

        def compute(key: str) -> LayerGrams:
            shards.share(None)  # nothing is stored: all begin to measure
            return self._measure(load, key)

        grams, reused = self.store.grams(description, compute, about=self.about())
        if reused:
            shards.share((grams, reused))
            log.info("scores from the store: %s… was measured before, no gradient pass", grams.fingerprint[:12])
        return grams, reused

    def _measure(self, load: Callable[[], nn.Module], key: str) -> LayerGrams:
        probe = self.probe
        is_shared = self.spread and Shards.current().size > 1
        model = spread(self.model.load(), self.device) if is_shared else load()
        layers = self._measured_layers(model)
        train, validation = self.samples()
        log.info("gradient pass: %d + %d samples in %d layers", len(train), len(validation), len(layers.names))
        pad, size = padding_id(self.tokenizer), probe.batch_size
        return measure(
            model,
            layers,
            list(batches(train, size, pad)),
            list(batches(validation, size, pad)),
            form=probe.form,
            memory_gb=probe.memory_gb,
            offload=probe.offload,
            projection=Projection(probe.projection, probe.projection_seed) if probe.projection else None,
            partial=self.store.partial(key),
            fingerprint=key,
            names=[f"{part} row {row.id}" for part in ("train", "validation") for row in self.chosen(part)],
        )

    def fidelity(self, grams: LayerGrams) -> dict[str, float] | None:
        """How well scores and influences rank like exact ones in float32, on some of the samples measured that way too.

        None where these Grams are exact themselves, or where `probe.fidelity_samples` is 0.
        """
        probe = self.probe
        is_exact = probe.projection is None and self.model.dtype not in ("bfloat16", "float16")
        if is_exact or probe.fidelity_samples == 0:
            return None
        exact = replace(
            self,
            model=replace(self.model, dtype="float64" if self.model.dtype == "float64" else "float32"),
            probe=replace(
                probe,
                projection=None,
                num_train=min(probe.num_train, probe.fidelity_samples),
                num_validation=min(probe.num_validation, probe.fidelity_samples // 2),
            ),
        )
        reference, _ = exact.grams(lambda: exact.model.load().to(exact.device))  # type: ignore[arg-type]
        rows = [
            torch.tensor([self._rows(part).index(row) for row in exact._rows(part)]) for part in ("train", "validation")
        ]
        return {
            "train": len(rows[0]),
            "validation": len(rows[1]),
            **agreement(self.estimator, grams.select(*rows), reference),
        }

    def curvature(self, load: Callable[[], nn.Module]) -> tuple[LayerInfluences, bool]:
        """The influences of the samples under the estimator's own curvature, measured unless the store has them."""
        estimator: Any = self.estimator
        train, validation = self.samples()
        relative = estimator.damping_rule == "relative"
        description = self._description(ekfac=ekfac.VERSION, damping=[estimator.damping, estimator.damping_rule])

        def compute(key: str) -> LayerInfluences:
            model = load()
            layers = self._measured_layers(model)
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

    def _measured_layers(self, model: nn.Module) -> LayerMap:
        probe = self.probe
        return layer_map(model, scope=probe.scope, parameters=probe.parameters, skip_unsupported=probe.skip_unsupported)

    def _description(self, **measurement: Any) -> dict[str, Any]:
        """All that determines a measurement of the samples: what the store finds it by."""
        train, validation = self.samples()
        return {
            "loss": loss.VERSION,
            "model": self.model.fingerprint(),
            "scope": self.probe.scope,
            "parameters": self.probe.parameters,
            "skip_unsupported": self.probe.skip_unsupported,
            "train": _hash(train),
            "validation": _hash(validation),
            **measurement,
        }

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

    None where a half ranks nothing (all layers equal), and, with a warning, where a fixed step diverges on one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # zero gradients were named when the whole was scored
            first, second = (estimator.score(half).values for half in grams.halves)
    except Diverges as error:
        warnings.warn(f"no reliability: on a half of the samples {error}", RuntimeWarning, stacklevel=2)
        return None
    return rank_correlation(first, second)


def agreement(estimator: Estimator, grams: LayerGrams, reference: LayerGrams) -> dict[str, float]:
    """Spearman's rank correlation of the layer `scores`, and of the entries of each matrix's influence (their mean).

    estimator: one on Grams. Empty, with a warning, where its fixed step diverges on these Grams.
    """
    first, second = (estimator.solvable(each) for each in (grams, reference))  # type: ignore[attr-defined]
    try:
        ours, theirs = (estimator.influences(each.grams) for each in (first, second))  # type: ignore[attr-defined]
    except Diverges as error:
        warnings.warn(f"no fidelity: on the samples of the comparison {error}", RuntimeWarning, stacklevel=2)
        return {}
    influences = [rank_correlation(ours[name].flatten(), theirs[name].flatten()) for name in ours]
    ranked = [value for value in influences if value is not None]
    scores = rank_correlation(estimator.score(grams).values, estimator.score(reference).values)
    found = {"scores": scores, "influences": sum(ranked) / len(ranked) if ranked else None}
    return {name: value for name, value in found.items() if value is not None}


def rank_correlation(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> float | None:
    """Spearman's; None where either ranks nothing (all equal)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        found = float(spearmanr(first, second)[0])  # type: ignore[arg-type]
    return None if math.isnan(found) else found


def _hash(encodings: Encodings) -> str:
    """Of the token ids and of which of them count in the loss."""
    samples = [(sample.input_ids, sample.loss_from) for sample in encodings]
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()
