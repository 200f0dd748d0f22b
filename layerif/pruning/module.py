"""Pruning as Lightning runs it, one block a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.utils.data import DataLoader

from layerif.adapt.adapters import LoRAMoEModule
from layerif.allocate import Allocator
from layerif.checks import check_choice
from layerif.files import claim_folder, read_json
from layerif.models.blocks import blocks, context_length
from layerif.models.pretrained import Pretrained
from layerif.pruning import Pruner
from layerif.pruning.calibration import Calibration
from layerif.pruning.targets import targets
from layerif.pruning.walk import Offload, Walk

log = logging.getLogger(__name__)


Recovery = Literal["none", "lora", "lora_moe"]


class PruneModule(L.LightningModule):
    """A model that loses, block by block, the fraction of its weights that the allocation says.

    calibration: the text that Wanda and SparseGPT look at. offload: where activations wait between blocks: the
    `device`, the `cpu` or the `disk`. recover: fine-tune the pruned model on the task, its zeros kept: `lora` merges
    into a folder `recovered`; `lora_moe` spends the budget of `experts` by scores of the pruned model and leaves an
    adapter. adapter: makes the module for that. semi_structured: time torch's 2:4 format (needs CUDA). save: leave the
    pruned model in the run's folder.
    allocation: sparsity by block or matrix, or the path of a JSON file with it; None: the influence callback decides.
    """

    allocates = "sparsity"

    def __init__(
        self,
        model: Pretrained,
        pruner: Pruner,
        calibration: Calibration,
        *,
        offload: Offload = "cpu",
        recover: Recovery = "none",
        adapter: Callable[..., LoRAMoEModule] | None = None,
        experts: Allocator | None = None,
        semi_structured: bool = False,
        save: bool = True,
        allocation: Mapping[str, float] | str | None = None,
    ) -> None:
        super().__init__()
        check_choice("method.offload", offload, get_args(Offload))
        check_choice("method.recover", recover, get_args(Recovery))
        if recover != "none" and (adapter is None or (recover == "lora_moe" and experts is None)):
            raise ValueError(f"method.recover={recover} needs method.adapter (and method.experts for lora_moe)")
        if recover != "none" and not save:
            raise ValueError(f"method.recover={recover} starts from the saved model; use method.save=true")
        if model.adapter:
            raise ValueError(
                f"method=prune cannot prune through model.adapter={model.adapter!r}; merge the adapter into a folder "
                "of its own (PEFT's merge_and_unload) and use model=local"
            )
        self.source, self.pruner, self.calibration = model, pruner, calibration
        self.offload: Offload = offload
        self.recover: Recovery = recover
        self.adapter, self.experts = adapter, experts
        self.semi_structured, self.save = semi_structured, save
        self.allocation: Mapping[str, float] | None = (
            _read_allocation(allocation) if isinstance(allocation, str) else allocation
        )
        self.job: Any = None  # what the saved blocks of a killed run must agree with
        self.walk: Walk | None = None
        self.num_walked = 0
        self._loaded: list[nn.Module] = []  # in a list, or Lightning would move all of it to the device

    def base_model(self) -> nn.Module:
        """The bare model, loaded once: scored as a whole, then pruned block by block on the CPU."""
        if not self._loaded:
            self._loaded.append(self.source.load())
        return self._loaded[0]

    def on_fit_start(self) -> None:
        if self.allocation is None:
            raise ValueError(
                "the module has no allocation yet: pass allocation={block: sparsity}, "
                "or add an InfluenceCallback to the trainer"
            )
        model = self.base_model().cpu()
        folder = Path(self.trainer.default_root_dir) / "blocks"
        claim_folder(folder, [self.job, dict(self.allocation)])
        self.walk = Walk(
            model,
            self.pruner,
            targets(model, self.allocation, self.pruner),
            self.windows() if self.pruner.needs_inputs else [],
            folder,
            self.trainer.strategy.root_device,
            self.offload,
        )
        if self.walk.num_finished:
            log.info("%d of %d blocks are pruned already", self.walk.num_finished, len(self.walk.blocks))

    def windows(self) -> list[Any]:
        return self.calibration.batches(self.source.tokenizer(), context_length(self.source.skeleton()))

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
                f"the trainer stopped after {self.num_walked} of {len(self.walk.blocks)} blocks; pruning needs all of "
                "them: leave out what stops it early (max_time, fast_dev_run, overfit_batches)"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return None


def _read_allocation(file: str) -> Mapping[str, float]:
    found = read_json(file, what="method.allocation file")
    if not isinstance(found, Mapping):
        raise ValueError(
            f"method.allocation file {file!r} must hold {{block or matrix: sparsity}}, got a {type(found).__name__}; "
            "a list per block or a record goes by allocator=file allocator.kind=sparsity"
        )
    return found
