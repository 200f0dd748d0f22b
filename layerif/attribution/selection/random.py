"""`selection=random`: rows drawn by the seed, the control of all other selections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.attribution.selection import Pool, RankedSelection
from layerif.probe.measurements import Load


@dataclass(frozen=True, kw_only=True)
class RandomRows(RankedSelection):
    """Takes rows at random. They depend on the seed and on their content, and not on their order."""

    measures: ClassVar[bool] = False

    def values(self, pool: Pool, load: Load) -> None:
        return None
