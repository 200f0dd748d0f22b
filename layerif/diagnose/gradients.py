"""The health of the gradients: their size, the dead matrices, and the distance of the model from an optimum.

All gradients are finite here, because the probe refuses others and names their matrix and sample.

Influence theory starts where the mean training gradient is zero. With K = G Gᵀ (N×N) summed over the matrices,

    common = mean of K off its diagonal / mean of K on its diagonal

is the share of the gradients' squared length that all samples have in common. It estimates ‖E g‖²/E‖g‖², and is 0 at
an optimum of the training loss and 1 where every sample pulls the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import norm
from torch import Tensor

from layerif.evidence import LayerGrams
from layerif.stats import LEVEL, UNDETERMINED, Estimate


@dataclass(frozen=True)
class Gradients:
    """The figures of the gradients of one model.

    Attributes:
        train_norms, val_norms: the root mean square of ‖g‖ over samples, by matrix.
        dead: the matrices whose gradient is zero for every train sample or for every validation sample.
        common: the share of the squared length that all train samples have in common.
        length: ‖mean g‖ divided by the root mean square of ‖g‖.
        chance: 1/√N, the `length` that sampling alone would leave at an optimum.
    """

    train_norms: dict[str, float]
    val_norms: dict[str, float]
    dead: list[str]
    common: Estimate
    length: float
    chance: float


def gradient_health(grams: LayerGrams) -> Gradients:
    """Reads the figures of the gradients off their Grams."""
    train_norms, val_norms, dead = {}, {}, []
    num_train = len(next(iter(grams.grams.values())).train_train)
    total_NN = torch.zeros(num_train, num_train, dtype=torch.float64)
    for name, gram in grams.grams.items():
        train_norms[name] = math.sqrt(max(0.0, float(gram.train_train.double().diagonal().mean())))
        val_norms[name] = math.sqrt(float(gram.val_norms.double().square().mean()))
        if not (gram.train_train.any() and gram.val_norms.any()):
            dead.append(name)
        total_NN += gram.train_train
    if not total_NN.any():
        return Gradients(train_norms, val_norms, dead, UNDETERMINED, math.nan, 1 / math.sqrt(num_train))
    length = math.sqrt(max(0.0, float(total_NN.mean())) / float(total_NN.diagonal().mean()))
    return Gradients(train_norms, val_norms, dead, common_share(total_NN), length, 1 / math.sqrt(num_train))


def common_share(gram_NN: Tensor) -> Estimate:
    """Returns `common` of a Gram (N×N) with its jackknife interval; undetermined below three samples.

    A bootstrap would not do: it draws samples twice and would take a gradient's product with itself for agreement.
    """
    num = len(gram_NN)
    if num < 3:
        return UNDETERMINED
    gram_NN = gram_NN.double()
    diagonal_N = gram_NN.diagonal()
    total, trace = gram_NN.sum(), diagonal_N.sum()
    share = float((total - trace) / (num - 1) / trace)
    left_total_N = total - 2 * gram_NN.sum(dim=1) + diagonal_N  # each sample left out in turn
    left_trace_N = trace - diagonal_N
    if bool((left_trace_N <= 0).any()):  # a single sample has all of the gradient
        return Estimate(share, math.nan, math.nan)
    left_N = (left_total_N - left_trace_N) / (num - 2) / left_trace_N
    error = float(torch.sqrt((num - 1) * (left_N - left_N.mean()).square().mean()))
    width = float(norm.ppf((1 + LEVEL) / 2)) * error
    return Estimate(share, share - width, share + width)
