"""`method=lora_equal`: fine-tune plain LoRA as large as the LoRA-MoE that this allocation of experts would make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerif.adapt.adapters import EqualLoraAdapter
from layerif.app.methods._finetune import FineTune


@dataclass(frozen=True, kw_only=True)
class EqualLora(FineTune, EqualLoraAdapter):
    """Fine-tunes plain LoRA as large as the LoRA-MoE that this allocation of experts would make."""

    name: ClassVar[str] = "lora_equal"
