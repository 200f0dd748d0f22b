"""The module that Lightning prunes with, one block a step; and allocations of sparsity given by hand."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.utils.data import DataLoader

from layerif.allocate.allocation import Allocation, spent_budget
from layerif.checks import check_choice
from layerif.files import claim_folder
from layerif.models.blocks import blocks, context_length
from layerif.models.pretrained import Pretrained
from layerif.pruning import Pruner
from layerif.pruning.calibration import Calibration
from layerif.pruning.targets import matrices, most_specific, sparsities, targets
from layerif.pruning.walk import ActivationPlace, Walk

log = logging.getLogger(__name__)

BLOCKS = "blocks"  # a folder below the run's; the run removes it once its record stands


class PruneModule(L.LightningModule):
    """A model that loses, block by block, the fraction of its weights that the allocation says.

    Args:
        model: where the model comes from.
        pruner: decides which weights go.
        calibration: the text that Wanda and SparseGPT look at.
        offload: where activations wait between blocks: on the `device`, the `cpu` or the `disk`.
        allocation: of sparsity, by block or matrix; None: the influence callback decides.
        job: what the saved blocks of a killed run must agree with.
    """

    def __init__(
        self,
        model: Pretrained,
        pruner: Pruner,
        calibration: Calibration,
        *,
        offload: ActivationPlace = "cpu",
        allocation: Allocation | None = None,
        job: Any = None,
    ) -> None:
        super().__init__()
        check_choice("method.offload", offload, get_args(ActivationPlace))
        self.source, self.pruner, self.calibration = model, pruner, calibration
        self.offload: ActivationPlace = offload
        self.allocation = allocation
        self.job = job
        self.walk: Walk | None = None
        self.num_walked = 0
        self._loaded: list[nn.Module] = []  # in a list, or Lightning would move the whole model to the device

    def base_model(self) -> nn.Module:
        """Loads the bare model once: it is scored as a whole, then pruned block by block on the CPU."""
        if not self._loaded:
            self._loaded.append(self.source.load())
        return self._loaded[0]

    def free_model(self) -> None:
        """Drops the model, so that its memory is free once nobody else holds it."""
        self._loaded.clear()

    def windows(self) -> list[Any]:
        """Cuts the calibration windows, as token ids (batch × window)."""
        return self.calibration.batches(self.source.tokenizer(), context_length(self.source.skeleton()))

    def on_fit_start(self) -> None:
        if self.allocation is None:
            raise ValueError(
                "the module has no allocation yet: pass allocation=Allocation(…) of kind sparsity, "
                "or add an InfluenceCallback to the trainer"
            )
        model, by_name = self.base_model().cpu(), self.allocation.by_name()
        folder = Path(self.trainer.default_root_dir) / BLOCKS
        claim_folder(folder, [self.job, by_name])
        self.walk = Walk(
            model,
            self.pruner,
            targets(model, by_name, self.pruner),
            self.windows() if self.pruner.needs_inputs else [],
            folder,
            self.trainer.strategy.root_device,
            self.offload,
        )
        if self.walk.num_finished:
            log.info("%d of %d blocks are pruned already", self.walk.num_finished, len(self.walk.blocks))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(len(blocks(self.base_model()))), batch_size=None)  # type: ignore[arg-type]

    def training_step(self, index: int, batch_idx: int) -> None:
        assert self.walk is not None
        self.walk(index)
        self.num_walked = index + 1

    def on_fit_end(self) -> None:  # runs even where no step was taken
        assert self.walk is not None
        if self.num_walked < len(self.walk.blocks):
            raise ValueError(
                f"the trainer stopped after {self.num_walked} of {len(self.walk.blocks)} blocks, and pruning needs all "
                "of them; leave out the setting that stops it early (max_time, fast_dev_run, overfit_batches)"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return None


def given_allocation(by_name: Mapping[str, float], model: nn.Module) -> Allocation:
    """Turns sparsities that a user wrote down into an allocation.

    Args:
        by_name: sparsity by block or matrix; a matrix's own name goes before its block's.
        model: the model or its skeleton.

    Returns:
        The allocation of those names that decide about at least one matrix; each is as large as the matrices that it
        decides about.

    Raises:
        ValueError: as `layerif.pruning.targets.targets` does for names and sparsities.
    """
    found = matrices(model)
    sparsities(found, by_name)
    sizes = dict.fromkeys(by_name, 0)
    for name, linear in found.items():
        sizes[most_specific(name, by_name)] += linear.weight.numel()
    units = tuple(name for name in by_name if sizes[name])
    values, weights = tuple(by_name[name] for name in units), tuple(sizes[name] for name in units)
    return Allocation(units, "sparsity", values, spent_budget("sparsity", values, weights), weights)
