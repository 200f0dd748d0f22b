"""Everything that is measured of a model and the samples of a task, each once: the store keeps it.

With several processes all call the same and all receive the same, and the store is the first one's. Gradients are
measured by all of them together; spectra, activations and gates by the first.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from layerif.data.batches import Encoded, Encodings, batches, encode, padding_id
from layerif.data.render import Example
from layerif.data.task import Splits
from layerif.evidence import CheckpointGrams, LayerActivations, LayerGates, LayerGrams, LayerInfluences, LayerSpectra
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.models.pretrained import Pretrained
from layerif.probe import activations, ekfac, gates, spectra
from layerif.probe.grams.measure import measure
from layerif.probe.grams.processes import Shards, spread
from layerif.probe.grams.projection import Projection
from layerif.probe.settings import Probe
from layerif.probe.store import Store
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)

Load = Callable[[], nn.Module]

_WAIT = "another job has the lock"  # what the first process tells the others meanwhile


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Every kind of evidence, with whether the store had it.

    load, in every method that takes it: gives the model on its device, and is called only if something is measured.
    device: where models are measured. spread: the model does not fit one device, so its weights are divided among all
    processes for the gradients (FSDP); what the first process measures alone it measures in main memory then.
    num_processes: that will measure together, for what is said beforehand.
    """

    model: Pretrained
    tokenizer: Any
    splits: Splits
    probe: Probe
    store: Store
    seed: int = 0
    device: torch.device | str = "cpu"
    spread: bool = False
    num_processes: int = 1

    def layers(self) -> LayerMap:
        """All blocks with all their linear layers: what an allocation is spread over."""
        return self.model.layers()

    def samples(self) -> tuple[Encodings, Encodings]:
        """The samples that influence is measured on: a seeded choice of train and validation, never from test."""
        return self._samples

    @cached_property
    def _samples(self) -> tuple[Encodings, Encodings]:
        return self._encoded(self.chosen("train")), self._encoded(self.chosen("validation"))

    def chosen(self, part: str) -> list[Example]:
        """The rows of `train` or `validation` behind the samples, in their order."""
        examples = getattr(self.splits, part)
        return [examples[row] for row in self._rows(part)]

    def about(self) -> dict[str, str]:
        """What `layerif-store` shows of these measurements."""
        return {"model": Path(self.model.location()[0]).name}

    def grams(self, load: Load) -> tuple[LayerGrams, bool]:
        """The Grams of the samples."""
        projection = [self.probe.projection, self.probe.projection_seed] if self.probe.projection else None
        description = self._description(probe=VERSIONS["probe"], projection=projection)
        shards = Shards.current()
        if shards.rank > 0:
            while (found := shards.share(None)[0]) == _WAIT:
                pass
            return found or (self._measure(load, self.store.key(description)), False)

        def compute(key: str) -> LayerGrams:
            shards.share(None)  # nothing is stored: all begin to measure
            return self._measure(load, key)

        # Another job may hold the lock for longer than the other processes would wait without a word.
        store = replace(self.store, while_waiting=lambda: shards.share(_WAIT))
        grams, reused = store.grams(description, compute, about=self.about())
        if reused:
            shards.share((grams, reused))
            log.info("scores from the store: %s… was measured before, no gradient pass", grams.fingerprint[:12])
        return grams, reused

    def _measure(self, load: Load, key: str) -> LayerGrams:
        probe = self.probe
        model = spread(self.model.load(), self.device) if self._is_spread else load()
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

    def with_exact(self, grams: LayerGrams) -> tuple[LayerGrams, LayerGrams] | None:
        """The Grams of `probe.fidelity_samples` of the samples: out of `grams`, and measured exactly in float32.

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
        return grams.select(*rows), reference

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

    def curvature(self, load: Load, *, damping: float, damping_rule: str) -> tuple[LayerInfluences, bool]:
        """The influences of the samples under EK-FAC with this damping; by one process alone."""
        train, validation = self.samples()
        description = self._description(ekfac=VERSIONS["ekfac"], damping=[damping, damping_rule])

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
                damping=damping,
                relative=damping_rule == "relative",
                memory_gb=self.probe.memory_gb,
                fingerprint=key,
            )

        found, reused = self.store.influences(description, compute, about=self.about())
        if reused:
            log.info("scores from the store: %s… was measured before", found.fingerprint[:12])
        return found, reused

    def spectra(self, load: Load) -> tuple[LayerSpectra, bool]:
        """The spectra of all linear layers of the blocks."""
        layers = self.layers()
        tensors, key, reused = self._by_the_first(
            "spectra", lambda: spectra.spectra(self._merged(load), layers), spectra=VERSIONS["spectra"]
        )
        eigenvalues = {param: tensors[param] for params in layers.params for param in params}
        return LayerSpectra(layers, eigenvalues, tuple(tensors["seconds"].tolist()), key), reused

    def activations(self, load: Load, *, epsilon: float) -> tuple[LayerActivations, bool]:
        """What one forward pass over the train samples sees, the same for every estimator that takes it."""
        layers, model = self.layers(), cache(lambda: self._merged(load))
        right, wrong = self.samples()[0], self._wrong()
        tensors, key, reused = self._by_the_first(
            "activations",
            lambda: activations.observe(
                model(),
                layers,
                right,
                wrong,
                epsilon=epsilon,
                batch_size=self.probe.batch_size,
                pad_id=padding_id(self.tokenizer),
            ),
            activations=VERSIONS["activations"],
            epsilon=epsilon,
            samples=_hash([sample and (sample.input_ids, sample.prompt_length) for sample in (*right, *wrong)]),
        )
        seen = LayerActivations(
            layers=layers,
            input_square_norms={
                param: tensors[f"input_square_norms/{param}"] for params in layers.params for param in params
            },
            weight=lambda param: model().get_parameter(param),
            num_entries=int(tensors["num_entries"]),
            epsilon=epsilon,
            answers=tuple(example.labels[example.answer] for example in self.chosen("train")),
            fingerprint=key,
            **{name: tensors[name] for name in ("cosines", "variances", "sparsities", "prompts", "right", "wrong")},
        )
        return seen, reused

    def gates(
        self, load: Load, *, num_steps: int, samples_per_step: int, learning_rate: float, start: float
    ) -> tuple[LayerGates, bool]:
        """A gate per block, learned on the train samples with the adapter of the model frozen."""
        layers, train = self.layers(), self.samples()[0]
        settings = {
            "num_steps": num_steps,
            "samples_per_step": samples_per_step,
            "learning_rate": learning_rate,
            "start": start,
            "seed": self.seed,
        }
        cost = {"batch_size": self.probe.batch_size, "pad_id": padding_id(self.tokenizer)}
        tensors, key, reused = self._by_the_first(
            "gates",
            lambda: {"scores": gates.learn_gates(self._whole(load), layers, train, **settings, **cost)},
            gates=VERSIONS["gates"],
            loss=VERSIONS["loss"],
            train=_hash_of_samples(train),
            **settings,
        )
        return LayerGates(layers, tensors["scores"], key), reused

    def _by_the_first(
        self, kind: str, compute: Callable[[], dict[str, Tensor]], **determining: Any
    ) -> tuple[Mapping[str, Tensor], str, bool]:
        """Named tensors, their key and whether the store had them: the first process takes them and gives them to all.

        determining: all besides the model that determines them. The others wait in silence, no longer than the process
        group allows (30 minutes by default; `timeout` of Lightning's DDPStrategy and FSDPStrategy).
        """
        description = {"model": self.model.fingerprint(), **determining}
        shards = Shards.current()
        with shards.failing_together():
            is_first = shards.rank == 0
            taken = self.store.tensors(kind, description, compute, about=self.about()) if is_first else None
        tensors, key, reused = shards.share(taken)[0]
        if reused:
            log.info("scores from the store: %s %s… were taken before", kind, key[:12])
        return tensors, key, reused

    def _description(self, **measurement: Any) -> dict[str, Any]:
        """All that determines a measurement of the samples' gradients: what the store finds it by."""
        train, validation = self.samples()
        return {
            "loss": VERSIONS["loss"],
            "model": self.model.fingerprint(),
            "scope": self.probe.scope,
            "parameters": self.probe.parameters,
            "skip_unsupported": self.probe.skip_unsupported,
            "train": _hash_of_samples(train),
            "validation": _hash_of_samples(validation),
            **measurement,
        }

    def _measured_layers(self, model: nn.Module) -> LayerMap:
        probe = self.probe
        return layer_map(model, scope=probe.scope, parameters=probe.parameters, skip_unsupported=probe.skip_unsupported)

    @property
    def _is_spread(self) -> bool:
        return self.spread and Shards.current().size > 1

    def _whole(self, load: Load) -> nn.Module:
        """The model in one place, which is main memory where no device can hold it."""
        return self.model.load() if self._is_spread else load()

    def _merged(self, load: Load) -> nn.Module:
        """The whole model with its adapter in the weights; a copy then, so that the caller's keeps it apart."""
        if self.model.adapter is None:
            return self._whole(load)
        model: Any = self._whole(lambda: self.model.load().to(self.device))  # type: ignore[arg-type]
        return model.merge_and_unload()

    def _rows(self, part: str) -> list[int]:
        """Fewer are a subset of more."""
        order = list(range(len(getattr(self.splits, part))))
        Random(f"{self.seed} {part}").shuffle(order)
        return sorted(order[: getattr(self.probe, f"num_{part}")])

    def _wrong(self) -> list[Encoded | None]:
        """Each train sample with a wrong option in place of the right one, None where it has no other option."""
        examples = self.chosen("train")
        wrong = [[index for index in range(len(e.options)) if index != e.answer] for e in examples]
        changed = [
            replace(example, answer=Random(f"{self.seed} {example.id}").choice(others))
            for example, others in zip(examples, wrong, strict=True)
            if others
        ]
        encoded = iter(self._encoded(changed))
        return [next(encoded) if others else None for others in wrong]

    def _encoded(self, examples: Sequence[Example]) -> Encodings:
        probe = self.probe
        return encode(
            examples,
            self.tokenizer,
            template=probe.template,
            max_length=probe.max_length,
            loss_on=probe.loss_on,
            eos=False,
        )


def _hash_of_samples(encodings: Encodings) -> str:
    """Of the token ids and of which of them count in the loss."""
    return _hash([(sample.input_ids, sample.loss_from) for sample in encodings])


def _hash(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
