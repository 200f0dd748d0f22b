"""The model, the samples and the store: everything that measurements of all kinds share.

With several processes all of them call the same functions and receive the same results, and the store belongs to the
first one. All processes measure gradients together; the first one takes every other measurement alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layerif.data.batches import Encodings, encode, padding_id
from layerif.data.rows import AnyExample
from layerif.data.task import Splits
from layerif.layers import LayerMap
from layerif.models.blocks import in_scope, layer_map
from layerif.models.loaded import Loaded
from layerif.models.loss import Loss, NamedLoss
from layerif.models.pretrained import Pretrained
from layerif.probe.grams.processes import Shards, spread
from layerif.probe.settings import Probe
from layerif.probe.store import MeasurementKind, Store, Unstored, fingerprint
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)

T = TypeVar("T")
Load = Callable[[], nn.Module]

_WAIT = "another job has the lock"  # the first process tells it to the others as long as it waits


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """A model and the samples of a task, with the store that keeps their measurements.

    Attributes:
        model: the model, not loaded yet.
        tokenizer: its tokenizer.
        splits: the rows that samples are chosen from.
        probe: the settings of the probe.
        store: keeps every measurement, so that it is made once; None keeps nothing.
        seed: of the choice of samples.
        device: the device on which models are measured.
        spread: True where the model does not fit one device. Its weights are then divided among all processes for the
            gradients (FSDP), and the first process takes its own measurements in main memory.
        num_processes: the processes that will measure together, for estimates.
        loss: gives the loss of each sample, in place of its mean loss over tokens.
    """

    model: Pretrained | Loaded
    tokenizer: Any
    splits: Splits
    probe: Probe
    store: Store | Unstored
    seed: int = 0
    device: torch.device | str = "cpu"
    spread: bool = False
    num_processes: int = 1
    loss: Loss | None = None

    def layers(self) -> LayerMap:
        """Gives all blocks with all their linear layers: an allocation is spread over these."""
        return self.model.layers()

    def samples(self) -> tuple[Encodings, Encodings]:
        """Gives a seeded choice of train and validation samples, never of test samples."""
        return self._samples

    @cached_property
    def _samples(self) -> tuple[Encodings, Encodings]:
        return self.encoded(self.chosen("train")), self.encoded(self.chosen("validation"))

    def chosen(self, part: str) -> list[AnyExample]:
        """Gives the rows of `train` or `validation` behind the samples, in their order."""
        examples = getattr(self.splits, part)
        return [examples[row] for row in self.rows(part)]

    def names(self, part: str) -> list[str]:
        """Names the chosen rows for messages; an id that begins with the part, as `train 4` does, says it already."""
        ids = [example.id for example in self.chosen(part)]
        return [f"row {id}" if id.startswith((part, "rows ")) else f"{part} row {id}" for id in ids]

    def rows(self, part: str) -> list[int]:
        """Gives the positions of the chosen rows in their split. A smaller choice is a subset of a larger one."""
        order = list(range(len(getattr(self.splits, part))))
        Random(f"{self.seed} {part}").shuffle(order)
        return sorted(order[: getattr(self.probe, f"num_{part}")])

    def encoded(self, examples: Sequence[AnyExample]) -> Encodings:
        """Turns rows into token ids as the probe reads them."""
        probe = self.probe
        return encode(
            examples,
            self.tokenizer,
            template=probe.template or "plain",
            max_length=probe.max_length,
            loss_on=probe.loss_on,
            eos=False,
        )

    @property
    def pad_id(self) -> int:
        """The token id that fills batches up."""
        return padding_id(self.tokenizer)

    def about(self) -> dict[str, str]:
        """Gives the entries that `layerif-store` shows for these measurements."""
        return {"model": Path(self.model.location()[0]).name}

    @property
    def loss_name(self) -> Any:
        """The part of a description that says which loss is measured."""
        return [self.loss.name, self.loss.version] if isinstance(self.loss, NamedLoss) else VERSIONS["loss"]

    def description(self, **measurement: Any) -> dict[str, Any]:
        """Describes a measurement of the samples' gradients by all that determines it; the store finds it by this."""
        train, validation = self.samples()
        return {
            "loss": self.loss_name,
            "model": self.model.fingerprint(),
            "scope": self.probe.scope,
            "parameters": self.probe.parameters,
            "skip_unsupported": self.probe.skip_unsupported,
            "matrices": self.hash_of_matrices,
            "train": hash_of_samples(train),
            "validation": hash_of_samples(validation),
            **measurement,
        }

    @property
    def hash_of_matrices(self) -> str:
        """The hash of the names of the matrices in scope, because what a scope takes may change with this package."""
        layers = self.layers()
        inside = (
            (param, param.removeprefix(f"{name}."))
            for name, each in zip(layers.names, layers.params, strict=True)
            for param in each
        )
        return fingerprint({"names": [param for param, name in inside if in_scope(name, self.probe.scope)]})

    def by_the_first(
        self,
        kind: MeasurementKind[Mapping[str, Tensor]],
        compute: Callable[[], Mapping[str, Tensor]],
        **determining: Any,
    ) -> tuple[Mapping[str, Tensor], str, bool]:
        """Lets the first process take named tensors and give them to all.

        The other processes wait without a message, no longer than the process group allows (30 minutes by default;
        `timeout` of Lightning's DDPStrategy and of `layerif.adapt.strategy.ShardedBase`).

        Args:
            kind: the kind of measurement.
            compute: takes the tensors.
            determining: everything besides the model that determines the tensors.

        Returns:
            The tensors, their key, and whether the store had them.
        """
        description = {"model": self.model.fingerprint(), **determining}
        shards = Shards.current()
        taken = None
        with shards.failing_together():
            if shards.rank == 0:
                taken = self.store.kept(kind, description, lambda key: compute(), about=self.about())
        tensors, reused = shards.share(taken)[0]
        key = self.store.key(description)
        if reused:
            log.info("scores from the store: %s %s… were taken before", kind.folder, key[:12])
        return tensors, key, reused

    def by_all(
        self, kind: MeasurementKind[T], description: Mapping[str, Any], measure: Callable[[str], T]
    ) -> tuple[T, bool]:
        """Lets all processes measure together, unless the store has the measurement, which the first one asks.

        Args:
            kind: the kind of measurement.
            description: everything that determines the measurement.
            measure: makes it, given its key; called in every process, or in none.

        Returns:
            The measurement, and whether the store had it.
        """
        shards = Shards.current()
        if shards.rank > 0:
            while (told := shards.share(None)[0]) == _WAIT:
                pass
            return (measure(self.store.key(description)), False) if told is None else (told, True)

        def compute(key: str) -> T:
            shards.share(None)  # all begin to measure
            return measure(key)

        # Another job may hold the lock for longer than the other processes would wait without a message.
        store = replace(self.store, while_waiting=lambda: shards.share(_WAIT))
        found, reused = store.kept(kind, description, compute, about=self.about())
        if reused:
            shards.share(found)
        return found, reused

    def divided(self, load: Load) -> nn.Module:
        """Gives the model as all processes measure it: its weights spread over them where no device can hold it."""
        return spread(self.model.load(), self.device) if self.is_spread else load()

    def measured_layers(self, model: nn.Module) -> LayerMap:
        """Gives the blocks with the matrices that the probe measures."""
        probe = self.probe
        return layer_map(model, scope=probe.scope, parameters=probe.parameters, skip_unsupported=probe.skip_unsupported)

    def check_adapter_of_lora(self) -> None:
        """Refuses `probe.parameters=lora` for a model without an adapter."""
        if self.probe.parameters == "lora" and self.model.adapter is None:
            raise ValueError(
                "probe.parameters=lora needs a LoRA adapter; give it with model.adapter=/folder, "
                "or measure probe.parameters=weights"
            )

    @property
    def is_half_precision(self) -> bool:
        """Tells if the model computes in bfloat16 or float16."""
        return self.model.dtype in ("bfloat16", "float16")

    @property
    def is_spread(self) -> bool:
        """Tells if the model's weights are spread over several processes."""
        return self.spread and Shards.current().size > 1

    def whole(self, load: Load) -> nn.Module:
        """Gives the model in one place: main memory where no device can hold it."""
        return self.model.copy() if self.is_spread else load()

    def merged(self, load: Load) -> nn.Module:
        """Gives the whole model with its adapter in the weights, as a copy if there is an adapter."""
        if self.model.adapter is None:
            return self.whole(load)
        if scheme := self.model.quantisation:
            raise ValueError(
                f"this estimator reads the weights with the adapter merged into them, and the base is quantised "
                f"({scheme}), which merging would round anew; use one on gradients, such as datainf, or "
                "model.quantised=none"
            )
        model: Any = self.whole(lambda: self.model.copy().to(self.device))  # type: ignore[arg-type]
        return model.merge_and_unload()


def hash_of_samples(encodings: Encodings) -> str:
    """Hashes the token ids, and which of them count in the loss."""
    return hash_of(
        [(sample.input_ids, sample.loss_from if sample.counted is None else sample.counted) for sample in encodings]
    )


def hash_of(plain: Any) -> str:
    """Gives the SHA-256 of the JSON of plain values."""
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
