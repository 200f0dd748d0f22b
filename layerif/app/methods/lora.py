"""`method=lora`: fine-tune plain LoRA with the rank per block that the allocation says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.adapt.adapters import LoraAdapter
from layerif.app.methods._finetune import FineTune


@dataclass(frozen=True, kw_only=True)
class Lora(FineTune, LoraAdapter):
    """Fine-tunes plain LoRA with the rank per block that the allocation says."""

    name: ClassVar[str] = "lora"
