"""The steps after a model has been made smaller: save it, and recover it by fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from layerif.adapt.adapters import LoraMoeAdapter
from layerif.adapt.callback import InfluenceCallback
from layerif.adapt.module import AdapterModule
from layerif.allocate import Allocator
from layerif.allocate.allocation import Allocation
from layerif.app.methods._finetune import fit
from layerif.app.methods._steps import evaluate
from layerif.app.setup import Setup
from layerif.files import full_disk_explained
from layerif.models.pretrained import LocalModel
from layerif.pruning.targets import matrices
from layerif.record.record import RunRecord


def one_expert_each(names: Sequence[str]) -> Allocation:
    """Returns the allocation of one expert to every block, which is plain LoRA."""
    return Allocation(tuple(names), "experts", (1,) * len(names), len(names))


def check_begin(adapter: LoraMoeAdapter) -> None:
    """Refuses first weights that would need another gradient pass, over the smaller model."""
    if adapter.init != "default":
        raise ValueError(
            f"method.adapter.init={adapter.init} is not measured for a recovery; use default, or fine-tune the saved "
            "model by itself (model=local model.path=FOLDER/model)"
        )


def save_model(model: nn.Module, setup: Setup, folder: Path, *, what: str, advice: str) -> None:
    """Writes a model and its tokenizer for plain transformers.

    Args:
        model: a causal language model.
        setup: has the tokenizer.
        folder: the folder.
        what: names the model in the message.
        advice: says what to do where the disk is full.
    """
    with full_disk_explained(f"the {what} model to {folder}", advice):
        model.save_pretrained(folder)  # type: ignore[operator]
    setup.tokenizer.save_pretrained(folder)


def recover(
    setup: Setup, record: RunRecord, folder: Path, adapter: LoraMoeAdapter, experts: Allocator | None, *, advice: str
) -> None:
    """Fine-tunes the model in `folder`/model on the task, and evaluates it.

    Args:
        setup: of the run.
        record: gets the recovery and the metrics.
        folder: of the run.
        adapter: the settings of the fine-tuning.
        experts: allocates the experts of an adapter by scores of this model, which stays beside it; None: plain LoRA,
            which is merged into a folder `recovered`.
        advice: as for `save_model`.
    """
    where: dict[str, Any] = {
        "path": str(folder / "model"),
        "dtype": setup.model.dtype,
        "attention": setup.model.attention,
        "trust_remote_code": setup.model.trust_remote_code,
    }
    smaller, decider = LocalModel(**where), setup.decider
    one_each = one_expert_each(smaller.layers().names) if experts is None else None
    module = AdapterModule(adapter, {"_target_": _target_of(LocalModel), **where}, one_each)
    if experts is not None:
        decider = replace(decider, model=smaller, allocator=experts, skip=())
    influence, sizes = InfluenceCallback(decider), record.parameters
    model = fit(setup, module, influence, record, folder)
    record.parameters = sizes | record.parameters
    assert module.allocation is not None
    method = "lora" if experts is None else "lora_moe"
    record.recovery = {"method": method, "experts": module.allocation.by_name(), "decision": None}
    if influence.decision is not None:
        record.recovery["decision"] = asdict(influence.decision.record())
        record.recovery["notes"] = list(influence.decision.notes)
        record.recovery["seconds"] = influence.decision.seconds
    if experts is None:
        model = _merged(model, smaller if adapter.keep_zeros else None)
        save_model(model, setup, folder / "recovered", what="recovered", advice=advice)
    evaluate(model.to(setup.decider.device), setup, record)


def _merged(model: Any, pruned: LocalModel | None) -> nn.Module:
    """Merges the adapter into the weights; the zeros of a pruned model stay zeros."""
    dense = {} if pruned is None else matrices(pruned.load())
    zeros = {name: linear.weight == 0 for name, linear in dense.items()}
    merged = model.cpu().merge_and_unload()
    found = matrices(merged)
    for name, is_zero in zeros.items():
        assert bool((found[name].weight[is_zero] == 0).all()), name
    return merged


def _target_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
