"""What Lightning trains: a LoRA-MoE or plain LoRA built from an allocation, on the data of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from layerif.adapters import AdapterModule, equal_ranks, plain_lora
from layerif.data.batches import Encodings, collate, encode, padding_id
from layerif.data.render import Example
from layerif.data.task import Splits
from layerif.moe import LoraMoeConfig, balance_loss


class LoRAMoEModule(AdapterModule):
    """A frozen model with as many LoRA experts per block as the allocation says.

    Loss: mean over the batch of the per-sample loss, plus `balance_coefficient` times the balance loss. keep_zeros: as
    in `LoraMoeConfig`. Everything else is as in `AdapterModule`.
    """

    allocates = "experts"

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
        self.save_hyperparameters(logger=False)  # the run logs its whole configuration
        self.check()

    def adapter(self, base: nn.Module, allocation: Mapping[str, int]) -> PeftConfig:
        names = ("r", "lora_alpha", "lora_dropout", "top_k", "target_modules", "balance_coefficient", "keep_zeros")
        return LoraMoeConfig(
            num_experts=allocation, task_type="CAUSAL_LM", **{name: self.hparams[name] for name in names}
        )

    def extra_loss(self, num_samples: int) -> Tensor | float:
        coefficient = self.hparams["balance_coefficient"]
        if not coefficient:
            return 0.0
        assert self.model is not None
        balance = balance_loss(self.model)
        self.log("train/balance", balance, batch_size=num_samples)
        return coefficient * balance


class LoRAModule(AdapterModule):
    """A frozen model with plain PEFT LoRA, of the rank in each block that the allocation says.

    scaling: α/r, the same in every block whatever its rank, so that a block of a higher rank does not also learn with
    a larger factor (`alpha_pattern` follows `rank_pattern`); 2 is the paper's 16/8. Everything else is as in
    `AdapterModule`.
    """

    allocates = "rank"

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        scaling: float = 2.0,
        lora_dropout: float = 0.05,
        target_modules: list[str] | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        warmup_steps: int | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        allocation: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run logs its whole configuration
        self.check()

    def adapter(self, base: nn.Module, allocation: Mapping[str, int]) -> PeftConfig:
        return plain_lora(base, allocation, **{name: self.hparams[name] for name in _PLAIN})


class EqualLoRAModule(AdapterModule):
    """Plain LoRA as large as the LoRA-MoE that this allocation of experts would make: the same rank in every block,
    save that the first blocks have one more where that comes nearer to its number of trainable parameters.

    r: the rank of an expert of that LoRA-MoE, whose parameters, routers included, the record states as `lora_moe`
    beside the trainable ones here. scaling: as in `LoRAModule`.
    """

    allocates = "experts"

    def __init__(
        self,
        model: Mapping[str, Any],
        *,
        r: int = 8,
        scaling: float = 2.0,
        lora_dropout: float = 0.05,
        target_modules: list[str] | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.03,
        warmup_steps: int | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        allocation: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the run logs its whole configuration
        self.check()

    def adapter(self, base: nn.Module, allocation: Mapping[str, int]) -> PeftConfig:
        ranks, self.compared = equal_ranks(
            base, allocation, r=self.hparams["r"], targets=self.hparams["target_modules"]
        )
        return plain_lora(base, ranks, **{name: self.hparams[name] for name in _PLAIN})


_PLAIN = ("scaling", "lora_dropout", "target_modules")


class TaskDataModule(L.LightningDataModule):
    """A task's train and validation splits as batches for fine-tuning.

    batch_size: samples a device sees at once; times devices and `trainer.accumulate_grad_batches` it is the real batch.
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
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        self.splits, self.tokenizer = splits, tokenizer
        self.batch_size, self.drop_partial, self.seed = batch_size, drop_partial, seed
        self._start = 0
        self._sampler: EpochShuffle | None = None

        def encoded(examples: Sequence[Example]) -> Encodings:
            return encode(examples, tokenizer, template=template, max_length=max_length, loss_on=loss_on, eos=True)

        self.train, self.validation = encoded(splits.train), encoded(splits.validation)

    def train_dataloader(self) -> DataLoader:
        count = len(self.train)
        rank, size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.drop_partial:
            accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
            count -= count % (self.batch_size * accumulated * size)
            if count == 0:
                raise ValueError(
                    f"data.drop_partial=true leaves nothing of {len(self.train)} samples at data.batch_size="
                    f"{self.batch_size} × {accumulated} accumulated × {size} processes; use a smaller batch or "
                    "drop_partial=false"
                )
        self._sampler = EpochShuffle(
            len(self.train), count, self.seed, self._start, lambda: self._epoch, rank=rank, num_processes=size
        )
        return DataLoader(self.train, self.batch_size, sampler=self._sampler, collate_fn=self._collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=self.batch_size, collate_fn=self._collate)  # type: ignore[arg-type]

    @property
    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    # Lightning's own restart in the middle of an epoch keeps its counters but begins the data anew.
    def state_dict(self) -> dict[str, int]:
        return {"drawn": self._sampler.drawn % len(self._sampler)} if self._sampler else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._start = state_dict["drawn"]

    def _collate(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        return collate(samples, padding_id(self.tokenizer), side="left")


class EpochShuffle(DistributedSampler):
    """The share of one process in `count` of `size` positions, in an order that is a function of (seed, epoch).

    Positions are dealt out in turn: what all processes draw at a step is what one would draw in a batch as large. All
    draw equally many, so that the first of an order come twice where `count` cannot be dealt out evenly.

    drawn: how many of the epoch were taken here; the first epoch begins at `start`, for a run resumed in its middle.
    epoch: asked when one begins. Lightning's `set_epoch` is one ahead in a run resumed from the end of an epoch.

    A DistributedSampler, because Lightning wraps any other in one that draws a whole epoch when it begins: `drawn`
    would then tell nothing.
    """

    def __init__(
        self,
        size: int,
        count: int,
        seed: int,
        start: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        *,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        super().__init__(range(count), num_processes, rank, seed=seed)  # type: ignore[arg-type]
        self.size, self.count, self.current_epoch = size, count, epoch
        self.start = self.drawn = start

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.current_epoch())
        order = torch.randperm(self.size, generator=generator)[: self.count]
        mine = order[torch.arange(self.rank, self.total_size, self.num_replicas) % self.count]
        self.drawn, self.start = self.start, 0
        for position in mine[self.drawn :].tolist():
            self.drawn += 1
            yield position
