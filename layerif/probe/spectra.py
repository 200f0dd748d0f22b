"""The spectra of a model's weights: the one expensive step of every estimator that looks at weights alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from layerif.evidence import LayerSpectra
from layerif.layers import LayerMap
from layerif.models.blocks import weight_of
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import Request
from layerif.probe.store import MeasurementKind
from layerif.progress import progress
from layerif.versions import VERSIONS

SPECTRA: MeasurementKind[Mapping[str, Tensor]] = MeasurementKind("spectra", "spectra of weights")


@dataclass(frozen=True)
class Spectra(Request):
    """A request for the spectra of all linear layers of the blocks. No sample stands behind them."""

    keeps_matrices: ClassVar[bool] = True

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerSpectra, bool]:
        layers = measurements.layers()
        tensors, key, reused = measurements.by_the_first(
            SPECTRA, lambda: spectra(measurements.merged(load), layers), spectra=VERSIONS["spectra"]
        )
        eigenvalues = {param: tensors[param] for param in layers.matrices}
        return LayerSpectra(layers, eigenvalues, tuple(tensors["seconds"].tolist()), key), reused

    def notes(self, evidence: LayerSpectra) -> tuple[str, ...]:
        seconds = sum(evidence.seconds) / len(evidence.seconds)
        return (f"singular values took {seconds:.3g} s a block",)


def spectra(model: nn.Module, layers: LayerMap) -> dict[str, Tensor]:
    """Decomposes every matrix in `layers`; half-precision weights are decomposed in float32.

    Returns:
        The eigenvalues of WᵀW (squared singular values, ascending, float64) by parameter name, and `seconds` per block.

    Raises:
        ValueError: names a matrix that is not finite.
    """
    found: dict[str, Tensor] = {}
    seconds: list[float] = []
    for params in progress(layers.params, "singular values"):
        start = time.perf_counter()
        found |= {param: _eigenvalues(param, weight_of(model, param)) for param in params}
        seconds.append(time.perf_counter() - start)
    return {**found, "seconds": torch.tensor(seconds, dtype=torch.float64)}


def _eigenvalues(param: str, weight: Tensor) -> Tensor:
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(weight.isfinite().all()):
        raise ValueError(f"the weight {param} is not finite; look at the checkpoint")
    return torch.linalg.svdvals(weight).double().square().flip(0).cpu()
