"""All retrainings of a report: the adapters, their Grams, and the losses with and without rows.

Every result is saved as soon as it is there, so that a killed run carries on from it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn
from tqdm import tqdm

from layerif.data.batches import padding_id
from layerif.decide import Decider
from layerif.diagnose.retrain import Recipe, Retrainer, losses
from layerif.evidence import LayerGrams
from layerif.files import whole
from layerif.models.blocks import layer_map
from layerif.probe.grams.request import Grams

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
        untrained = self._kept("untrained", lambda: self._losses(self.model()))
        for seed in self.seeds:
            self._train(seed)
        full = [self._read(seed) for seed in self.seeds]
        left_out = [[self._read(seed, number) for number in range(len(self.sets))] for seed in self.seeds]
        return np.array(untrained), np.array(full), np.array(left_out)

    def grams(self) -> dict[int, LayerGrams]:
        """Returns the Grams of the LoRA matrices at each seed's adapter, which was trained on all rows."""
        for seed in self.seeds:
            self._train(seed)
        return {seed: self._measure(seed, None) for seed in self.seeds}

    def _train(self, seed: int) -> None:
        """Does the missing trainings of one seed: first that on all rows, with its Grams, then those without a set."""
        rows: list[tuple[Path, Sequence[int]]] = [(self._file(seed), ())]
        rows += [(self._file(seed, number), left_out) for number, left_out in enumerate(self.sets)]
        missing = [(file, left_out) for file, left_out in rows if not file.exists()]
        if not missing:
            return
        base, (train, _) = self.model(), self.decider.samples()
        scope = self.decider.probe.scope
        params = layer_map(base, scope=scope).matrices
        targets = [param.removesuffix(".weight") for param in params]
        log.info("seed %d: %d of %d trainings to do", seed, len(missing), len(rows))
        retrainer = Retrainer(base, targets, train, padding_id(self.decider.tokenizer), self.recipe, seed)
        try:
            for file, left_out in tqdm(missing, desc=f"retraining, seed {seed}", disable=None, leave=False):
                model = retrainer(left_out)
                if not left_out:
                    self._save(retrainer, seed)
                    self._measure(seed, model)
                write(file, json.dumps(self._losses(model)))
        finally:
            retrainer.detach()

    def _losses(self, model: nn.Module) -> list[float]:
        _, validation = self.decider.samples()
        return losses(model, validation, self.decider.probe.batch_size, padding_id(self.decider.tokenizer))

    def _measure(self, seed: int, model: nn.Module | None) -> LayerGrams:
        """Returns the Grams at a saved adapter, measured on `model` if it is in memory and loaded otherwise."""
        at = replace(self.decider.model, adapter=str(self._adapter(seed)))

        def load() -> nn.Module:
            return at.load().to(self.decider.device) if model is None else model  # type: ignore[arg-type]

        return Grams().take(replace(self.decider, model=at), load)[0]

    def _save(self, retrainer: Retrainer, seed: int) -> None:
        folder, unfinished = self._adapter(seed), self._adapter(seed).with_suffix(".unfinished")
        for old in (folder, unfinished):
            shutil.rmtree(old, ignore_errors=True)
        retrainer.model.save_pretrained(str(unfinished), save_embedding_layers=False)
        unfinished.rename(folder)

    def _adapter(self, seed: int) -> Path:
        return self.work / f"adapter-{seed}"

    def _file(self, seed: int, number: int | None = None) -> Path:
        return self.work / (f"losses-{seed}.json" if number is None else f"losses-{seed}-without-{number}.json")

    def _read(self, seed: int, number: int | None = None) -> list[float]:
        return json.loads(self._file(seed, number).read_text())

    def _kept(self, name: str, compute: Callable[[], list[float]]) -> list[float]:
        file = self.work / f"losses-{name}.json"
        if not file.exists():
            write(file, json.dumps(compute()))
        return json.loads(file.read_text())


def write(file: Path, text: str) -> None:
    """Writes the file as a whole or not at all."""
    with whole(file) as unfinished:
        unfinished.write_text(text)
