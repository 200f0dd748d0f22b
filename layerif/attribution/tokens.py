"""The influence of one train row on one validation row, split over the tokens of the train row.

Influence is linear in the gradient of the train row, and that is a sum over its tokens, g = Σ_u δ_u a_uᵀ. So every
token has a share, and the shares add up to the influence. A share belongs to the position that the gradient flows
through: it holds what this token's representation does to all losses of later tokens, too.

Letters in shape suffixes: S samples (N train, then one validation sample), T tokens of a sample, U tokens of the train
row, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from layerif.data.batches import batches
from layerif.estimators._base import GramEstimator
from layerif.evidence import CrossGram, LayerGrams
from layerif.models.contexts import full_precision
from layerif.models.loss import per_sample_loss
from layerif.probe.grams.factors import inputs_read_together
from layerif.probe.grams.gather import Found, Gathering, workload
from layerif.probe.grams.passes import Matrix, Passes
from layerif.probe.grams.processes import Shards
from layerif.probe.grams.projection import Projection
from layerif.probe.measurements import Measurements

_AT_ONCE = 32  # samples
_OFF = 0.01  # relative distance of the sum from the influence that is worth a warning


@dataclass(frozen=True)
class TokenShares:
    """The share of each token in the influence of a train row on a validation row.

    Attributes:
        train: the id of the train row.
        validation: the id of the validation row.
        tokens: the pieces of text.
        shares: one for each token; negative is helpful.
    """

    train: str
    validation: str
    tokens: tuple[str, ...]
    shares: tuple[float, ...]

    @property
    def influence(self) -> float:
        """The sum of the shares."""
        return sum(self.shares)


def token_shares(
    measurements: Measurements,
    estimator: GramEstimator,
    grams: LayerGrams,
    model: nn.Module,
    train: int,
    validation: int,
) -> TokenShares:
    """Splits the influence of a train sample on a validation sample over the tokens of the train sample.

    Args:
        measurements: of these Grams.
        estimator: gives the influence.
        grams: the Grams of the samples.
        model: the model that they were measured on.
        train: the position of the train sample.
        validation: the position of the validation sample.
    """
    crosses = _products(measurements, estimator, grams, model, train, validation)
    solvable = estimator.solvable(grams)
    blocks = grams.layers.by_block if estimator.granularity == "block" else None
    share_U = torch.zeros(next(iter(crosses.values())).shape[1], dtype=torch.float64)
    influence = 0.0
    for name, gram in solvable.grams.items():
        cross_SU = crosses[name] if blocks is None else reduce(add, (crosses[param] for param in blocks[name]))
        one = gram.select(slice(None), torch.tensor([validation]))
        norm_U = gram.train_train[train, train].sqrt().expand(len(share_U))
        share_U += estimator.influence_of(one, CrossGram(cross_SU[:-1], cross_SU[-1:], norm_U))[0]
        influence += float(estimator.influence(one)[0, train])
    sample = measurements.samples()[0][train]
    share_U = share_U[: len(sample)]
    if abs(float(share_U.sum()) - influence) > _OFF * float(share_U.abs().sum()):
        warnings.warn(
            f"the shares of the tokens add up to {float(share_U.sum()):.3g}, and the influence is {influence:.3g}: "
            "this is rounding; measure in a higher precision (model.dtype=float64), or take a larger estimator.damping",
            RuntimeWarning,
            stacklevel=2,
        )
    return TokenShares(
        train=measurements.chosen("train")[train].id,
        validation=measurements.chosen("validation")[validation].id,
        tokens=_pieces(measurements.tokenizer, sample.input_ids),
        shares=tuple(share_U.tolist()),
    )


def _products(
    measurements: Measurements,
    estimator: GramEstimator,
    grams: LayerGrams,
    model: nn.Module,
    train: int,
    validation: int,
) -> Mapping[str, Tensor]:
    """Multiplies the gradients of all train samples and of the validation sample with those of single tokens (S×U).

    Where the estimator reads no products between train samples, S is the two samples of the pair.
    """
    probe, (trained, validated) = measurements.probe, measurements.samples()
    others = [train] if estimator.reads == "diagonal" else range(len(trained))
    samples = [*(trained[index] for index in others), validated[validation]]
    own = list(others).index(train)
    batched = list(batches(samples, probe.batch_size, measurements.pad_id))
    names = [*(measurements.names("train")[index] for index in others), measurements.names("validation")[validation]]
    shards = Shards.current()

    def multiply(passes: Passes, matrix: Matrix, input_STI: Tensor, delta_SOT: Tensor) -> Found:
        input_UI, delta_OU = input_STI[own], delta_SOT[own]
        with full_precision():
            parts = [
                (some_STI @ input_UI.mT * (some_SOT.mT @ delta_OU)).sum(dim=1)
                for some_STI, some_SOT in zip(input_STI.split(_AT_ONCE), delta_SOT.split(_AT_ONCE), strict=True)
            ]
        return {"cross": torch.cat(parts)}

    projection = Projection(probe.projection, probe.projection_seed) if probe.projection else None
    gathering = Gathering(
        model, batched, names, projection, shards=shards, loss=measurements.loss or per_sample_loss, kind="tokens"
    )
    found = gathering.each(
        grams.layers.matrices,
        multiply,
        lambda todo: workload(model, todo, batched, [], inputs_read_together(model, todo), projection, shards.size),
        memory_gb=probe.memory_gb,
        offload=probe.offload if probe.offload != "disk" else "auto",
    )
    return {param: each["cross"].double() for param, each in found.items()}


def _pieces(tokenizer: Any, ids: tuple[int, ...]) -> tuple[str, ...]:
    """Spells every token; without a tokenizer by its number."""
    if tokenizer is None:
        return tuple(f"{id} " for id in ids)
    return tuple(tokenizer.decode([id]) for id in ids)
