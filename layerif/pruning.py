"""Pruning as Lightning runs it, one block a step, and everything around it: decide, prune, keep, evaluate, recover."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import pandas as pd
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader

from layerif.allocate.allocation import Allocation, spent_budget
from layerif.callback import InfluenceCallback
from layerif.checks import check_choice
from layerif.data.text import check_disjoint
from layerif.decide import Allocator, Decider
from layerif.files import carried_on, read_json
from layerif.fit import evaluate, keeping, run_trainer, train
from layerif.models.blocks import blocks, context_length
from layerif.models.pretrained import Local, Pretrained
from layerif.modules import LoRAMoEModule
from layerif.parts import Parts
from layerif.prune import Pruner
from layerif.prune.semi_structured import speed_of_two_four
from layerif.prune.targets import matrices, sparsities, targets
from layerif.prune.walk import Offload, Walk
from layerif.pruning_new.calibration import Calibration
from layerif.record.record import RunRecord

log = logging.getLogger(__name__)

Recovery = Literal["none", "lora", "lora_moe"]

# What one step a block needs, whatever the configuration says of fine-tuning. No autocast: `model.dtype` decides.
_TRAINER: dict[str, Any] = {
    "max_epochs": 1,
    "max_steps": -1,
    "limit_train_batches": 1.0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "precision": "32-true",
}
_ZEROS_ALONE = (
    "zeros alone save neither time nor memory: the pruned folder is as large and as slow as the dense one; "
    "2:4 (pruner.n=2 pruner.m=4) on a GPU with method.semi_structured=true measures torch's format for it"
)


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
        carried_on(folder, [self.job, dict(self.allocation)])
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


def prune(parts: Parts, module: PruneModule, record: RunRecord, folder: Path) -> None:
    """Scores, sparsities, pruning, evaluation, and if asked recovery.

    Leaves `model/` for plain transformers, `sparsity.csv`, and of a recovery `recovered/` or `adapter/`.
    """
    check_pruning(parts, module)
    device = parts.decider.device
    influence = InfluenceCallback(parts.decider)
    trainer = parts.trainer([influence], folder, **_TRAINER)
    if trainer.world_size > 1:
        raise ValueError(f"pruning works on one device, got {trainer.world_size}; use trainer.devices=1")
    if parts.evaluation.before:
        evaluate(module.base_model().to(device), parts, record, "before/")
    start = time.perf_counter()
    module.job = record.identity
    with keeping(influence, record):
        run_trainer(trainer, module)
    assert module.walk is not None
    if influence.decision is None:
        _keep_given(module, record)
    record.seconds["prune"] = module.walk.seconds_before + time.perf_counter() - start - influence.seconds
    if module.walk.num_replayed:
        record.notes.append(f"{module.walk.num_replayed} blocks were pruned by a run that did not finish")
    model = module.base_model()
    _keep_sparsity(model, module, record, folder)
    if module.save:
        _save(model, parts, folder / "model")
    model.to(device)
    if module.semi_structured:
        _measure_two_four(model, module, record)
    record.notes.append(_ZEROS_ALONE)
    evaluate(model, parts, record, "pruned/" if module.recover != "none" else "")
    if module.recover != "none":
        module._loaded.clear()
        del model
        _recover(parts, module, record, folder)


def check_pruning(parts: Parts, module: PruneModule) -> str:
    """What will be pruned, in a sentence. Raises ValueError for all that can be refused before any weight is read."""
    pruner, decider, allocation = module.pruner, parts.decider, module.allocation
    if allocation is None:
        _refuse_nothing_to_allocate(pruner, decider)
        allocation = decider.rehearse(decider.layers()).by_name()
    skeleton = parts.model.skeleton()
    targets(skeleton, allocation, pruner)
    numel = sum(module.weight.numel() for module in matrices(skeleton).values())
    said = f"{type(pruner).__name__}, {len(matrices(skeleton))} matrices of {numel:,} parameters together"
    if "perplexity" in parts.evaluation.metrics and pruner.needs_inputs:
        check_disjoint(module.calibration.text, parts.evaluation.text)
    if pruner.needs_inputs:
        windows = module.windows()
        said += f", {sum(map(len, windows))} calibration windows of {module.calibration.window} tokens"
    if module.recover != "none":  # settings of the fine-tuning that only its making checks
        parts.datamodule()
        experts = dict.fromkeys(blocks(skeleton), 1)
        if module.recover == "lora_moe":
            assert module.experts is not None
            given = replace(decider, allocator=module.experts).rehearse(decider.layers())
            if given.kind != "experts":
                raise ValueError(f"method.experts must allocate experts, got {given.kind}")
            experts = given.by_name()
        _adapted(module, Local(path=""), None).rehearse(skeleton, experts)
    return said


def _refuse_nothing_to_allocate(pruner: Pruner, decider: Decider) -> None:
    measures = decider.estimator.needs != "nothing" and getattr(decider.allocator, "needs_scores", True)
    if pruner.n is not None and measures:
        raise ValueError(
            f"pruner.n={pruner.n} pruner.m={pruner.m} removes the same of every layer and leaves nothing to allocate; "
            "use estimator=uniform, or pruner.n=null for an n per block from the scores"
        )


def _keep_given(module: PruneModule, record: RunRecord) -> None:
    """An allocation that nobody decided, matrix by matrix."""
    numel = {name: linear.weight.numel() for name, linear in matrices(module.base_model()).items()}
    values = sparsities(numel, module.allocation or {})
    spent = spent_budget("sparsity", list(values.values()), list(numel.values()))
    given = Allocation(tuple(numel), "sparsity", tuple(values.values()), spent, tuple(numel.values()))
    record.layers, record.allocation, record.source = list(numel), given.to_dict(), "method.allocation"


def _keep_sparsity(model: nn.Module, module: PruneModule, record: RunRecord, folder: Path) -> None:
    assert module.walk is not None
    found = matrices(model)
    wanted = {f"{block}.{name}": target for block, of in module.walk.targets.items() for name, target in of.items()}
    rows = []
    for name, linear in found.items():
        target = wanted[name]
        goal = target.sparsity if target.n is None else 1 - target.n / module.pruner.m  # type: ignore[operator]
        zeros, numel = int((linear.weight == 0).sum()), linear.weight.numel()
        rows.append({"matrix": name, "parameters": numel, "zeros": zeros, "target": goal, "sparsity": zeros / numel})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "sparsity.csv", index=False)
    record.sparsity = dict(zip(table["matrix"], table["sparsity"].tolist(), strict=True))
    zeros, pruned = (sum(row[column] for row in rows) for column in ("zeros", "parameters"))
    record.metrics["sparsity"] = zeros / pruned
    total = sum(parameter.numel() for parameter in model.parameters())
    record.parameters = {"total": total, "pruned": pruned, "zero": zeros}
    budget = record.allocation["budget"]
    if abs(zeros / pruned - budget) > 1 / pruned:
        record.notes.append(
            f"sparsity {zeros / pruned:.6f} where the allocation asks for {budget:.6f}: "
            + (
                f"n of {module.pruner.m} comes no nearer"
                if module.pruner.m
                else "some weights were zero before or had inputs that never act"
            )
        )


def _save(model: nn.Module, parts: Parts, folder: Path) -> None:
    try:
        model.save_pretrained(folder)  # type: ignore[operator]
    except (OSError, SafetensorError) as error:  # the second is what a full disk becomes in there
        raise OSError(
            f"cannot write the pruned model to {folder}: {error}; free some space and give the same "
            "command again (no block is pruned twice), or use method.save=false"
        ) from error
    parts.tokenizer.save_pretrained(folder)


def _measure_two_four(model: nn.Module, module: PruneModule, record: RunRecord) -> None:
    tokens = module.calibration.window * module.calibration.batch_size
    try:
        record.metrics["semi_structured_speed"] = speed_of_two_four(matrices(model), tokens)
    except ValueError as error:
        log.warning("%s", error)
        record.notes.append(str(error))


def _recover(parts: Parts, module: PruneModule, record: RunRecord, folder: Path) -> None:
    """Fine-tune the pruned model in `folder`/model on the task."""
    pruned = Local(path=str(folder / "model"), dtype=module.source.dtype, attention=module.source.attention)
    one_each = dict.fromkeys(parts.decider.layers().names, 1)
    adapted = _adapted(module, pruned, one_each if module.recover == "lora" else None)
    influence = InfluenceCallback(
        parts.decider if module.experts is None else replace(parts.decider, model=pruned, allocator=module.experts)
    )
    sizes = record.parameters
    model = train(parts, adapted, influence, record, folder)
    record.parameters = sizes | record.parameters
    record.recovery = {
        "method": module.recover,
        "experts": dict(adapted.allocation or {}),
        "decision": influence.state_dict(),
    }
    if module.recover == "lora":
        zeros = {name: linear.weight == 0 for name, linear in matrices(Local(path=pruned.path).load()).items()}
        model = model.cpu().merge_and_unload()
        for name, linear in matrices(model).items():
            assert bool((linear.weight[zeros[name]] == 0).all()), name
        _save(model, parts, folder / "recovered")
    evaluate(model.to(parts.decider.device), parts, record, "")


def _adapted(module: PruneModule, pruned: Local, allocation: Mapping[str, int] | None) -> LoRAMoEModule:
    """What fine-tunes the pruned model."""
    assert module.adapter is not None
    kept = {key: getattr(pruned, key) for key in ("path", "dtype", "attention")}
    config = {"_target_": "layerif.models.pretrained.Local", **kept}
    adapted = module.adapter(model=config, allocation=allocation)
    if not adapted.hparams["keep_zeros"]:
        raise ValueError(
            "method.adapter.keep_zeros=false would fill the zeros that pruning made; leave it true, or use "
            "method.recover=none and fine-tune the pruned folder by itself (model=local model.path=FOLDER/model)"
        )
    return adapted


def _read_allocation(file: str) -> Mapping[str, float]:
    found = read_json(file, what="method.allocation file")
    if not isinstance(found, Mapping):
        raise ValueError(
            f"method.allocation file {file!r} must hold {{block or matrix: sparsity}}, got a {type(found).__name__}; "
            "a list per block or a record goes by allocator=file allocator.kind=sparsity"
        )
    return found
