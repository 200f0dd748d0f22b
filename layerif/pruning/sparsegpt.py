"""SparseGPT (Frantar & Alistarh, ICML 2023) removes weights column by column; later columns make up for them.

With H = (2/S)·Σ_s X_s X_sᵀ over S calibration windows and U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU), removing
w_j costs w_j²/U_jj² and is made up for by w_k −= w_j·U_jk/U_jj in all later columns k.
Letters in shape suffixes: O outputs and I inputs of a linear layer, S windows, T tokens, B columns of a slab.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from layerif.checks import Count
from layerif.pruning import Pruner
from layerif.pruning.mask import check_target, check_width, lowest, lowest_per_group, num_removed


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float | None = None,
    *,
    n: int | None = None,
    m: int | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    name: str = "a matrix",
) -> Tensor:
    """Prunes and updates a weight, in float32 or better.

    Inputs that never act (H_jj = 0) lose their weights and count as H_jj = 1; then H += damping·mean(diag H). A slab of
    `block_size` columns chooses its mask by W²/U_jj² over the whole slab. With n:m every group of m chooses by the
    weights as updated so far.

    Args:
        weight: W (O×I).
        hessian: H (I×I).
        sparsity: the fraction of the weights to remove; None where n and m are given.
        n: the number of weights to keep of every m consecutive inputs.
        m: the size of such a group.
        block_size: the number of columns of a slab.
        damping: a fraction of the mean diagonal of H, added to the diagonal.
        name: the name of the matrix, for messages.

    Returns:
        The weight (O×I) in its own dtype.

    Raises:
        ValueError: H is not positive definite; says which damping to try.
    """
    factor_II, is_dead_I = inverse_factor(hessian, damping=damping, name=name)
    return prune_by_factor(weight, factor_II, is_dead_I, sparsity, n=n, m=m, block_size=block_size)


def inverse_factor(hessian: Tensor, *, damping: float, name: str = "a matrix") -> tuple[Tensor, Tensor]:
    """Returns U (I×I), upper, with H⁻¹ = UᵀU for the damped H, and a mask of the inputs that never act (I)."""
    hessian_II = hessian.to(torch.promote_types(hessian.dtype, torch.float32), copy=True)
    diagonal_I = hessian_II.diagonal()
    is_dead_I = diagonal_I == 0
    diagonal_I[is_dead_I] = 1
    diagonal_I += damping * diagonal_I.mean()
    # H = RRᵀ with R upper is the Cholesky factorisation of H with both axes reversed; then U = R⁻¹.
    lower_II, failed = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
    if not int(failed):
        identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
        factor_II = torch.linalg.solve_triangular(lower_II, identity_II, upper=False).flip(0, 1)
        if bool(factor_II.isfinite().all()):
            return factor_II, is_dead_I
    raise ValueError(
        f"the Hessian of {name} ({len(hessian)} inputs) is not positive definite with pruner.damping={damping}; "
        f"try pruner.damping={max(10 * damping, 0.001):g}, or give more calibration windows"
    )


def prune_by_factor(
    weight: Tensor,
    factor_II: Tensor,
    is_dead_I: Tensor,
    sparsity: float | None = None,
    *,
    n: int | None = None,
    m: int | None = None,
    block_size: int = 128,
) -> Tensor:
    """Does the work of `sparsegpt` from the inverse factor, which matrices with the same inputs share."""
    check_target(sparsity, n, m)
    num_outputs, num_inputs = weight.shape
    if factor_II.shape != (num_inputs, num_inputs):
        raise ValueError(f"a weight with {num_inputs} inputs needs a hessian of as many, got {tuple(factor_II.shape)}")
    if m is not None:
        check_width(num_inputs, m)
        check_width(block_size, m)
    # The columns are stored as rows, so that the loop reads and writes memory in order.
    columns_IO = weight.t().to(factor_II.dtype, copy=True, memory_format=torch.contiguous_format)
    columns_IO[is_dead_I] = 0
    for start in range(0, num_inputs, block_size):
        end = min(start + block_size, num_inputs)
        slab_BO, factor_BB = columns_IO[start:end], factor_II[start:end, start:end]
        diagonal_B1 = factor_BB.diagonal()[:, None]
        if m is None:
            assert sparsity is not None
            # Rounding the running total makes the slabs together remove the right number of weights.
            count = num_removed(sparsity, num_outputs * end) - num_removed(sparsity, num_outputs * start)
            mask_BO = lowest((slab_BO / diagonal_B1).square(), count)
        else:
            mask_BO = torch.zeros_like(slab_BO, dtype=torch.bool)
        errors_BO = torch.zeros_like(slab_BO)
        for b in range(end - start):
            if m is not None and n is not None and b % m == 0:
                group = slice(b, b + m)
                metric_OM = (slab_BO[group] / diagonal_B1[group]).square().t()
                mask_BO[group] = lowest_per_group(metric_OM, n, m).t()
            errors_BO[b] = torch.where(mask_BO[b], slab_BO[b] / diagonal_B1[b], 0)
            slab_BO[b + 1 :].addr_(factor_BB[b, b + 1 :], errors_BO[b], alpha=-1)
        slab_BO.masked_fill_(mask_BO, 0)
        columns_IO[end:].addmm_(factor_II[start:end, end:].t(), errors_BO, alpha=-1)
    return columns_IO.t().to(weight.dtype).contiguous()


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Pruner):
    """Prunes by `sparsegpt`.

    Args:
        block_size: the number of columns of a slab.
        damping: a fraction of the mean diagonal of H, added to the diagonal.
    """

    inverts: ClassVar[bool] = True

    block_size: Count = 128
    damping: Annotated[float, Ge(0), "SparseGPT's own is 0.01"] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m is not None and self.block_size % self.m:
            raise ValueError(f"pruner.block_size={self.block_size} must be a multiple of pruner.m={self.m}")

    @property
    def observes_gram(self) -> bool:
        return True

    def observe(self, so_far: Tensor | None, input_TI: Tensor) -> Tensor:
        input_TI = input_TI.to(torch.promote_types(input_TI.dtype, torch.float32))
        if so_far is None:
            so_far = input_TI.new_zeros(input_TI.shape[1], input_TI.shape[1])
        return so_far.addmm_(input_TI.t(), input_TI, alpha=2)

    def prepare(self, statistic: Tensor, num_windows: int, *, name: str) -> tuple[Tensor, Tensor]:
        return inverse_factor(statistic / num_windows, damping=self.damping, name=name)

    def __call__(self, weight: Tensor, shared: Any, sparsity: float | None, n: int | None) -> Tensor:
        factor_II, is_dead_I = shared
        return prune_by_factor(
            weight, factor_II, is_dead_I, sparsity, n=n, m=self.m if n else None, block_size=self.block_size
        )
