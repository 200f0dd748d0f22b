"""Gain curves: what each rank, or each LoRA expert, of each matrix is predicted to lower the validation loss by.

With Ḡ = U Σ Vᵀ the mean train gradient of a matrix and Ḡᵛ its mean validation gradient, the k-th direction gains

    g_k = σ_k·(u_kᵀ Ḡᵛ v_k)                    (first order)
    g_k = σ_k·(u_kᵀ Ḡᵛ v_k)/(c_k + λ)          (preconditioned)

with c_k = mean_i (u_kᵀ G_i v_k)² over the train samples and λ as in DataInf. Directions come from train rows and gains
from validation rows, so that noise is not chosen for. Rank r gains the least concave majorant of Σ_{k≤r} g_k.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from layerif.allocate.curves import Curves
from layerif.allocate.gains import gain_curves
from layerif.checks import Count, Seed, check_fields, listed
from layerif.estimators._base import CurveEstimator, Damping, described
from layerif.evidence import LayerGains, MatrixGains
from layerif.layers import LayerMap, MatrixOrBlock
from layerif.probe.gains import Gains

GainForm = Literal["first_order", "preconditioned"]


@dataclass(frozen=True, kw_only=True)
class GainCurve(CurveEstimator):
    """Says what each rank, or expert, of every matrix (or block) gains, in one gradient pass.

    Attributes:
        kind: a curve over ranks (method=lora) or over experts (method=lora_moe). E experts of rank r are given what
            rank r·E gains, which is an upper bound.
        form: `first_order` or `preconditioned`, see above.
        granularity: a curve per matrix, or per block: then the sum over matrices that all have the same level.
        r: the rank of an expert; None: 8. Curves over ranks do not look at it.
        r_max: the directions of a matrix, and the highest rank; None: as many as its rank, and 128 at most.
        damping: λ of the preconditioned form, relative to the matrix's mean squared gradient entry.
        target_modules: names of the linear layers that get an adapter; None: every linear layer of the blocks.
        seed: of the search for directions.
    """

    kind: Literal["rank", "experts"] = "rank"  # type: ignore[misc]
    form: GainForm = "first_order"
    granularity: MatrixOrBlock = "matrix"
    r: Count | None = None
    r_max: Count | None = None
    damping: Damping = 0.1
    target_modules: Sequence[str] | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "estimator")

    @property
    def needs(self) -> Gains:
        return Gains(tuple(self.target_modules or ()) or None, self.r_max, self.seed)

    @property
    def source(self) -> str:
        return described(self, target_modules=list(self.target_modules or ()) or None)

    def curves(self, evidence: LayerGains, /) -> Curves:
        warn_of_zero_gains(evidence)
        gains = [self.gains(evidence.gains[param]) for param in evidence.layers.matrices]
        if not any(bool((each_2R.sum(0) > 0).any()) for each_2R in gains):
            warnings.warn(
                "no direction of the train gradients lowers the loss of the validation samples, so all matrices get "
                "the same; measure more rows (probe.num_train, probe.num_validation)",
                RuntimeWarning,
                stacklevel=2,
            )
        source = {**evidence.source, "form": self.form}
        if self.kind == "experts":
            source["experts"] = f"upper bound: E experts are given what rank {self._expert_rank}·E gains"
        return self._made(evidence.layers, gains, source=source, fingerprint=evidence.fingerprint)

    def gains(self, matrix: MatrixGains) -> Tensor:
        """Gives g_k of every direction, as each half of the validation samples adds to it (2×R)."""
        gains_2R = matrix.strengths * matrix.products
        if self.form == "preconditioned":
            damped_R = matrix.curvatures + self.damping * matrix.mean_square
            gains_2R = (gains_2R / damped_R).where(damped_R > 0, 0)
        return gains_2R

    def equal(self, layers: LayerMap) -> Curves:
        return self._made(self.needs.layers(layers), None)

    @property
    def _expert_rank(self) -> int:
        return 8 if self.r is None else self.r

    def _made(self, layers: LayerMap, gains: Sequence[Tensor] | None, **about: Any) -> Curves:
        curves = gain_curves(
            layers, gains, kind=self.kind, expert_rank=self._expert_rank, most_rank=self.r_max, **about
        )
        return curves.by_block if self.granularity == "block" else curves


def warn_of_zero_gains(evidence: LayerGains) -> None:
    """Warns of matrices whose gradients are all zero, by their names.

    Raises:
        ValueError: the train or the validation gradients of all matrices are zero.
    """
    found = evidence.gains
    for part, is_seen in (
        ("train", {param: bool(each.strengths.any()) for param, each in found.items()}),
        ("validation", {param: bool(each.products.any()) for param, each in found.items()}),
    ):
        zero = [param for param, seen in is_seen.items() if not seen]
        if len(zero) == len(found):
            raise ValueError(
                f"all {part} gradients are zero, so nothing tells what a rank gains; look at the loss of these rows "
                "(probe.loss_on), or take others"
            )
        if zero:
            warnings.warn(
                f"all {part} gradients are zero, so that no rank gains anything, in {listed(zero, 4)} ({len(zero)} of "
                f"{len(found)} matrices)",
                RuntimeWarning,
                stacklevel=3,
            )
