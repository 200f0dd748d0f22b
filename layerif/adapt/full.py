"""Full fine-tuning of the layers that an allocation chooses; all other weights stay as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layerif.adapt.protect import Protection
from layerif.adapt.sizes import check_memory
from layerif.adapt.tuning import Tuning, check_blocks, trained_blocks
from layerif.allocate.allocation import Allocation
from layerif.checks import Positive
from layerif.models.blocks import blocks
from layerif.scores import AllocationKind


@dataclass(frozen=True, kw_only=True)
class FullTuning(Tuning):
    """Full fine-tuning of the chosen blocks. Embedding, head and all other blocks are frozen.

    The model stays in evaluation mode, as it does under an adapter, so that its own dropout is off.

    Attributes:
        learning_rate: of AdamW; lower than that of an adapter, because every weight of a matrix moves.
        protect: `spider` mixes the pretrained weights back in after each step, where they matter more to the pretrained
            model than to the task, see `layerif.adapt.protect.Protection`; `none` trains as usual.
        save: write the model.
    """

    kind: ClassVar[str] = "full"
    allocates: ClassVar[AllocationKind] = "layers"
    leaves: ClassVar[str] = "model"

    learning_rate: Positive = 2e-5
    protect: Literal["none", "spider"] = "none"
    save: bool = True

    @property
    def is_written(self) -> bool:
        return self.save

    def put_on(self, base: nn.Module, allocation: Allocation) -> nn.Module:
        of_block = blocks(base)
        check_blocks(allocation.units, list(of_block), value="value")
        base.requires_grad_(False)
        for block in trained_blocks(allocation):
            of_block[block].requires_grad_()
        return base

    def taken_off(self, model: nn.Module) -> None:
        return None  # its weights may have changed

    def protection(self, model: nn.Module) -> Protection | None:
        return Protection(model) if self.protect == "spider" else None

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}

    def restore(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        own = self.trained(model)
        if own.keys() != weights.keys():
            (first, *_) = sorted(own.keys() ^ weights.keys())
            raise ValueError(
                f"the checkpoint is of another model: it holds {len(weights)} trained weights and not {len(own)}, the "
                f"first difference is {first!r}; give the one that it was written for"
            )
        for name, weight in own.items():
            weight.copy_(weights[name])

    def write(self, model: nn.Module, tokenizer: Any, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)

    def check_fits(self, skeleton: nn.Module, allocation: Allocation, *, free: float = math.inf) -> None:
        trained = self.trained(self.put_on(skeleton, allocation))
        for weight in trained.values():
            if weight.dtype in (torch.float16, torch.bfloat16):
                dtype = str(weight.dtype).removeprefix("torch.")
                raise ValueError(
                    f"method=full trains the weights themselves, and model.dtype={dtype} would round most of its small "
                    "steps away; use model.dtype=float32 (with trainer.precision=bf16-mixed for speed)"
                )
        num_trained = sum(weight.numel() for weight in trained.values())
        what = f"{len(trained_blocks(allocation))} layers to train"
        advice = "lower allocator.keep, or use method=lora"
        if self.protect == "spider":
            what, advice = f"{what} with method.protect=spider", f"{advice} or method.protect=none"
        held = 2 if self.protect == "spider" else 0
        check_memory(num_trained, free, what=what, advice=advice, held=held)
