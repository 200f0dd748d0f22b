"""Lightning's side of training: the data of a task and a LoRA-MoE built from an allocation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from layerif.data.batches import Encodings, collate, encode, padding_id
from layerif.data.task import Example, Splits
from layerif.loss import per_sample_loss
from layerif.moe import LoraMoeConfig, balance_loss
from layerif.probe import first_non_finite_block


class LoRAMoEModule(L.LightningModule):
    """A frozen model with as many LoRA experts per block as the allocation says.

    Loss: mean over the batch of the per-sample loss, plus `balance_coefficient` times the balance loss.
    Optimiser: AdamW; the learning rate rises linearly over `warmup_ratio` of the steps (or exactly `warmup_steps`,
    where given) and falls linearly to zero.

    model: a configuration with `_target_`, so that a checkpoint can rebuild it. allocation: experts by block name;
    None until the influence callback decides. keep_zeros: as in `LoraMoeConfig`. Checkpoints hold the adapter alone.
    """

    allocates = "experts"  # the kind of allocation this method spends

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.05,
        top_k: int = 2,
        target_modules: list[str] | None = None,
        balance_coefficient: float = 0.0,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        warmup_steps: int | None = None,
        gradient_checkpointing: bool = False,
        keep_zeros: bool = False,
        seed: int = 0,
        allocation: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_ratio < 1:
            raise ValueError(
                f"method.warmup_ratio={warmup_ratio} must lie in [0, 1); for steps use method.warmup_steps"
            )
        if model.get("adapter"):
            raise ValueError(
                f"method=lora_moe cannot build on model.adapter={model['adapter']!r}; merge the adapter into a folder "
                "of its own (PEFT's merge_and_unload) and use model=local, or score it with method=none"
            )
        self.save_hyperparameters()
        self.strict_loading = False  # the frozen base is not in the checkpoint
        self.model: nn.Module | None = None

    @property
    def allocation(self) -> dict[str, int] | None:
        return self.hparams["allocation"]

    @allocation.setter
    def allocation(self, experts: Mapping[str, int]) -> None:
        self.hparams["allocation"] = dict(experts)

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
                "the module has no allocation yet: pass allocation={block: experts}, "
                "or add an InfluenceCallback to the trainer"
            )
        hparams = self.hparams
        config = LoraMoeConfig(
            r=hparams["r"],
            lora_alpha=hparams["lora_alpha"],
            lora_dropout=hparams["lora_dropout"],
            top_k=hparams["top_k"],
            target_modules=hparams["target_modules"],
            balance_coefficient=hparams["balance_coefficient"],
            keep_zeros=hparams["keep_zeros"],
            num_experts=self.allocation,
            task_type="CAUSAL_LM",
        )
        base = self.base_model()
        if hparams["gradient_checkpointing"]:
            base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
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
        coefficient = self.hparams["balance_coefficient"]
        if coefficient:
            balance = balance_loss(self.model)
            self.log("train/balance", balance, batch_size=len(batch["labels"]))
            loss = loss + coefficient * balance
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
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
        if saved != self.allocation:  # the checkpoint's experts are the ones its weights fit
            self.model = self.model.unload()  # type: ignore[operator]
            self.allocation = saved
            self.configure_model()
        set_peft_model_state_dict(self.model, checkpoint["state_dict"])


class TaskDataModule(L.LightningDataModule):
    """A task's train and validation splits as batches for fine-tuning.

    batch_size: samples a device sees at once; with `trainer.accumulate_grad_batches` it makes the real batch.
    drop_partial: leave out the samples that would make the last batch of an epoch smaller (upstream does).
    Shuffled by (seed, epoch). Samples cut at `max_length` tokens are counted in `train.num_truncated` and
    `validation.num_truncated`.
    """

    def __init__(
        self,
        splits: Splits,
        tokenizer: Any,
        *,
        template: Literal["plain", "alpaca"] = "alpaca",
        batch_size: int = 16,
        max_length: int = 256,
        loss_on: Literal["all", "output"] = "all",
        drop_partial: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.splits, self.tokenizer = splits, tokenizer
        self.batch_size, self.drop_partial, self.seed = batch_size, drop_partial, seed
        self._start = 0
        self._sampler: EpochShuffle | None = None

        def encoded(examples: Sequence[Example]) -> Encodings:
            return encode(examples, tokenizer, template=template, max_length=max_length, loss_on=loss_on, eos=True)

        self.train, self.validation = encoded(splits.train), encoded(splits.validation)

    def train_dataloader(self) -> DataLoader:
        count = len(self.train)
        if self.drop_partial:
            accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
            count -= count % (self.batch_size * accumulated)
            if count == 0:
                raise ValueError(
                    f"data.drop_partial=true leaves nothing of {len(self.train)} samples at data.batch_size="
                    f"{self.batch_size} × {accumulated} accumulated; use a smaller batch or drop_partial=false"
                )
        self._sampler = EpochShuffle(len(self.train), count, self.seed, self._start)
        return DataLoader(self.train, self.batch_size, sampler=self._sampler, collate_fn=self._collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=self.batch_size, collate_fn=self._collate)  # type: ignore[arg-type]

    # Lightning's own restart in the middle of an epoch keeps its counters but begins the data anew.
    def state_dict(self) -> dict[str, int]:
        return {"drawn": self._sampler.drawn % len(self._sampler)} if self._sampler else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._start = state_dict["drawn"]

    def _collate(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        return collate(samples, padding_id(self.tokenizer), side="left")


class EpochShuffle(Sampler[int]):
    """`count` of `size` positions in an order that is a function of (seed, epoch).

    drawn: how many of the epoch were taken; the first epoch begins at `start`, for a run resumed in its middle.
    """

    def __init__(self, size: int, count: int, seed: int, start: int = 0) -> None:
        self.size, self.count, self.seed = size, count, seed
        self.start = self.drawn = start
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator)[: self.count]
        self.drawn, self.start = self.start, 0
        for position in order[self.drawn :].tolist():
            self.drawn += 1
            yield position


def _linear(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))
