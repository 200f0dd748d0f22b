"""PEFT's rivals from the command line: ranks and sizes in the record, and how a mixture's experts split tasks."""

from __future__ import annotations

import json
import math

import pytest

from tests.command import run_layerif


@pytest.mark.parametrize("rival", [["method=adalora"], ["method=lora", "method.init=eva", "estimator=uniform"]])
def test_ranks_that_the_training_moves_stand_in_the_record_and_in_the_adapter(tiny_overrides, tmp_path, rival):
    few = ["allocator.budget=12", "trainer.max_steps=4", "trainer.max_epochs=-1"]
    record = run_layerif([*tiny_overrides, *rival, *few], tmp_path)
    assert record.decision.allocation.values == [4, 4, 4]
    assert len(record.ranks) == 21
    assert len(set(record.ranks.values())) > 1
    attention, mlp = {"q": (32, 48), "k": (32, 24), "v": (32, 24), "o": (48, 32)}, {"gate": (32, 56), "up": (32, 56)}
    sides = {**attention, **mlp, "down": (56, 32)}
    size = {name: sum(sides[name.rpartition(".")[2].partition("_")[0]]) for name in record.ranks}
    own = rival == ["method=adalora"]  # a value for each rank
    assert record.parameters["trainable"] == sum(rank * (size[name] + own) for name, rank in record.ranks.items())
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size > 0


def test_a_mixture_on_a_mixed_task_says_how_its_experts_split_the_tasks(tiny_overrides, tmp_path):
    own = [one for one in tiny_overrides if not one.startswith("task")]
    few = ["task=mixed", "task.num_train=8", "task.num_validation=4", "task.num_test=12", "estimator=uniform"]
    record = run_layerif([*own, *few, "allocator.budget=6", "evaluation.metrics=[loss]"], tmp_path)
    there = {row.partition(" ")[0] for row in record.losses["loss"]}
    assert len(there) > 1
    for block in record.routing.values():
        assert set(block["tasks"]) == there
        assert 0 <= block["between_tasks"] <= math.log(2)
        for of_task in block["tasks"].values():
            assert sum(of_task["load"]) == pytest.approx(1)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["routing"]
