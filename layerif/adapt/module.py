"""The module that Lightning fits: a frozen model, of which an adapter or some layers are trained by an allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerif.adapt.directions import begin_with
from layerif.adapt.kinds import tuning_of
from layerif.adapt.protect import Protection
from layerif.adapt.strategy import is_sharded
from layerif.adapt.tuning import Tuning
from layerif.allocate.allocation import Allocation
from layerif.models.blocks import blocks
from layerif.models.hooks import first_non_finite_block
from layerif.models.loss import per_sample_loss
from layerif.targets import build


class AdapterModule(L.LightningModule):
    """A frozen model, of which an adapter or some layers are trained as an allocation says.

    The loss is the mean over the batch of the per-sample loss, plus the adapter's penalties. The optimiser is AdamW.
    Checkpoints hold the trained weights alone, the settings, the model's configuration and the allocation. There is no
    backward pass below the first block in which anything is trained, because nothing there asks for a gradient.

    Args:
        tuning: the kind of fine-tuning with its settings, or what a checkpoint holds of them.
        model: the model's configuration with its `_target_`, so that a checkpoint can rebuild it.
        allocation: None until the influence callback decides.

    Attributes:
        trusted_targets: packages or objects whose targets the model's configuration may name, beside those that every
            configuration may. They are no argument, because a checkpoint, which may come from anywhere, holds those.
        directions: those that the adapter begins with, by the name of the linear layer (`layerif.adapt.directions`). A
            checkpoint does not hold them, because it has the trained weights.
    """

    trusted_targets: Sequence[str] = ()

    def __init__(
        self,
        tuning: Tuning | Mapping[str, Any],
        model: Mapping[str, Any],
        allocation: Allocation | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # the checkpoint leaves out the frozen base
        self.tuning = tuning if isinstance(tuning, Tuning) else tuning_of(tuning)
        self.save_hyperparameters(
            {"tuning": self.tuning.saved(), "model": dict(model), "allocation": None},
            logger=False,  # the run logs its whole configuration
        )
        self._allocation: Allocation | None = None
        if allocation is not None:
            self.allocation = allocation if isinstance(allocation, Allocation) else Allocation.from_dict(allocation)
        self.model: nn.Module | None = None
        self._is_ready = False  # the model is ready to be trained
        self._is_begun = getattr(self.tuning, "init", "default") != "gradient"  # it has the first weights asked for
        self.directions: Mapping[str, Tensor] | None = None
        self._protection: Protection | None = None
        self.compared: dict[str, int] = {}  # parameters of the model that this one is a baseline of, for the record
        if on_top_of := model.get("adapter"):
            raise ValueError(
                f"fine-tuning cannot build on model.adapter={on_top_of!r}; merge that adapter into a folder of its own "
                "(PEFT's merge_and_unload) and use model=local, or score it with method=none"
            )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
        """Loads a checkpoint as Lightning does, and by default does not unpickle code from any place, a URL included.

        Raises:
            ValueError: the checkpoint names a model that is not among the allowed targets.
        """
        return super().load_from_checkpoint(checkpoint_path, *args, weights_only=weights_only, **kwargs)

    @property
    def allocation(self) -> Allocation | None:
        """The allocation that the training follows."""
        return self._allocation

    @allocation.setter
    def allocation(self, given: Allocation) -> None:
        self._allocation = given
        self.hparams["allocation"] = given.to_dict()

    def base_model(self) -> nn.Module:
        """Loads the bare model once. The callback scores it before `configure_model` makes it ready to be trained."""
        if self.model is None:
            self.model = build(self.hparams["model"], "model", self.trusted_targets).load()
        assert self.model is not None
        return self.model

    def configure_model(self) -> None:
        if self._is_ready:
            return
        if self.allocation is None:
            raise ValueError(
                "the module has no allocation yet: pass allocation=Allocation(…), "
                "or add an InfluenceCallback to the trainer"
            )
        base = self.base_model()
        self.compared = self.tuning.compared(base, self.allocation)
        if self.tuning.gradient_checkpointing:
            _checkpoint_blocks(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.tuning.seed)
            self.model = self.tuning.put_on(base, self.allocation)
            if self._begins and not is_sharded(self._trainer):
                self.model.to(self.trainer.strategy.root_device)
                self.model = self.tuning.started(self.model, self.allocation, self.trainer.datamodule)  # type: ignore[attr-defined]
        if self.directions is not None:
            begin_with(self.model, self.directions)
            self.directions, self._is_begun = None, True
        if is_sharded(self._trainer):
            self.trainer.strategy.shard(self.model)  # type: ignore[attr-defined]
        self._protection = self.tuning.protection(self.model)
        self._is_ready = True

    def on_fit_start(self) -> None:
        if not self._is_begun:
            raise ValueError(
                "method.init=gradient has no directions to begin with: give the InfluenceCallback directions=…, or set "
                "the module's directions"
            )

    @property
    def _begins(self) -> bool:
        """Tells a training from its start from one that resumes, and from a module that is only loaded."""
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is then a function of the seed and the step alone, so that a resumed run equals an uninterrupted one.
        torch.manual_seed(self.tuning.seed * 1_000_003 + self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.model is not None
        loss = per_sample_loss(self.model, batch).mean()
        if not bool(loss.isfinite()):
            # A forward pass of this process alone would wait for the parts of weights that the others hold.
            where = ", in a block that nobody looks for, because the weights are divided among processes (fsdp)"
            if not is_sharded(self._trainer):
                where = f", from {first_non_finite_block(self.model, batch)} on"
            raise ValueError(
                f"the training loss is {loss.item()} at step {self.global_step}, batch {batch_idx}{where}; lower "
                "method.learning_rate or train in float32 (trainer.precision=32-true)"
            )
        num_samples = len(batch["labels"])
        self.log("train/loss", loss, prog_bar=True, batch_size=num_samples)
        for name, (weight, penalty) in self.tuning.penalties(self.model).items():
            self.log(f"train/{name}", penalty, batch_size=num_samples)
            loss = loss + weight * penalty
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if is_sharded(self._trainer):
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self.trainer.strategy.average_gradients(trained)  # type: ignore[attr-defined]
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # with trainer.precision=16-mixed the scaler skips such a step and lowers its scale, by design
        gradients = {name: value.grad for name, value in self.named_parameters() if value.grad is not None}
        # One transfer from the device answers for all gradients.
        finite = torch.stack([gradient.sum() for gradient in gradients.values()]).isfinite()
        if not bool(finite.all()):
            raise ValueError(
                f"the gradient of {list(gradients)[int((~finite).nonzero()[0])]} is not finite at step "
                f"{self.global_step}; lower method.learning_rate or train in float32 (trainer.precision=32-true)"
            )

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        step = self.global_step + 1
        super().optimizer_step(*arguments, **named)
        assert self.model is not None
        self.tuning.stepped(self.model, step)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert self.model is not None
        losses = per_sample_loss(self.model, batch)
        self.log("validation/loss", losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings = self.tuning
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        if self._protection is not None:
            self._protection.follow(optimizer)
        total = int(self.trainer.estimated_stepping_batches)
        assert self.model is not None
        self.tuning.scheduled(self.model, total)
        warmup = settings.warmup_steps
        warmup = round(settings.warmup_ratio * total) if warmup is None else warmup
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_linear, warmup=warmup, total=total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        checkpoint["state_dict"] = self.tuning.trained(self.model)
        if self._protection is not None:
            checkpoint["protection"] = self._protection.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.model is not None
        saved = Allocation.from_dict(checkpoint["hyper_parameters"]["allocation"])
        if saved != self.allocation:  # the checkpoint's weights fit the checkpoint's allocation
            bare = None if is_sharded(self._trainer) else self.tuning.taken_off(self.model)  # parts make no whole
            self.model, self._is_ready = bare, False
            self.allocation = saved
            self.configure_model()
        assert self.model is not None
        self.tuning.restore(self.model, checkpoint["state_dict"])
        self._is_begun = True
        if self._protection is not None:
            self._protection.load_state_dict(checkpoint["protection"])


def _checkpoint_blocks(base: nn.Module) -> None:
    """Keeps only the input of every block, and runs the block again in the backward pass.

    Transformers itself does so in training mode only, which would also switch on the dropout of the base.
    """
    for block in blocks(base).values():
        forward = MethodType(type(block).forward, block)
        block.forward = partial(checkpoint, forward, use_reentrant=False)


def _linear(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))
