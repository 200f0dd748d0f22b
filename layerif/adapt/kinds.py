"""The kinds of fine-tuning by the name that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerif.adapt.adalora import AdaLoraAdapter
from layerif.adapt.adapters import EqualLoraAdapter, LoraAdapter, LoraMoeAdapter
from layerif.adapt.full import FullTuning
from layerif.adapt.tuning import Tuning

_KINDS: dict[str, type[Tuning]] = {
    kind.kind: kind for kind in (LoraMoeAdapter, LoraAdapter, EqualLoraAdapter, AdaLoraAdapter, FullTuning)
}


def tuning_of(saved: Mapping[str, Any]) -> Tuning:
    """Rebuilds the settings of a kind of fine-tuning from the result of `Tuning.saved`."""
    settings = dict(saved)
    return _KINDS[settings.pop("kind")](**settings)
