"""TracIn (Pruthi et al., NeurIPS 2020): gradient dots summed over checkpoints of training. M, N, C: see `gram.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar

import torch
from torch import Tensor

from layerif.estimators._base import GramEstimator, by_block, warn_of_zero_gradients
from layerif.evidence import CheckpointGrams, MatrixGram
from layerif.scores import LayerScores


def tracin(val_trains: Sequence[Tensor], learning_rates: Sequence[float]) -> Tensor:
    """I = −Σ_t η_t·C⁽ᵗ⁾ over checkpoints t: (M×N), float64. Negative: helpful.

    val_trains: C at each checkpoint; learning_rates: η at each, finite and > 0.
    """
    _check_rates(learning_rates, len(val_trains))
    shapes = {tuple(val_train.shape) for val_train in val_trains}
    if len(shapes) > 1:
        raise ValueError(f"TracIn needs the same samples at every checkpoint, got val_train of {sorted(shapes)}")
    rates_T = torch.tensor(list(learning_rates), dtype=torch.float64)
    return -torch.einsum("t,tmn->mn", rates_T, torch.stack([val_train.double() for val_train in val_trains]))


@dataclass(frozen=True, kw_only=True)
class TracIn(GramEstimator):
    """checkpoints: folders written by `save_pretrained` in training, PEFT adapters or whole models. Each costs one
        gradient pass, and none once it is in the store.
    learning_rates: the optimiser's at each checkpoint, in the same order.

    With one checkpoint it ranks as gradient dot does there. Granularity changes nothing: it is linear in the Gram.
    """

    needs: ClassVar[str] = "checkpoints"

    checkpoints: list[str]
    learning_rates: list[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rates(self.learning_rates, len(self.checkpoints))

    def influence(self, gram: MatrixGram) -> Tensor:
        """What one checkpoint adds per unit of its learning rate."""
        return tracin([gram.val_train], [1.0])

    def score(self, evidence: CheckpointGrams, /) -> LayerScores:
        names = evidence.checkpoints[0].grams
        # LoRA's A has no gradient where training starts: only zeros at every checkpoint are worth a warning.
        warn_of_zero_gradients({name: reduce(add, (at.grams[name] for at in evidence.checkpoints)) for name in names})
        solvable = [self.solvable(at) for at in evidence.checkpoints]
        layers = solvable[0].layers
        influences = {
            name: tracin([at.grams[name].val_train for at in solvable], self.learning_rates)
            for params in layers.params
            for name in params
        }
        return self.scores(by_block(influences, layers), layers, evidence.fingerprint)


def _check_rates(learning_rates: Sequence[float], num_checkpoints: int) -> None:
    if num_checkpoints < 1 or len(learning_rates) != num_checkpoints:
        raise ValueError(
            f"estimator.learning_rates gives {len(learning_rates)} for {num_checkpoints} estimator.checkpoints; "
            "TracIn needs at least one checkpoint and one learning rate for each"
        )
    for rate in learning_rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(
                f"estimator.learning_rates must be finite and > 0, got {rate}; leave out checkpoints that weigh nothing"
            )
