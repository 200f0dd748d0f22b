"""`method=lora_moe`: fine-tune a mixture of LoRA experts with as many experts per block as the allocation says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.adapt.adapters import LoraMoeAdapter
from layerif.app.methods._finetune import FineTune


@dataclass(frozen=True, kw_only=True)
class LoraMoe(FineTune, LoraMoeAdapter):
    """Fine-tunes a mixture of LoRA experts with as many experts per block as the allocation says."""

    name: ClassVar[str] = "lora_moe"
