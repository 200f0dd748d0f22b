"""The grid of choices: what is spent, by which evidence, estimator, allocator and method; all else is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from layerif.allocate.curves import Knapsack
from layerif.allocate.depth import Depth
from layerif.allocate.experts import Experts
from layerif.allocate.file import SavedAllocation
from layerif.allocate.rank import Rank
from layerif.allocate.shape import Shape
from layerif.allocate.sparsity import Sparsity
from layerif.allocate.water_filling import WaterFilling
from layerif.app.schema import register
from layerif.app.setup import check_spent
from layerif.estimators.grad_dot import GradDot
from layerif.estimators.loss_curve import LossCurve
from layerif.estimators.measured_loss import MeasuredLoss
from layerif.files import conf_folder
from layerif.pruning.calibration import Calibration


@pytest.mark.parametrize(
    ("overrides", "picked"),
    [
        ("method=lora_moe", "Experts"),
        ("method=lora_equal", "Experts"),
        ("method=lora", "Rank"),
        ("method=prune", "Sparsity"),
        ("method=prune estimator=loss_curve", "Knapsack"),
        ("estimator=measured_loss method=prune", "Knapsack"),
        ("method=none estimator=loss_curve", "Knapsack"),
        ("allocator=depth method=prune estimator=loss_curve", "Depth"),
        ("method=prune estimator=loss_curve allocator=sparsity", "Sparsity"),
        ("method=lora allocator=experts", "Experts"),
        ("method=prune arm=curves", "Knapsack"),
        ("method=prune arm=curves allocator=depth", "Depth"),
        ("method=prune arm=first_block_spared", "Depth"),
    ],
)
def test_method_and_estimator_pick_the_allocator_and_the_command_line_wins(overrides, picked):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", [*overrides.split(), "outputs=/nowhere", "logger=none"])
    assert config.allocator._target_.rpartition(".")[2] == picked


SPENT = {"lora_moe": "experts", "lora_equal": "experts", "lora": "rank", "prune": "sparsity"}
ADVISED = {
    ("experts", "scores"): "allocator=experts",
    ("rank", "scores"): "allocator=rank",
    ("sparsity", "scores"): "allocator=sparsity",
    ("sparsity", "curves"): "allocator=knapsack",
    ("experts", "curves"): "an estimator of scores, such as datainf",
    ("rank", "curves"): "an estimator of scores, such as datainf",
}


def test_every_combination_inside_is_accepted_and_every_other_one_is_answered_by_those_that_fit(decider, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat runs over the red hill " * 40)
    windows = Calibration(text=str(text), num_windows=4, window=16)
    estimators: list[Any] = [GradDot(), LossCurve(mask_text=windows), MeasuredLoss(mask_text=windows)]
    allocators: list[tuple[str, Any]] = [
        ("experts", Experts()),
        ("experts", Shape(shape=[1, 2, 3])),
        ("experts", WaterFilling(kind="experts")),
        ("rank", Rank()),
        ("rank", Shape(shape=[1, 2, 3], kind="rank")),
        ("sparsity", Sparsity(smoothing=False)),
        ("sparsity", WaterFilling()),
        ("sparsity", Depth()),
        ("sparsity", Knapsack()),
    ]
    for kind, values in {"experts": [1, 2, 3], "rank": [1, 2, 3], "sparsity": [0.4, 0.5, 0.6]}.items():
        file = tmp_path / f"{kind}.json"
        file.write_text(json.dumps(values))
        allocators.append((kind, SavedAllocation(path=str(file), kind=kind)))  # type: ignore[arg-type]
    accepted = set()
    for (name, kind), estimator, (given, allocator) in product(SPENT.items(), estimators, allocators):
        method: Any = SimpleNamespace(name=name, allocates=kind)
        evidence = "scores" if isinstance(estimator, GradDot) else "curves"
        fits = given == kind and allocator.spends in (evidence, "nothing")
        tried = replace(decider, estimator=estimator, allocator=allocator)
        if fits:
            check_spent(method, tried)
            accepted.add((name, evidence, type(allocator).__name__))
            continue
        with pytest.raises(ValueError, match=ADVISED[kind, evidence]):
            check_spent(method, tried)
    assert ("prune", "curves", "Knapsack") in accepted
    assert not {row for row in accepted if row[2] == "Knapsack"} - {("prune", "curves", "Knapsack")}


def test_any_kind_may_be_decided_where_nothing_is_spent_but_not_by_other_evidence(decider):
    method: Any = SimpleNamespace(name="none", allocates=None)
    for allocator in (Experts(), Rank(), Sparsity(smoothing=False), Depth()):
        check_spent(method, replace(decider, allocator=allocator))
    with pytest.raises(ValueError, match=r"estimator=grad_dot gives scores, and this allocator spends curves; use an "):
        check_spent(method, replace(decider, allocator=Knapsack()))
    with pytest.raises(ValueError, match=r"estimator=loss_curve gives curves, .* use allocator=knapsack, or an estim"):
        check_spent(method, replace(decider, estimator=LossCurve()))
