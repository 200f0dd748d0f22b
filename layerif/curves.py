"""Training curves besides the losses: learning rate, seconds of a step, and how a LoRA-MoE routes."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import lightning as L

from layerif.moe import measure_usage
from layerif.moe.usage import UsageMeter, by_block
from layerif.tracking import log_routing


class Curves(L.Callback):
    """`train/learning_rate` of a step and `train/seconds` it took (batches alone: no validation, no saving).

    Of a LoRA-MoE also, every `trainer.log_every_n_steps` steps, the load of each expert and the entropy of the routers
    by block, over all training tokens since the last time.
    """

    def __init__(self) -> None:
        self._step = 0
        self._seconds = self._begun = 0.0
        self._measuring = ExitStack()
        self._meter: UsageMeter | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        if trainer.loggers:
            self._meter = self._measuring.enter_context(measure_usage(pl_module.model, with_grad=True))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log("train/learning_rate", trainer.optimizers[0].param_groups[0]["lr"])
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._begun
        if trainer.global_step == self._step:  # more batches make up this step
            return
        self._step = trainer.global_step
        pl_module.log("train/seconds", self._seconds)
        self._seconds = 0.0
        if self._meter is not None and self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_routing(trainer, pl_module, self._meter)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._measuring.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._measuring.close()

    def _log_routing(self, trainer: L.Trainer, pl_module: Any, meter: UsageMeter) -> None:
        usage = meter.take(lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"))  # type: ignore[arg-type]
        if usage and trainer.is_global_zero:
            # Lightning counts the steps of its own curves from 0.
            log_routing(trainer.loggers, by_block(usage, list(pl_module.allocation)), self._step - 1)
