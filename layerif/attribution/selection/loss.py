"""`selection=loss`: the rows that the model as it is finds hardest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from layerif.attribution.selection import Pool, RankedSelection
from layerif.data.batches import Encoded
from layerif.data.rows import IGNORED
from layerif.probe.measurements import Load
from layerif.probe.token_losses import stored_token_losses


@dataclass(frozen=True, kw_only=True)
class HighestLoss(RankedSelection):
    """Takes the rows of the highest loss before fine-tuning, as a mean over the tokens that fine-tuning counts."""

    def values(self, pool: Pool, load: Load) -> list[float]:
        losses = stored_token_losses(pool.measurements, load, pool.encodings)
        return [mean_of_counted(of_row, sample) for of_row, sample in zip(losses, pool.encodings, strict=True)]


def mean_of_counted(losses: Tensor, sample: Encoded) -> float:
    """Gives the mean loss of the tokens of a sample that training counts.

    Args:
        losses: of every token but the first.
        sample: says which tokens count.
    """
    counted: Sequence[float] = [
        loss for loss, label in zip(losses.tolist(), sample.labels[1:], strict=True) if label != IGNORED
    ]
    return sum(counted) / len(counted)
