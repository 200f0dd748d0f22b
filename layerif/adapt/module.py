"""What Lightning fits: a frozen model with an adapter that follows an allocation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerif.checks import did_you_mean
from layerif.models.blocks import blocks
from layerif.models.hooks import first_non_finite_block
from layerif.models.loss import per_sample_loss
from layerif.moe.model import linears_of_blocks

_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda r: r >= 1, "be at least 1"),
    "top_k": (lambda top_k: top_k >= 1, "be at least 1: so many experts a token takes"),
    "lora_alpha": (lambda alpha: 0 < alpha < math.inf, "be above 0"),
    "scaling": (lambda scaling: 0 < scaling < math.inf, "be above 0; it is α/r, the paper's 16/8"),
    "lora_dropout": (lambda rate: 0 <= rate < 1, "lie in [0, 1)"),
    "balance_coefficient": (lambda weight: 0 <= weight < math.inf, "be 0 or more"),
    "learning_rate": (lambda rate: 0 < rate < math.inf, "be above 0"),
    "weight_decay": (lambda decay: 0 <= decay < math.inf, "be 0 or more"),
    "warmup_ratio": (lambda ratio: 0 <= ratio < 1, "lie in [0, 1); for steps use method.warmup_steps"),
    "warmup_steps": (lambda steps: steps >= 0, "be 0 or more, or null for method.warmup_ratio"),
}


class AdapterModule(L.LightningModule):
    """A frozen model with an adapter that follows an allocation.

    Loss: mean over the batch of the per-sample loss, plus what the kind of adapter adds. Optimiser: AdamW; the learning
    rate rises linearly over `warmup_ratio` of the steps (or exactly `warmup_steps`, where given) and falls linearly to
    zero.

    model: a configuration with `_target_`, so that a checkpoint can rebuild it. allocation: a count by block name; None
    until the influence callback decides. Checkpoints hold the adapter alone.
    A kind of adapter says which allocation it spends (`allocates`) and what PEFT makes of it (`adapter`).
    """

    allocates: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # the frozen base is not in the checkpoint
        self.model: nn.Module | None = None
        self.compared: dict[str, int] = {}  # parameters of what this one is compared with, for the record

    def adapter(self, base: nn.Module, allocation: Mapping[str, int]) -> PeftConfig:
        """The adapter of this allocation on the bare model."""
        raise NotImplementedError

    def extra_loss(self, num_samples: int) -> Tensor | float:
        """What is added to the loss of the batch that was just run."""
        return 0.0

    def check(self) -> None:
        """Of the settings, whichever a kind has, once they are saved."""
        for name, (holds, allowed) in _ALLOWED.items():
            value = self.hparams.get(name)
            if value is not None and not holds(value):
                raise ValueError(f"method.{name}={value} must {allowed}")
        if adapter := self.hparams["model"].get("adapter"):
            raise ValueError(
                f"an adapter to train cannot build on model.adapter={adapter!r}; merge the adapter into a folder "
                "of its own (PEFT's merge_and_unload) and use model=local, or score it with method=none"
            )

    def rehearse(self, skeleton: nn.Module, allocation: Mapping[str, int]) -> None:
        """Put the adapter on the model without weights: what is impossible fails here, before any pass over the data.

        Raises ValueError, among the rest, for a target that names nothing, which PEFT itself leaves out in silence.
        """
        known = [name for name, _ in skeleton.named_modules()]
        for target in self.hparams.get("target_modules") or ():
            if not any(name == target or name.endswith(f".{target}") for name in known):
                linears = linears_of_blocks(skeleton)
                near = did_you_mean(target, [*linears, *(name.rpartition(".")[2] for name in linears)])
                raise ValueError(
                    f"method.target_modules holds {target!r}, which names nothing in this model{near}; its blocks have "
                    f"{', '.join(linears)} (null: all of them)"
                )
        with torch.device("meta"):
            get_peft_model(skeleton, self.adapter(skeleton, allocation))  # type: ignore[arg-type]

    @property
    def allocation(self) -> dict[str, int] | None:
        return self.hparams["allocation"]

    @allocation.setter
    def allocation(self, given: Mapping[str, int]) -> None:
        self.hparams["allocation"] = dict(given)

    def base_model(self) -> nn.Module:
        """The bare model, loaded once: the callback scores it before `configure_model` wraps it."""
        if self.model is None:
            self.model = instantiate(dict(self.hparams["model"])).load()
        assert self.model is not None
        return self.model

    def configure_model(self) -> None:
        if isinstance(self.model, PeftModel):
            return
        if self.allocation is None:
            raise ValueError(
                "the module has no allocation yet: pass allocation={block: count}, "
                "or add an InfluenceCallback to the trainer"
            )
        base, hparams = self.base_model(), self.hparams
        config = self.adapter(base, self.allocation)
        if hparams["gradient_checkpointing"]:
            _checkpoint_blocks(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hparams["seed"])
            self.model = get_peft_model(base, config)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is then a function of the seed and the step alone, so that a resumed run equals an uninterrupted one.
        torch.manual_seed(self.hparams["seed"] * 1_000_003 + self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.model is not None
        loss = per_sample_loss(self.model, batch).mean()
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the training loss is {loss.item()} at step {self.global_step}, batch {batch_idx}, from "
                f"{first_non_finite_block(self.model, batch)} on; lower method.learning_rate or train in float32 "
                "(trainer.precision=32-true)"
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss + self.extra_loss(len(batch["labels"]))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # of trainer.precision=16-mixed: it skips such a step and lowers its scale, by design
        gradients = {name: value.grad for name, value in self.named_parameters() if value.grad is not None}
        # One look at the device for all of them together.
        finite = torch.stack([gradient.sum() for gradient in gradients.values()]).isfinite()
        if not bool(finite.all()):
            raise ValueError(
                f"the gradient of {list(gradients)[int((~finite).nonzero()[0])]} is not finite at step "
                f"{self.global_step}; lower method.learning_rate or train in float32 (trainer.precision=32-true)"
            )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert self.model is not None
        losses = per_sample_loss(self.model, batch)
        self.log("validation/loss", losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        hparams = self.hparams
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=hparams["learning_rate"], weight_decay=hparams["weight_decay"])
        total = int(self.trainer.estimated_stepping_batches)
        warmup = hparams["warmup_steps"]
        warmup = round(hparams["warmup_ratio"] * total) if warmup is None else warmup
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_linear, warmup=warmup, total=total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        checkpoint["state_dict"] = get_peft_model_state_dict(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        saved = checkpoint["hyper_parameters"]["allocation"]
        if saved != self.allocation:  # the checkpoint's is the one its weights fit
            self.model = self.model.unload()  # type: ignore[operator]
            self.allocation = saved
            self.configure_model()
        set_peft_model_state_dict(self.model, checkpoint["state_dict"])


def _checkpoint_blocks(base: nn.Module) -> None:
    """Keep of every block its input alone and run it again in backward.

    Transformers itself does so in training mode only, which would also switch on whatever dropout the base has.
    """
    for block in blocks(base).values():
        forward = MethodType(type(block).forward, block)
        block.forward = partial(checkpoint, forward, use_reentrant=False)


def _linear(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))
