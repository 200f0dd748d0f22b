"""Layer-wise influence functions for large language models.

The public names are imported when they are first used, so that `import layerif` does not import torch.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "AllocateCallback",
    "Allocation",
    "Curves",
    "LayerScores",
    "LoraMoeConfig",
    "Profile",
    "RowInfluence",
    "curves",
    "loss",
    "prune",
    "rows",
    "score",
]  # pyright: ignore

PACKAGE = Path(__file__).parent
"""The folder of this package: what lies below it is ours."""

_HOMES = {
    "AllocateCallback": "layerif.adapt.huggingface",
    "Allocation": "layerif.allocate.allocation",
    "Curves": "layerif.allocate.curves",
    "LayerScores": "layerif.scores",
    "LoraMoeConfig": "layerif.moe",
    "Profile": "layerif.profile",
    "RowInfluence": "layerif.attribution.rows",
    "curves": "layerif.api",
    "loss": "layerif.api",
    "prune": "layerif.api",
    "rows": "layerif.api",
    "score": "layerif.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layerif' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
