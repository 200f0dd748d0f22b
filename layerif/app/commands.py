"""The commands of the package. Each says how to install what it needs, where that is missing."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

LABORATORY = ("hydra", "lightning", "pandas", "rich")


def layerif() -> None:
    """Runs `layerif`."""
    _call("layerif.app.main")


def layerif_report() -> None:
    """Runs `layerif-report`."""
    _call("layerif.report")


def layerif_store() -> None:
    """Runs `layerif-store`."""
    _call("layerif.app.store")


def layerif_export() -> None:
    """Runs `layerif-export`."""
    _call("layerif.app.export")


def _call(module: str) -> None:
    missing = [name for name in LABORATORY if find_spec(name) is None]
    if missing:
        print(
            f"layerif: the commands need {', '.join(missing)}, which came without: pip install 'layerif[lab]'; from "
            "Python, layerif.score and layerif.prune work as it is",
            file=sys.stderr,
        )
        sys.exit(1)
    import_module(module).main()
