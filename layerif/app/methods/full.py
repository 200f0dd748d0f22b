"""`method=full`: fine-tune all weights of the layers that the allocation chooses, and leave the others as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.adapt.full import FullTuning
from layerif.app.methods._finetune import FineTune
from layerif.app.setup import Setup


@dataclass(frozen=True, kw_only=True)
class Full(FineTune, FullTuning):
    """Fine-tunes all weights of the layers that the allocation chooses, and leaves the others as they are.

    A run leaves `model/` for plain transformers.
    """

    name: ClassVar[str] = "full"
    takes_parts: ClassVar[bool] = False

    def check(self, setup: Setup) -> None:
        if scheme := setup.model.quantisation:
            raise ValueError(
                f"method=full trains the weights themselves, and those of the model are quantised ({scheme}); use "
                "method=lora, or model.quantised=none"
            )
        super().check(setup)
