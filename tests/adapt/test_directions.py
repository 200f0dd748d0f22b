"""Adapters by matrix, and their first weights: the base stays as it is, plain PEFT loads them, resumed runs go on."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel, get_peft_model_state_dict

from layerif.adapt.adapters import EqualLoraAdapter, LoraAdapter, LoraMoeAdapter
from layerif.adapt.callback import InfluenceCallback
from layerif.adapt.data import TaskDataModule
from layerif.adapt.directions import begin_with, measured_directions
from layerif.adapt.module import AdapterModule
from layerif.adapt.sizes import adapted_shapes, names_of, num_parameters
from layerif.allocate.allocation import Allocation
from layerif.allocate.curves import Knapsack
from layerif.estimators.gain_curve import GainCurve
from layerif.models.blocks import bare
from tests.tiny import tiny_model

IDS = torch.arange(3, 12)[None]
TARGETS = ["q_proj", "down_proj"]


def by_matrix(kind: str, values: Any, targets: Any = None) -> Allocation:
    names = names_of(adapted_shapes(tiny_model(), targets))
    counts = tuple(values[number % len(values)] for number in range(len(names)))
    return Allocation(tuple(names), kind, counts, sum(counts))  # type: ignore[arg-type]


def adapted(model: Any) -> dict[str, Any]:
    """The adapted layers by name."""
    return {name: layer for name, layer in bare(model).named_modules() if hasattr(layer, "base_layer")}


@pytest.mark.parametrize("targets", [None, TARGETS])
def test_lora_has_the_rank_of_each_matrix_and_one_scaling(targets, tmp_path):
    ranks, tuning = by_matrix("rank", (3, 0, 7, 1, 12), targets), LoraAdapter(target_modules=targets, scaling=1.5)
    model: Any = tuning.put_on(tiny_model(), ranks)
    given = {name: rank for name, rank in ranks.by_name().items() if rank}
    assert {name: layer.r["default"] for name, layer in adapted(model).items()} == given
    assert {layer.scaling["default"] for layer in adapted(model).values()} == {1.5}
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    base = tiny_model()
    assert num_parameters(adapted_shapes(base, targets), tuning.capacities(base, ranks)) == trained
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(tiny_model(), tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_a_mixture_has_the_experts_of_each_matrix_and_its_baseline_their_parameters():
    experts, base = by_matrix("experts", (3, 0, 1, 5)), tiny_model()
    tuning = LoraMoeAdapter(r=2)
    model: Any = tuning.put_on(tiny_model(), experts)
    given = {name: count for name, count in experts.by_name().items() if count}
    assert {name: layer.num_experts["default"] for name, layer in adapted(model).items()} == given
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert num_parameters(adapted_shapes(base, None), tuning.capacities(base, experts)) == trained
    assert EqualLoraAdapter(r=2).compared(base, experts) == {"lora_moe": trained}


@pytest.mark.parametrize(
    ("units", "targets", "message"),
    [
        (TARGETS, None, r"15 of 21 linear layers with an adapter have no rank, the first is .*k_proj"),
        (None, TARGETS, r"k_proj' has a rank but is not a linear layer that method\.target_modules gives an adapter"),
        (
            TARGETS,
            [*TARGETS, "lm_head"],
            r"an allocation by matrix deals out the parameters of the blocks, .*lm_head",
        ),
    ],
)
def test_ranks_of_other_matrices_are_refused(units, targets, message):
    with pytest.raises(ValueError, match=message):
        LoraAdapter(target_modules=targets).check_fits(tiny_model(), by_matrix("rank", (2,), units))


# The first weights


@pytest.fixture
def gaining(decider):
    return replace(decider, estimator=GainCurve(), allocator=Knapsack())


@pytest.fixture
def directions(gaining):
    return measured_directions(gaining, None, gaining.model.load)


@pytest.mark.parametrize("kind", ["rank", "experts"])
def test_a_model_that_begins_with_directions_is_the_base_to_the_bit(kind, gaining, directions, tmp_path):
    tuning: Any = LoraAdapter() if kind == "rank" else LoraMoeAdapter(r=3)
    base = gaining.model.load()
    with torch.inference_mode():
        expected = base(IDS).logits
    model: Any = tuning.put_on(base, by_matrix(kind, (4, 2)))
    begin_with(model, directions)
    with torch.inference_mode():
        assert torch.equal(model.eval()(IDS).logits, expected)
    for name, layer in adapted(model).items():
        rows = (layer.lora_A if kind == "rank" else layer.lora_moe_A)["default"].weight
        # Orthogonal, as long as random rows are on average, and so the experts' sets are disjoint.
        found = rows @ rows.T
        assert torch.allclose(found, torch.eye(len(rows)) / 3, atol=2e-3), name
        assert torch.allclose(rows, directions[name][: len(rows)] / math.sqrt(3))
    with torch.no_grad():
        for value in get_peft_model_state_dict(model).values():
            value.add_(0.01)
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(gaining.model.load(), tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_rows_beyond_the_directions_stay_random(gaining, directions):
    few = {name: rows[:2] for name, rows in directions.items()}
    model: Any = LoraAdapter().put_on(gaining.model.load(), by_matrix("rank", (5,)))
    before = {name: layer.lora_A["default"].weight.clone() for name, layer in adapted(model).items()}
    begin_with(model, few)
    for name, layer in adapted(model).items():
        assert torch.equal(layer.lora_A["default"].weight[2:], before[name][2:])
        assert not torch.equal(layer.lora_A["default"].weight[:2], before[name][:2])


def trainer(folder: Any, *callbacks: Any, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saving = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    settings: dict[str, Any] = {**quiet, "limit_val_batches": 0, "max_steps": 3, **options}
    return L.Trainer(accelerator="cpu", callbacks=[saving, *callbacks], default_root_dir=folder, **settings)


class StopAt(L.Callback):
    """Stops a run after a step, as if it were killed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise SystemExit


def test_a_resumed_run_takes_its_first_weights_and_curves_from_the_checkpoint(gaining, tmp_path):
    config = {"_target_": "layerif.models.pretrained.LocalModel", "path": gaining.model.path}
    data = partial(TaskDataModule, gaining.splits, gaining.tokenizer, batch_size=4)

    def begun(decide: Any, folder: Any, *others: Any, start: Any = None) -> AdapterModule:
        module = AdapterModule(LoraAdapter(init="gradient", lora_dropout=0.1), config)
        callback = InfluenceCallback(decide, partial(measured_directions, gaining, None))
        made = trainer(folder, callback, *others)
        made.ckpt_path = start
        with suppress(SystemExit):
            made.fit(module, data(), weights_only=True)
        assert callback.decision is not None
        assert callback.decision.curves is not None
        summary: Any = callback.decision.record().curves
        assert summary["parameters"] > 0
        return module

    whole = begun(gaining, tmp_path / "whole")
    begun(gaining, tmp_path / "part", StopAt(2))
    later = begun(None, tmp_path / "part", start=str(tmp_path / "part" / "last.ckpt"))  # nothing is decided again
    expected, found = (get_peft_model_state_dict(each.model) for each in (whole, later))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())

    module = AdapterModule(LoraAdapter(init="gradient"), config, whole.allocation)
    with pytest.raises(ValueError, match=r"init=gradient has no directions to begin with: give the InfluenceCallback"):
        trainer(tmp_path / "none").fit(module, data())
