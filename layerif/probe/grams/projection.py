"""Random projection of gradients from both sides, which gives up exactness for memory.

With P_out (k×O) and P_in (k×I) of independent normal entries of variance 1/k, ⟨P_out g P_inᵀ, P_out h P_inᵀ⟩ equals
⟨g, h⟩ in expectation, with a relative error of about sqrt(2/k) for each side. Since g = Σ_t δ_t a_tᵀ, projecting δ and
a is enough: a layer's factors shrink from O + I to 2k numbers a token. A side that is no wider than k is left as it is.
Every run measures how well its scores survive the projection (`layerif.decide`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerif.models.contexts import full_precision


@dataclass(frozen=True)
class Projection:
    """A projection to `size` (k) dimensions. Matrices of the same width share one, so that it is small."""

    size: int
    seed: int = 0
    _made: dict[tuple[str, int, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, values: Tensor, side: str) -> Tensor:
        """Projects values (…×width) to (…×k) in at least float32."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        width = values.shape[-1]
        if width <= self.size:
            return values
        key = side, width, values.device
        if key not in self._made:
            self._made[key] = self._make(side, width).to(values.device)
        with full_precision():
            return values @ self._made[key].to(values.dtype)

    def width(self, features: int) -> int:
        """Gives the width of projected values."""
        return min(features, self.size)

    def _make(self, side: str, width: int) -> Tensor:
        """Draws the projection (width×k), the same on every device and in every process."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + width) * 2 + (side == "in"))
        return torch.randn(width, self.size, generator=generator) / self.size**0.5
