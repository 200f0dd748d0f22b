"""TracIn (Pruthi et al., NeurIPS 2020): gradient dots summed over checkpoints of training. M, N, C: see `_base.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from layerif.checks import Positive, check_value
from layerif.estimators._base import GramEstimator, by_block, warn_of_zero_gradients
from layerif.evidence import CheckpointGrams, MatrixGram
from layerif.probe.checkpoints import CheckpointPasses
from layerif.scores import LayerScores


def tracin(val_trains: Sequence[Tensor], learning_rates: Sequence[float]) -> Tensor:
    """Gives I = −Σ_t η_t·C⁽ᵗ⁾ over checkpoints t.

    Args:
        val_trains: C (M×N) at each checkpoint.
        learning_rates: η at each checkpoint, above 0.

    Returns:
        I (M×N) in float64; negative is helpful.
    """
    check_value("estimator.learning_rates", learning_rates, Sequence[Positive])
    _check_lengths(learning_rates, len(val_trains))
    shapes = {tuple(val_train.shape) for val_train in val_trains}
    if len(shapes) > 1:
        raise ValueError(f"TracIn needs the same samples at every checkpoint, got val_train of {sorted(shapes)}")
    rates_T = torch.tensor(list(learning_rates), dtype=torch.float64)
    return -torch.einsum("t,tmn->mn", rates_T, torch.stack([val_train.double() for val_train in val_trains]))


@dataclass(frozen=True, kw_only=True)
class TracIn(GramEstimator):
    """Gradient dots summed over checkpoints. With one checkpoint it ranks as the gradient dot does there.

    MatrixOrBlock changes nothing, because TracIn is linear in the Gram.

    Attributes:
        checkpoints: folders that `save_pretrained` wrote during training, PEFT adapters or whole models. Each costs one
            gradient pass, and nothing once it is in the store.
        learning_rates: the optimiser's learning rate at each checkpoint, in the same order.
    """

    checkpoints: list[str]
    learning_rates: list[Positive]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_lengths(self.learning_rates, len(self.checkpoints))

    @property
    def needs(self) -> CheckpointPasses:  # type: ignore[override]
        return CheckpointPasses(tuple(self.checkpoints))

    def influence(self, gram: MatrixGram) -> Tensor:
        """Gives the part of one checkpoint per unit of its learning rate."""
        return tracin([gram.val_train], [1.0])

    def score(self, evidence: CheckpointGrams, /) -> LayerScores:
        names = evidence.checkpoints[0].grams
        # LoRA's A has no gradient where training starts: only zeros at every checkpoint are worth a warning.
        warn_of_zero_gradients({name: reduce(add, (at.grams[name] for at in evidence.checkpoints)) for name in names})
        return self.scores(self.by_layer(evidence), evidence.checkpoints[0].layers, evidence.fingerprint)

    def by_layer(self, evidence: CheckpointGrams, /) -> dict[str, Tensor]:
        solvable = [self.solvable(at) for at in evidence.checkpoints]
        layers = solvable[0].layers
        influences = {
            name: tracin([at.grams[name].val_train for at in solvable], self.learning_rates) for name in layers.matrices
        }
        return by_block(influences, layers)


def _check_lengths(learning_rates: Sequence[float], num_checkpoints: int) -> None:
    if num_checkpoints < 1 or len(learning_rates) != num_checkpoints:
        raise ValueError(
            f"estimator.learning_rates gives {len(learning_rates)} for {num_checkpoints} estimator.checkpoints; "
            "TracIn needs at least one checkpoint and one learning rate for each"
        )
