"""The instrument check: leave-k-out retraining of a model for which influence theory is exact.

L2-regularised logistic regression is convex, and retraining it to its optimum costs microseconds. If the labels are
drawn from such a model, its Hessian there is the Fisher matrix. So the influence with the true Hessian must order the
loss changes as retraining does, and so must the estimator `exact`, which sees only gradients. A wrong sign, scale or
index in this package would show here.

Letters in shape suffixes: N train rows, M validation rows, P parameters, S left-out sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from layerif.diagnose.leave_out import lds, left_out_sets, membership, predicted_change
from layerif.estimators.exact import exact

RIDGE = 1e-3


@dataclass(frozen=True)
class Convex:
    """The outcome of the instrument check.

    Attributes:
        actual_SM: the loss changes that retraining gave.
        predicted: the loss changes (S×M) that each kind of influence predicted, by its name.
    """

    actual_SM: np.ndarray
    predicted: dict[str, np.ndarray]

    @property
    def lds(self) -> dict[str, float]:
        """The LDS of each prediction, by its name."""
        return {name: lds(predicted_SM, self.actual_SM) for name, predicted_SM in self.predicted.items()}


def convex_check(
    *,
    num_train: int = 600,
    num_val: int = 40,
    num_params: int = 6,
    removed: int = 30,
    num_sets: int = 60,
    seed: int = 0,
) -> Convex:
    """Retrains without `removed` of `num_train` rows, `num_sets` times, and predicts the same by influence.

    All of it is computed in float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int) -> tuple[Tensor, Tensor]:
        x_NP = torch.randn(count, num_params, dtype=torch.float64, generator=generator)
        chance_N = torch.sigmoid(x_NP @ truth_P)
        return x_NP, 2 * (torch.rand(count, dtype=torch.float64, generator=generator) < chance_N).double() - 1

    truth_P = torch.randn(num_params, dtype=torch.float64, generator=generator)
    (x_NP, y_N), (x_MP, y_M) = rows(num_train), rows(num_val)
    sets = left_out_sets(num_train, removed, num_sets, seed=seed)
    left_out_SN = membership(sets, num_train)

    full_P = fit_convex(x_NP, y_N, torch.ones(num_train, dtype=torch.float64))
    full_M = convex_loss(full_P, x_MP, y_M)
    weights_SN = 1 - torch.from_numpy(left_out_SN)
    actual_SM = torch.stack(
        [convex_loss(fit_convex(x_NP, y_N, weights_N), x_MP, y_M) - full_M for weights_N in weights_SN]
    )

    train_NP, val_MP = gradients(full_P, x_NP, y_N), gradients(full_P, x_MP, y_M)
    hessian_PP = hessian(full_P, x_NP, y_N, torch.ones(num_train, dtype=torch.float64))
    influences = {
        "true Hessian": -val_MP @ torch.linalg.solve(hessian_PP, train_NP.T),
        # This damping, in units of the mean squared gradient entry, makes λ the ridge.
        "exact": exact(
            train_NP @ train_NP.T,
            val_MP @ train_NP.T,
            numel=num_params,
            damping=RIDGE / float(train_NP.square().mean()),
        ),
    }
    predicted = {name: predicted_change(influence_MN, left_out_SN) for name, influence_MN in influences.items()}
    return Convex(actual_SM.numpy(), predicted)


def fit_convex(x_NP: Tensor, y_N: Tensor, weights_N: Tensor) -> Tensor:
    """Returns argmin (1/N) Σ w_i·softplus(−y_i·x_iθ) + RIDGE/2·‖θ‖², by Newton's method to machine precision."""
    theta_P = torch.zeros(x_NP.shape[1], dtype=x_NP.dtype)
    for _ in range(50):
        slope_P = (weights_N[:, None] * gradients(theta_P, x_NP, y_N)).sum(dim=0) / len(x_NP) + RIDGE * theta_P
        if float(slope_P.norm()) < 1e-13:
            break
        theta_P = theta_P - torch.linalg.solve(hessian(theta_P, x_NP, y_N, weights_N), slope_P)
    return theta_P


def convex_loss(theta_P: Tensor, x_NP: Tensor, y_N: Tensor) -> Tensor:
    """Returns the loss of each row: (N)."""
    return softplus(-y_N * (x_NP @ theta_P))


def gradients(theta_P: Tensor, x_NP: Tensor, y_N: Tensor) -> Tensor:
    """Returns the gradient of each row's loss: (N×P)."""
    return (-y_N * torch.sigmoid(-y_N * (x_NP @ theta_P)))[:, None] * x_NP


def hessian(theta_P: Tensor, x_NP: Tensor, y_N: Tensor, weights_N: Tensor) -> Tensor:
    """Returns the Hessian (P×P) of the regularised weighted loss that `fit_convex` minimises."""
    chance_N = torch.sigmoid(x_NP @ theta_P)
    curved_PP = x_NP.T @ ((weights_N * chance_N * (1 - chance_N))[:, None] * x_NP) / len(x_NP)
    return curved_PP + RIDGE * torch.eye(x_NP.shape[1], dtype=x_NP.dtype)
