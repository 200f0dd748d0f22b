"""All retrainings of a report: the adapters, their Grams, and the losses with and without rows.

Every result is saved as soon as it is there, with a checksum, so that a killed run carries on from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from layerif.data.batches import padding_id
from layerif.decide import Decider
from layerif.diagnose.retrain import Recipe, Retrainer, losses
from layerif.evidence import LayerCurvature, LayerGrams
from layerif.files import hash_files, whole, write_text
from layerif.models.blocks import layer_map
from layerif.probe.curvature.request import Curvature
from layerif.probe.grams.request import Grams
from layerif.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Retrainings:
    """The retrainings of all seeds.

    Attributes:
        decider: its probe chooses the rows to train on, the rows to watch, and the matrices to adapt (its scope).
        recipe: the training of an adapter.
        seeds: the seeds of the adapters.
        sets: the rows that each retraining leaves out, the same for every seed.
        model: loads the bare model.
        work: the folder of the results. Work that is finished there is not done again.
    """

    decider: Decider
    recipe: Recipe
    seeds: Sequence[int]
    sets: Sequence[Sequence[int]]
    model: Callable[[], nn.Module]
    work: Path

    def losses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the losses of M validation rows: untrained (M), fully trained (E×M) and without each set (E×S×M)."""
        untrained = _read(self.work / "losses-untrained.json")
        if untrained is None:
            untrained = self._losses(self.model())
            _write(untrained, self.work / "losses-untrained.json")
        self._train_all()
        full = [self._kept(seed) for seed in self.seeds]
        left_out = [[self._kept(seed, number) for number in range(len(self.sets))] for seed in self.seeds]
        return np.array(untrained), np.array(full), np.array(left_out)

    def without(self, rows: Sequence[int]) -> np.ndarray:
        """Returns the losses of M validation rows, trained without these rows at every seed (E×M)."""
        name = hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:12]
        for seed in self.seeds:
            self._train(seed, {name: rows})
        return np.array([self._kept(seed, name) for seed in self.seeds])

    def grams(self) -> dict[int, LayerGrams]:
        """Returns the Grams of the LoRA matrices at each seed's adapter, which was trained on all rows."""
        self._train_all()
        return {seed: self._measure(seed, None) for seed in self.seeds}

    def curvatures(self, needs: Curvature) -> list[LayerCurvature]:
        """Returns the curvature of the LoRA matrices at each seed's adapter; the store does not keep it.

        A file of every validation row at every damping would be large, and it is measured within seconds.
        """
        self._train_all()
        return [needs.take(self._at(seed), self._loads(seed))[0] for seed in self.seeds]

    def _train_all(self) -> None:
        """Does the missing trainings: at each seed first that on all rows, with its Grams, then those without a set."""
        for seed in self.seeds:
            self._train(seed, {None: (), **dict(enumerate(self.sets))})

    def _train(self, seed: int, sets: Mapping[Any, Sequence[int]]) -> None:
        """Does the missing trainings of one seed, each without a set of rows; that of None is kept with its adapter."""
        missing = {number: left_out for number, left_out in sets.items() if self._kept(seed, number) is None}
        if not missing:
            return
        base, (train, _) = self.model(), self.decider.samples()
        scope = self.decider.probe.scope
        params = layer_map(base, scope=scope).matrices
        targets = [param.removesuffix(".weight") for param in params]
        log.info("seed %d: %d of %d trainings to do", seed, len(missing), len(sets))
        retrainer = Retrainer(base, targets, train, padding_id(self.decider.tokenizer), self.recipe, seed)
        try:
            for number, left_out in progress(missing.items(), f"retraining, seed {seed}"):
                model = retrainer(left_out)
                if number is None:
                    self._save(retrainer, seed)
                    self._measure(seed, model)
                _write(self._losses(model), self._file(seed, number), self._adapter_files(seed, number))
        finally:
            retrainer.detach()

    def _losses(self, model: nn.Module) -> list[float]:
        _, validation = self.decider.samples()
        return losses(model, validation, self.decider.probe.batch_size, padding_id(self.decider.tokenizer))

    def _measure(self, seed: int, model: nn.Module | None) -> LayerGrams:
        """Returns the Grams at a saved adapter, measured on `model` if it is in memory and loaded otherwise."""
        return Grams().take(self._at(seed), self._loads(seed) if model is None else lambda: model)[0]

    def _at(self, seed: int) -> Decider:
        """Returns the decider for the model with the saved adapter of this seed."""
        return replace(self.decider, model=replace(self.decider.model, adapter=str(self._adapter(seed))))

    def _loads(self, seed: int) -> Callable[[], nn.Module]:
        return lambda: self._at(seed).model.load().to(self.decider.device)  # type: ignore[arg-type]

    def _save(self, retrainer: Retrainer, seed: int) -> None:
        shutil.rmtree(self._adapter(seed), ignore_errors=True)
        with whole(self._adapter(seed)) as unfinished:
            retrainer.model.save_pretrained(str(unfinished), save_embedding_layers=False)

    def _adapter(self, seed: int) -> Path:
        return self.work / f"adapter-{seed}"

    def _file(self, seed: int, number: int | str | None = None) -> Path:
        return self.work / (f"losses-{seed}.json" if number is None else f"losses-{seed}-without-{number}.json")

    def _kept(self, seed: int, number: int | str | None = None) -> list[float] | None:
        return _read(self._file(seed, number), self._adapter_files(seed, number))

    def _adapter_files(self, seed: int, number: int | str | None) -> list[Path]:
        """Lists the files that are kept beside these losses: the adapter, if it was trained on all rows."""
        return sorted(self._adapter(seed).glob("*.*")) if number is None else []


def _write(losses: Sequence[float], file: Path, of: Sequence[Path] = ()) -> None:
    """Writes losses with a checksum of them and of the adapter's files that they belong to."""
    write_text(file, json.dumps({"losses": losses, "checksum": _checksum(losses, of)}))


def _read(file: Path, of: Sequence[Path] = ()) -> list[float] | None:
    """Reads what `_write` wrote; None where that is missing or damaged."""
    try:
        found = json.loads(file.read_bytes())
        if found["checksum"] != _checksum(found["losses"], of):
            raise ValueError("its checksum does not match its content")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{file} or its adapter is damaged and is trained again: {error}", stacklevel=2)
        return None
    return found["losses"]


def _checksum(losses: Sequence[float], of: Sequence[Path]) -> str:
    return hashlib.sha256((json.dumps(losses) + hash_files(of)).encode()).hexdigest()
