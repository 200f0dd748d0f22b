"""Training curves of losses, learning rate, seconds per step and routing, which a resumed run continues; its cost."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from torch import Tensor

from layerif.compat import logged_step, set_logged_step
from layerif.files import whole
from layerif.layers import block_of
from layerif.models.memory import PeakMemory
from layerif.moe import measure_usage
from layerif.moe.usage import UsageMeter, usage_by_block
from layerif.record.tracking import log_again, log_routing


class TrainingCurves(L.Callback):
    """Logs the learning rate of each step and the seconds of its batches, without validation and saving.

    For a LoRA-MoE it also logs, every `trainer.log_every_n_steps` steps, the load of each expert and the entropy of the
    routers by block, over all training tokens since the last time.

    Loggers begin anew with every process. A resumed run has to show the past of its checkpoint as well, so everything
    that is logged is also written to a file, each row before the checkpoint of its step (Lightning logs a step after
    the checkpoint). The checkpoint holds the number of rows, their checksum and the seconds of fitting before it, and
    the routers' use since the last row.

    The cost of training is that of this process alone: the seconds of a step, and the memory before and after each
    backward pass, where it is at its highest.

    Args:
        file: of the rows, one JSON object a line.
    """

    def __init__(self, file: Path) -> None:
        self.seconds_before = 0.0  # spent fitting before the checkpoint that this process began with
        self._file, self._num_rows, self._checksum = file, 0, hashlib.sha256()
        self._expected: str | None = None  # the checksum of the rows before the checkpoint
        self._step = 0
        self._seconds = self._begun = self._fit_begun = 0.0
        self._of_steps: list[float] = []
        self._memory: PeakMemory | None = None
        self._measuring = ExitStack()
        self._meter: UsageMeter | None = None
        self._usage: dict[tuple[str, ...], Tensor] = {}  # the meter's sums at the checkpoint

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._fit_begun = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        seconds = self.seconds_before + time.perf_counter() - self._fit_begun
        usage = self._meter.state() if self._meter else {}
        rows = {"num_rows": self._num_rows, "checksum": self._checksum.hexdigest()}
        return {"seconds": seconds, **rows, "usage": usage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds_before, self._num_rows = state_dict["seconds"], state_dict["num_rows"]
        self._expected, self._usage = state_dict.get("checksum"), state_dict["usage"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Training never starts where the run was killed after its last step, and its past is shown all the same.
        if trainer.loggers and trainer.is_global_zero:
            log_again(trainer.loggers, self._kept())

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        self._memory = PeakMemory(pl_module.device)
        if not trainer.loggers:
            return
        self._meter = self._measuring.enter_context(measure_usage(pl_module.model, with_grad=True))
        if trainer.is_global_zero:
            self._meter.restore(self._usage)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # Lightning counts one step too many for curves in a run that resumes from the end of an epoch.
        set_logged_step(trainer, trainer.global_step)
        pl_module.log("train/learning_rate", trainer.optimizers[0].param_groups[0]["lr"])
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._begun
        if trainer.global_step == self._step:  # this step has more batches
            return
        self._step = trainer.global_step
        pl_module.log("train/seconds", self._seconds)
        self._of_steps.append(self._seconds)
        self._seconds = 0.0
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and every and self._step % every == 0:
            self._log_routing(trainer, pl_module)
            self._keep_logged(trainer, "train/")

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self._look()

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._look()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.loggers and trainer.state.fn == "fit":
            self._keep_logged(trainer, "validation/")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._measuring.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._measuring.close()

    def cost(self) -> dict[str, Any]:
        """Returns the median of the seconds of a step, and the peak of the memory; empty where there was no step."""
        if not self._of_steps or self._memory is None:
            return {}
        memory = {"memory_gb": self._memory.gigabytes, "memory_of": self._memory.of}
        return {"seconds_per_step": median(self._of_steps), **memory}

    def _look(self) -> None:
        if self._memory is not None:
            self._memory.look()

    def _log_routing(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert self._meter is not None
        usage = self._meter.take(lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"))  # type: ignore[arg-type]
        if usage and trainer.is_global_zero:
            routing = usage_by_block(usage, list(dict.fromkeys(map(block_of, pl_module.allocation.units))))
            log_routing(trainer.loggers, routing, logged_step(trainer))
            self._keep({"step": logged_step(trainer), "routing": routing})

    def _keep_logged(self, trainer: L.Trainer, prefix: str) -> None:
        """Keeps the values that Lightning has for the loggers or has already given them."""
        values = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith(prefix)}
        if values and trainer.is_global_zero:
            self._keep({"step": logged_step(trainer), "metrics": {**values, "epoch": trainer.current_epoch}})

    def _keep(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row) + "\n").encode()
        with self._file.open("ab") as opened:
            opened.write(line)
        self._num_rows += 1
        self._checksum.update(line)

    def _kept(self) -> list[dict[str, Any]]:
        """Returns the rows before the checkpoint, and drops later ones, which will be logged again."""
        content = self._file.read_bytes() if self._file.exists() else b""
        lines = content.splitlines(keepends=True)[: self._num_rows]
        self._checksum = hashlib.sha256(b"".join(lines))
        if self._expected not in (None, self._checksum.hexdigest()):
            warnings.warn(f"{self._file} is damaged: the curves before the checkpoint are lost", stacklevel=2)
            lines, self._checksum = [], hashlib.sha256()
        with whole(self._file) as unfinished:
            unfinished.write_bytes(b"".join(lines))
        self._num_rows = len(lines)
        return [json.loads(line) for line in lines]
