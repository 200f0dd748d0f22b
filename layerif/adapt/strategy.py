"""Fine-tuning of a model that does not fit one device: frozen weights are divided, the adapter is in every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from layerif.probe.grams.processes import spread


class ShardedBase(DDPStrategy):
    """Lightning's strategy behind `trainer.strategy=fsdp`.

    Every process holds its part of the frozen weights (PyTorch's FSDP2, block by block), gathers those of the block
    that runs, and holds all of the adapter. So a checkpoint, an optimiser and an exported adapter are those of one
    process. The gradients of the adapter are averaged before each step. Every process reads all weights into main
    memory before they are divided.

    Args:
        **settings: of `DDPStrategy`: `timeout`, `process_group_backend` and others.
    """

    def shard(self, model: nn.Module) -> None:
        """Divides the frozen weights of a model among all processes, and moves the others to this process's device."""
        whole = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in whole:
            parameter.data = parameter.data.to(self.root_device)
        spread(model, self.root_device, whole=whole)

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replaces the gradients of these parameters by their means over all processes; no gradient counts as zero."""
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            mine = [parameter for parameter in parameters if parameter.dtype == dtype]
            gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in mine]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.world_size
            for parameter, mean in zip(mine, flat.split([each.numel() for each in mine]), strict=True):
                parameter.grad = mean.view_as(parameter)

    def setup(self, trainer: L.Trainer) -> None:
        # As Lightning's, without DDP around the model, and without the first process's weights for all.
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.model)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def teardown(self) -> None:
        # As Lightning's for models in parts, which stay where they are.
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator):
            assert part is not None
            part.teardown()


def is_sharded(trainer: Any) -> bool:
    """Tells if a trainer divides the frozen weights among processes."""
    return isinstance(getattr(trainer, "strategy", None), ShardedBase)
