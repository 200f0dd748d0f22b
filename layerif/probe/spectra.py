"""The spectra of a model's weights: the one expensive step of every estimator that looks at weights alone."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from layerif.layers import LayerMap
from layerif.models.blocks import bare


def spectra(model: nn.Module, layers: LayerMap) -> dict[str, Tensor]:
    """Eigenvalues of WᵀW (squared singular values, ascending, float64) by parameter name, and `seconds` per block.

    Half-precision weights are decomposed in float32. Raises ValueError naming a matrix that is not finite.
    """
    found: dict[str, Tensor] = {}
    seconds: list[float] = []
    for params in tqdm(layers.params, desc="singular values", disable=None, leave=False):
        start = time.perf_counter()
        found |= {param: _eigenvalues(param, bare(model).get_parameter(param)) for param in params}
        seconds.append(time.perf_counter() - start)
    return {**found, "seconds": torch.tensor(seconds, dtype=torch.float64)}


def _eigenvalues(param: str, weight: Tensor) -> Tensor:
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(weight.isfinite().all()):
        raise ValueError(f"the weight {param} is not finite; look at the checkpoint")
    return torch.linalg.svdvals(weight).double().square().flip(0).cpu()
