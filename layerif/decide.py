"""From a model and a task to scores and an allocation, by way of the evidence the estimator needs."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from layerif import activations, gates, loss, probe, spectra
from layerif.allocate import Allocation
from layerif.data.batches import Encoded, Encodings, batches, encode, padding_id
from layerif.data.task import Example, Splits
from layerif.estimators import Estimator
from layerif.estimators.avss import Avss
from layerif.evidence import LayerActivations, LayerGates, LayerSpectra
from layerif.layers import CheckpointGrams, LayerGrams, LayerMap
from layerif.models import Pretrained, layer_map
from layerif.probe import Probe, measure
from layerif.scores import LayerScores
from layerif.store import Store

log = logging.getLogger(__name__)

Allocator = Callable[[LayerScores, LayerMap], Allocation]


@dataclass(frozen=True)
class Decision:
    """Scores and allocation, and what it took to get them.

    scores: None where the allocator looks at none. num_samples: (train, validation) samples behind the scores, 0
    where the estimator needs none; num_truncated of them were cut at `probe.max_length`. reused: the evidence was in
    the store. seconds: evidence, score, allocate. reliability: Spearman's rank correlation of the scores of two
    disjoint halves of the samples; None where the evidence is not kept sample by sample. notes: for the record.
    """

    scores: LayerScores | None
    allocation: Allocation
    seconds: dict[str, float]
    num_samples: tuple[int, int] = (0, 0)
    num_truncated: int = 0
    reused: bool = False
    reliability: float | None = None
    notes: tuple[str, ...] = ()


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
        # What the estimator needs -> how it is taken.
        taken: dict[str, Callable[[Callable[[], nn.Module]], tuple[Any, bool]]] = {
            "nothing": lambda _: (everything, False),
            "grams": self.grams,
            "checkpoints": lambda _: self.checkpoint_grams(self.estimator.checkpoints),  # type: ignore[attr-defined]
            "weights": self.spectra,
            "activations": self.activations,
            "training": self.gates,
        }
        evidence, reused = taken[self.estimator.needs](load or self.model.load)
        measured = time.perf_counter()
        scores = self.estimator.score(evidence)
        scored = time.perf_counter()
        allocation = self.allocator(scores, everything)
        seconds = {
            "evidence": measured - start,
            "score": scored - measured,
            "allocate": time.perf_counter() - scored,
        }
        if self.estimator.needs in ("nothing", "weights"):
            return Decision(scores, allocation, seconds, reused=reused, notes=getattr(evidence, "notes", ()))
        train, validation = self.samples()
        if not hasattr(evidence, "select"):  # a look at train samples that cannot be taken apart again
            return Decision(scores, allocation, seconds, (len(train), 0), train.num_truncated, reused)
        num_truncated = train.num_truncated + validation.num_truncated
        reliability = split_half(self.estimator, evidence) if min(len(train), len(validation)) > 1 else None
        return Decision(scores, allocation, seconds, (len(train), len(validation)), num_truncated, reused, reliability)

    def layers(self) -> LayerMap:
        """All blocks with all their linear layers: what an allocation is spread over."""
        return layer_map(self.model.skeleton(), scope="all", skip_unsupported=True)

    def rehearse(self, layers: LayerMap) -> Allocation:
        """The allocation of equal scores: what is impossible fails here, before any pass over the data."""
        if self.estimator.needs == "grams" and self.probe.parameters == "lora" and self.model.adapter is None:
            raise ValueError(
                "probe.parameters=lora needs a LoRA adapter; give it with model.adapter=/folder, "
                "or measure probe.parameters=weights"
            )
        if self.estimator.needs == "training" and self.model.adapter is None:
            raise ValueError(
                "estimator=ila weighs what a fine-tune changed and needs its adapter; train one (for example "
                "method=lora allocator=rank) and give its folder with model.adapter=/run/adapter method=none"
            )
        if self.estimator.needs == "nothing":
            self.estimator.score(layers)
        equal = LayerScores(layers.names, (1.0,) * len(layers.names), "undertrained", "equal", "none")
        return self.allocator(equal, layers)

    def samples(self) -> tuple[Encodings, Encodings]:
        """The samples that influence is measured on: a seeded choice of train and validation, never from test."""
        return self._encoded(self._chosen("train")), self._encoded(self._chosen("validation"))

    def _encoded(self, examples: Sequence[Example]) -> Encodings:
        return encode(
            examples,
            self.tokenizer,
            template=self.probe.template,
            max_length=self.probe.max_length,
            loss_on=self.probe.loss_on,
            eos=False,
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

        grams, reused = self.store.grams(description, compute)
        if reused:
            log.info("scores from the store: %s… was measured before, no gradient pass", grams.fingerprint[:12])
        return grams, reused

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

    def spectra(self, load: Callable[[], nn.Module]) -> tuple[LayerSpectra, bool]:
        """The spectra of all linear layers of the blocks."""
        layers = self.layers()
        description = {"spectra": spectra.VERSION, "model": self.model.fingerprint()}
        tensors, key, reused = self.store.tensors(
            "spectra", description, lambda: spectra.spectra(self._merged(load), layers)
        )
        eigenvalues = {param: tensors[param] for params in layers.params for param in params}
        return LayerSpectra(layers, eigenvalues, tuple(tensors["seconds"].tolist()), key), reused

    def activations(self, load: Callable[[], nn.Module]) -> tuple[LayerActivations, bool]:
        """What one forward pass over the train samples sees, the same for every estimator that takes it."""
        layers, model = self.layers(), cache(lambda: self._merged(load))
        right, wrong = self.samples()[0], self._wrong()
        # Only `avss` counts below a bound of its own; all others share the pass with its default.
        epsilon = getattr(self.estimator, "epsilon", Avss.epsilon)
        description = {
            "activations": activations.VERSION,
            "model": self.model.fingerprint(),
            "epsilon": epsilon,
            "samples": _hash_of([sample and (sample.input_ids, sample.prompt_length) for sample in (*right, *wrong)]),
        }
        tensors, key, reused = self.store.tensors(
            "activations",
            description,
            lambda: activations.observe(
                model(),
                layers,
                right,
                wrong,
                epsilon=epsilon,
                batch_size=self.probe.batch_size,
                pad_id=padding_id(self.tokenizer),
            ),
        )
        seen = LayerActivations(
            layers=layers,
            input_square_norms={
                param: tensors[f"input_square_norms/{param}"] for params in layers.params for param in params
            },
            weight=lambda param: model().get_parameter(param),
            num_entries=int(tensors["num_entries"]),
            epsilon=epsilon,
            answers=tuple(example.labels[example.answer] for example in self._chosen("train")),
            fingerprint=key,
            **{name: tensors[name] for name in ("cosines", "variances", "sparsities", "prompts", "right", "wrong")},
        )
        return seen, reused

    def gates(self, load: Callable[[], nn.Module]) -> tuple[LayerGates, bool]:
        """A gate per block, learned on the train samples with the adapter of the model frozen."""
        layers, train = self.layers(), self.samples()[0]
        settings = {name: getattr(self.estimator, name) for name in ("num_steps", "learning_rate", "start")}
        description = {
            "gates": gates.VERSION,
            "loss": loss.VERSION,
            "model": self.model.fingerprint(),
            "train": _hash(train),
            "batch_size": self.probe.batch_size,
            "seed": self.seed,
            **settings,
        }
        chosen = [batch for _, batch in batches(train, self.probe.batch_size, padding_id(self.tokenizer))]
        tensors, key, reused = self.store.tensors(
            "gates",
            description,
            lambda: {"scores": gates.learn_gates(load(), layers, chosen, seed=self.seed, **settings)},
        )
        return LayerGates(layers, tensors["scores"], key), reused

    def _merged(self, load: Callable[[], nn.Module]) -> nn.Module:
        """The model with its adapter in the weights; a copy then, so that the caller's keeps it apart."""
        if self.model.adapter is None:
            return load()
        model: Any = self.model.load().to(self.device)  # type: ignore[arg-type]
        return model.merge_and_unload()

    def _wrong(self) -> list[Encoded | None]:
        """Each train sample with a wrong option in place of the right one, None where it has no other option."""
        examples = self._chosen("train")
        wrong = [[index for index in range(len(e.options)) if index != e.answer] for e in examples]
        changed = [
            replace(example, answer=Random(f"{self.seed} {example.id}").choice(others))
            for example, others in zip(examples, wrong, strict=True)
            if others
        ]
        encoded = iter(self._encoded(changed))
        return [next(encoded) if others else None for others in wrong]


def split_half(estimator: Estimator, grams: LayerGrams | CheckpointGrams) -> float | None:
    """Do disjoint samples rank the layers alike? Spearman of every other sample's scores against the others'.

    None where a half ranks nothing (all layers equal).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # zero gradients were named when the whole was scored
        halves = [grams.select(half, half) for half in (slice(0, None, 2), slice(1, None, 2))]
        first, second = (estimator.score(half).values for half in halves)
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second)[0])  # type: ignore[arg-type]


def _hash(encodings: Encodings) -> str:
    """Of the token ids and of which of them count in the loss."""
    return _hash_of([(sample.input_ids, sample.loss_from) for sample in encodings])


def _hash_of(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
