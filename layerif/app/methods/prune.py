"""`method=prune`: decide, prune, keep, evaluate, and recover."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from layerif.adapt.adapters import LoRAMoEModule
from layerif.adapt.callback import InfluenceCallback
from layerif.adapt.train import run_trainer, train
from layerif.allocate.allocation import Allocation, spent_budget
from layerif.app.methods._steps import evaluate, keeping
from layerif.app.setup import Parts
from layerif.data.text import check_disjoint
from layerif.decide import Decider
from layerif.files import full_disk_explained
from layerif.models.blocks import blocks
from layerif.models.pretrained import LocalModel
from layerif.pruning import Pruner
from layerif.pruning.module import PruneModule, log
from layerif.pruning.semi_structured import speed_of_two_four
from layerif.pruning.targets import matrices, sparsities, targets
from layerif.record.record import RunRecord

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
        _adapted(module, LocalModel(path=""), None).rehearse(skeleton, experts)
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
    advice = "free some space and give the same command again (no block is pruned twice), or use method.save=false"
    with full_disk_explained(f"the pruned model to {folder}", advice):
        model.save_pretrained(folder)  # type: ignore[operator]
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
    pruned = LocalModel(path=str(folder / "model"), dtype=module.source.dtype, attention=module.source.attention)
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
        zeros = {name: linear.weight == 0 for name, linear in matrices(LocalModel(path=pruned.path).load()).items()}
        model = model.cpu().merge_and_unload()
        for name, linear in matrices(model).items():
            assert bool((linear.weight[zeros[name]] == 0).all()), name
        _save(model, parts, folder / "recovered")
    evaluate(model.to(parts.decider.device), parts, record, "")


def _adapted(module: PruneModule, pruned: LocalModel, allocation: Mapping[str, int] | None) -> LoRAMoEModule:
    """What fine-tunes the pruned model."""
    assert module.adapter is not None
    kept = {key: getattr(pruned, key) for key in ("path", "dtype", "attention")}
    config = {"_target_": "layerif.models.pretrained.LocalModel", **kept}
    adapted = module.adapter(model=config, allocation=allocation)
    if not adapted.hparams["keep_zeros"]:
        raise ValueError(
            "method.adapter.keep_zeros=false would fill the zeros that pruning made; leave it true, or use "
            "method.recover=none and fine-tune the pruned folder by itself (model=local model.path=FOLDER/model)"
        )
    return adapted
