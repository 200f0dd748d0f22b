"""The place where the factors of a pass wait until all batches are through: memory or files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from layerif.files import is_intact, save_tensors
from layerif.probe.grams.factors import SIDES, Factors, Side


class Waiting(Protocol):
    """The place where the factors of a pass wait until all batches are through."""

    def has(self, number: int, params: Sequence[str], batch: Mapping[str, Tensor]) -> bool:
        """Tells if batch `number` is here already, from a pass that was interrupted."""
        ...

    def add(self, number: int, factors: Factors) -> None:
        """Keeps the factors of batch `number`."""
        ...

    def take(self, param: str, side: Side) -> Iterator[tuple[int, Tensor]]:
        """Gives one side of a matrix's factors with the number of each batch. It can be called once."""
        ...


@dataclass
class InMemory:
    """Keeps factors on the model's device, or moves them to main memory."""

    offload: bool = False
    _batches: dict[int, dict[tuple[str, Side], Tensor]] = field(default_factory=dict)

    def has(self, number: int, params: Sequence[str], batch: Mapping[str, Tensor]) -> bool:
        return False

    def add(self, number: int, factors: Factors) -> None:
        if self.offload:
            moved: dict[int, Tensor] = {}

            def move(values: Tensor) -> Tensor:
                if id(values) not in moved:  # pinned: the copy does not hold up the device
                    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                    moved[id(values)] = there.copy_(values, non_blocking=True)
                return moved[id(values)]

            factors = {param: (move(inputs), move(delta)) for param, (inputs, delta) in factors.items()}
        self._batches[number] = {
            (param, side): values for param, both in factors.items() for side, values in zip(SIDES, both, strict=True)
        }

    def take(self, param: str, side: Side) -> Iterator[tuple[int, Tensor]]:
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()
        for number in sorted(self._batches):
            yield number, self._batches[number].pop((param, side))


@dataclass
class OnDisk:
    """Keeps factors in files, one per batch, named by everything that they depend on within their measurement.

    An interrupted pass leaves the files of its finished batches; the next one does not run those again.
    """

    folder: Path
    _files: dict[int, Path] = field(default_factory=dict)

    def has(self, number: int, params: Sequence[str], batch: Mapping[str, Tensor]) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = [batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")]
        name = hashlib.sha256(json.dumps([list(params), *tensors]).encode()).hexdigest()[:32]
        file = self._files[number] = self.folder / f"tile-{name}.safetensors"
        return is_intact(file, "its batch runs again")

    def add(self, number: int, factors: Factors) -> None:
        tensors: dict[str, Tensor] = {}
        inputs_of: dict[str, str] = {}
        names: dict[int, str] = {}
        for param, (inputs, delta) in factors.items():
            inputs_of[param] = names.setdefault(id(inputs), f"{param}/input")
            tensors[inputs_of[param]] = inputs
            tensors[f"{param}/delta"] = delta
        file = self._files[number]
        advice = "free some space, set store=/another/folder, or probe.offload=none (several passes)"
        # A power cut may cost some batches: waiting for the disk would take longer than writing.
        save_tensors(tensors, file, {"inputs_of": json.dumps(inputs_of)}, advice=advice, durable=False)

    def take(self, param: str, side: Side) -> Iterator[tuple[int, Tensor]]:
        for number in sorted(self._files):
            with safe_open(self._files[number], framework="pt") as opened:
                inputs = json.loads(opened.metadata()["inputs_of"])[param]
                yield number, opened.get_tensor(inputs if side == "in" else f"{param}/delta")
