"""`method=prune`: decide, prune, keep the pruned model, evaluate it, and recover it by fine-tuning."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
from torch import nn

from layerif.adapt.adapters import LoraMoeAdapter
from layerif.adapt.callback import InfluenceCallback
from layerif.adapt.train import run_trainer
from layerif.allocate import Allocator
from layerif.allocate.allocation import Allocation
from layerif.allocate.depth import Depth
from layerif.app.methods._finetune import check_fit
from layerif.app.methods._recovery import check_begin, one_expert_each, recover, save_model
from layerif.app.methods._sparsity import (
    Refine,
    check_spent_here,
    reads_windows,
    with_tried_slope,
)
from layerif.app.methods._steps import (
    check_bare,
    check_calibration_apart,
    evaluate,
    evaluate_before,
    record_rise,
    recording,
    watched_text,
)
from layerif.app.setup import Setup
from layerif.checks import check_fields
from layerif.decide import Decider, Decision
from layerif.estimators._base import CurveEstimator, name_of
from layerif.files import read_json
from layerif.models.blocks import blocks
from layerif.probe.curves.text import mean_loss
from layerif.probe.measurements import Load
from layerif.pruning import Pruner
from layerif.pruning.calibration import Calibration
from layerif.pruning.module import PruneModule, given_allocation
from layerif.pruning.semi_structured import speed_of_two_four
from layerif.pruning.targets import matrices, targets
from layerif.pruning.walk import ActivationPlace
from layerif.record.record import AllocationRecord, DecisionRecord, RunRecord

log = logging.getLogger(__name__)

# One step per block needs these settings, so they replace those for fine-tuning. There is no autocast, because
# `model.dtype` decides.
_TRAINER: dict[str, Any] = {
    "max_epochs": 1,
    "max_steps": -1,
    "limit_train_batches": 1.0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "precision": "32-true",
}
_ZEROS_ALONE = (
    "zeros alone save neither time nor memory: the pruned model is as large and as slow as the dense one; "
    "2:4 (pruner.n=2 pruner.m=4) on a GPU with method.semi_structured=true measures torch's format for it"
)
_FULL_DISK = "free some space and give the same command again (no block is pruned twice), or use method.save=false"


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Prunes every block to the sparsity that its allocation says.

    A run leaves `model/` for plain transformers, `sparsity.csv`, and after a recovery `recovered/` or `adapter/`.

    Attributes:
        pruner: decides which weights go.
        calibration: the text that Wanda and SparseGPT look at.
        offload: where activations wait between blocks: on the `device`, the `cpu` or the `disk`.
        recover: fine-tune the pruned model on the task with its zeros kept. `lora` merges the adapter into a folder
            `recovered`; `lora_moe` spends the budget of `experts` by scores of the pruned model and leaves an adapter.
        adapter: settings of that fine-tuning.
        experts: allocates the experts of `recover=lora_moe`.
        allocation: path of a JSON file with sparsities by block or matrix, in place of scores and allocator.
        save: leave the pruned model in the run's folder.
        refine: `swaps` moves sparsity between matrices as long as the model comes nearer to the dense one.
        swaps: settings of that search.
        dense: also measure the perplexity of the dense model, where perplexity is measured at all.
        semi_structured: time torch's 2:4 format (needs CUDA).
    """

    name: ClassVar[str] = "prune"
    allocates: ClassVar[Literal["sparsity"]] = "sparsity"
    evaluates: ClassVar[bool] = True
    further_metrics: ClassVar[tuple[str, ...]] = ("perplexity",)
    selects_rows: ClassVar[bool] = False
    takes_parts: ClassVar[bool] = False

    pruner: Pruner
    calibration: Calibration
    offload: ActivationPlace = "cpu"
    recover: Literal["none", "lora", "lora_moe"] = "none"
    adapter: LoraMoeAdapter | None = None
    experts: Allocator | None = None
    allocation: str | None = None
    refine: Literal["none", "swaps"] = "none"
    swaps: Refine = field(default_factory=Refine)
    save: bool = True
    dense: bool = True
    semi_structured: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "method")
        if self.refine == "swaps" and self.allocation is not None:
            raise ValueError(
                "method.refine=swaps starts from scores, curves or a shape, not from method.allocation; use "
                "allocator=file allocator.kind=sparsity for a file"
            )
        if self.recover == "none":
            return
        if self.adapter is None or (self.recover == "lora_moe" and self.experts is None):
            raise ValueError(
                f"method.recover={self.recover} needs method.adapter (and method.experts for lora_moe); give them as "
                "conf/method/prune.yaml does"
            )
        check_begin(self.adapter)
        if not self.save:
            raise ValueError(f"method.recover={self.recover} starts from the saved model; use method.save=true")
        if not self.adapter.keep_zeros:
            raise ValueError(
                "method.adapter.keep_zeros=false would fill the zeros that pruning made; leave it true, or use "
                "method.recover=none and fine-tune the pruned folder by itself (model=local model.path=FOLDER/model)"
            )

    @property
    def fine_tunes(self) -> bool:
        return self.recover != "none"

    def check(self, setup: Setup) -> None:
        check_bare(setup, "pruning")
        decider, skeleton = setup.decider, setup.model.skeleton()
        allocation = self._given(skeleton)
        if allocation is None:
            _refuse_nothing_to_allocate(self.pruner, decider)
            allocation = decider.preview()
        targets(skeleton, allocation.by_name(), self.pruner)
        windows = self._module(setup).windows() if self._reads_windows(decider) else []
        if self.allocation is None:
            check_spent_here(setup, self.pruner, windows, allocation)
        if windows:
            check_calibration_apart(setup, self.calibration)
        if self.refine == "swaps" and self.pruner.n is not None:
            raise ValueError(
                f"method.refine=swaps has nothing to move with pruner.n={self.pruner.n}; use method.refine=none, or "
                "pruner.n=null"
            )
        if self.recover != "none":
            check_fit(setup)
            self._recovery_adapter.check_fits(
                skeleton,
                self._recovery_preview(decider, skeleton),
                free=setup.free_for_training,
                where="method.adapter",
                budget="method.experts.budget",
            )

    def preview(self, setup: Setup) -> dict[str, str]:
        found = matrices(setup.model.skeleton())
        numel = sum(linear.weight.numel() for linear in found.values())
        said = f"{type(self.pruner).__name__}, {len(found)} matrices of {numel:,} parameters together"
        if self._reads_windows(setup.decider):
            num_windows = sum(map(len, self._module(setup).windows()))
            said += f", {num_windows} calibration windows of {self.calibration.window} tokens"
        return {"prune": said}

    def run(self, setup: Setup, record: RunRecord, folder: Path) -> None:
        module = self._module(setup, job=record.identity)
        device = setup.decider.device
        evaluate_before(lambda: module.base_model().to(device), setup, record, dense=self.dense)
        influence = InfluenceCallback(self._decider(setup, module, record, folder))
        watched = None if self.allocation else watched_text(setup)
        dense = None if watched is None else mean_loss(module.base_model().to(device), watched)
        start = time.perf_counter()
        with recording(influence, record):
            run_trainer(setup.trainer([influence], folder, **_TRAINER), module)
        assert module.walk is not None
        assert module.allocation is not None
        if influence.decision is None:
            record.decision = _given_decision(module.allocation)
        record.seconds["prune"] = module.walk.seconds_before + time.perf_counter() - start - influence.seconds
        if module.walk.num_replayed:
            record.notes.append(f"{module.walk.num_replayed} blocks were pruned by a run that did not finish")
        model = module.base_model()
        _record_sparsity(model, module, record, folder)
        if self.save:
            save_model(model, setup, folder / "model", what="pruned", advice=_FULL_DISK)
        model.to(device)
        if watched is not None and dense is not None:
            record_rise(record, dense, mean_loss(model, watched))
        if self.semi_structured:
            self._measure_two_four(model, record)
        record.notes.append(_ZEROS_ALONE)
        evaluate(model, setup, record, "pruned/" if self.fine_tunes else "")
        if self.fine_tunes:
            module.free_model()
            del model
            experts = self.experts if self.recover == "lora_moe" else None
            recover(setup, record, folder, self._recovery_adapter, experts, advice=_FULL_DISK)

    def _reads_windows(self, decider: Decider) -> bool:
        if self.allocation is not None:
            return self.pruner.needs_inputs
        return self.refine == "swaps" or reads_windows(decider, self.pruner)

    def _module(self, setup: Setup, job: Any = None) -> PruneModule:
        allocation = self._given(setup.model.skeleton())
        return PruneModule(
            setup.model, self.pruner, self.calibration, offload=self.offload, allocation=allocation, job=job
        )

    def _decider(self, setup: Setup, module: PruneModule, record: RunRecord, folder: Path) -> Any:
        """Gives the function that decides: with a slope by trials, and followed by verified swaps, where asked for."""
        if self.allocation is not None:
            return setup.decider
        decider = setup.decider
        windows = module.windows() if self._reads_windows(decider) else []
        if isinstance(decider.allocator, Depth) and decider.allocator.slope is None:
            allocator = with_tried_slope(setup, decider.allocator, module.base_model(), self.pruner, windows, record)
            decider = replace(decider, allocator=allocator)
        if self.refine == "none":
            return decider

        def decide(load: Load) -> Decision:
            return self.swaps(decider(load), load(), self.pruner, windows, setup.config.seed, folder)

        return decide

    def _given(self, skeleton: nn.Module) -> Allocation | None:
        """Reads the allocation that the user gives in place of scores and allocator; None where there is none."""
        return None if self.allocation is None else given_allocation(_read_sparsities(self.allocation), skeleton)

    @property
    def _recovery_adapter(self) -> LoraMoeAdapter:
        assert self.adapter is not None
        return self.adapter

    def _recovery_preview(self, decider: Decider, skeleton: nn.Module) -> Allocation:
        if self.recover == "lora":
            return one_expert_each(list(blocks(skeleton)))
        assert self.experts is not None
        if isinstance(decider.estimator, CurveEstimator):
            raise ValueError(
                "method.recover=lora_moe spends scores of the pruned model, and "
                f"estimator={name_of(decider.estimator)} gives curves; use method.recover=lora, or an "
                "estimator of scores, such as datainf"
            )
        given = replace(decider, allocator=self.experts, skip=()).preview()
        if given.kind != "experts":
            raise ValueError(
                f"method.experts allocates {given.kind}, and recover=lora_moe spends experts; use "
                "allocator@method.experts=experts"
            )
        return given

    def _measure_two_four(self, model: nn.Module, record: RunRecord) -> None:
        tokens = self.calibration.window * self.calibration.batch_size
        try:
            record.metrics["semi_structured_speed"] = speed_of_two_four(matrices(model), tokens)
        except ValueError as error:
            log.warning("%s", error)
            record.notes.append(str(error))


def _refuse_nothing_to_allocate(pruner: Pruner, decider: Decider) -> None:
    measures = decider.estimator.needs.is_measured and decider.allocator.spends != "nothing"
    if pruner.n is not None and measures:
        raise ValueError(
            f"pruner.n={pruner.n} pruner.m={pruner.m} removes the same share from every layer, which leaves nothing to "
            "allocate; use estimator=uniform, or pruner.n=null for an n per block from the scores"
        )


def _given_decision(allocation: Allocation) -> DecisionRecord:
    return DecisionRecord(source="method.allocation", allocation=AllocationRecord(**allocation.to_dict()))


def _read_sparsities(file: str) -> Mapping[str, float]:
    found = read_json(file, what="method.allocation file")
    is_record = isinstance(found, Mapping) and bool(found.keys() & {"decision", "allocation", "values"})
    if not isinstance(found, Mapping) or is_record:
        what = "record" if is_record else type(found).__name__
        raise ValueError(
            f"method.allocation file {file!r} must hold {{block or matrix: sparsity}}, got a {what}; a list per block "
            "or a record is read by allocator=file allocator.kind=sparsity"
        )
    return found


def _record_sparsity(model: nn.Module, module: PruneModule, record: RunRecord, folder: Path) -> None:
    """Writes the share of zeros in every pruned matrix to `sparsity.csv` and to the record."""
    assert module.walk is not None
    assert record.decision is not None
    wanted = {f"{block}.{name}": target for block, of in module.walk.targets.items() for name, target in of.items()}
    rows = []
    for name, linear in matrices(model).items():
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
    budget = record.decision.allocation.budget
    if abs(zeros / pruned - budget) > 1 / pruned:
        why = (
            f"n of {module.pruner.m} comes no nearer"
            if module.pruner.m
            else "some weights were zero before or had inputs that never act"
        )
        record.notes.append(f"sparsity {zeros / pruned:.6f} where the allocation asks for {budget:.6f}: {why}")
