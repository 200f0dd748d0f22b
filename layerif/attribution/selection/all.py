"""`selection=all`: fine-tune on every train row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.attribution.selection import Pool, Selected, Selection
from layerif.probe.measurements import Load


@dataclass(frozen=True, kw_only=True)
class AllRows(Selection):
    """Takes every train row."""

    measures: ClassVar[bool] = False

    def __call__(self, pool: Pool, load: Load) -> Selected:
        return Selected(rows=tuple(range(len(pool.rows))))
