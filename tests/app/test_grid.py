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
from hydra.utils import get_class
from omegaconf import OmegaConf

from layerif.allocate.bits import Bits
from layerif.allocate.blocks import Blocks
from layerif.allocate.curves import Knapsack
from layerif.allocate.depth import Depth
from layerif.allocate.experts import Experts
from layerif.allocate.file import SavedAllocation
from layerif.allocate.layers import Layers
from layerif.allocate.position import Position
from layerif.allocate.rank import Rank
from layerif.allocate.shape import Shape
from layerif.allocate.sparsity import Sparsity
from layerif.allocate.water_filling import WaterFilling
from layerif.app.schema import register
from layerif.app.setup import check_spent
from layerif.estimators._base import CurveEstimator
from layerif.estimators.angular import Angular
from layerif.estimators.bits_curve import BitsCurve
from layerif.estimators.gain_curve import GainCurve
from layerif.estimators.grad_dot import GradDot
from layerif.estimators.loss_curve import LossCurve
from layerif.estimators.measured_loss import MeasuredLoss
from layerif.estimators.skip_curve import SkipCurve
from layerif.files import conf_folder
from layerif.models.pretrained import LocalModel
from layerif.pruning.calibration import Calibration
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("overrides", "picked"),
    [
        ("method=lora_moe", "Experts"),
        ("method=lora_equal", "Experts"),
        ("method=lora", "Rank"),
        ("method=adalora", "Rank"),
        ("experiment=capacity_smollm2 arm=adalora", "Rank"),
        ("experiment=mixture_smollm2 arm=plain_lora", "Experts"),
        ("method=full", "Layers"),
        ("method=lora allocator=layers", "Layers"),
        ("method=full allocator=position", "Position"),
        ("method=prune", "Sparsity"),
        ("method=prune estimator=loss_curve", "Knapsack"),
        ("estimator=measured_loss method=prune", "Knapsack"),
        ("method=none estimator=loss_curve", "Knapsack"),
        ("allocator=depth method=prune estimator=loss_curve", "Depth"),
        ("method=prune estimator=loss_curve allocator=sparsity", "Sparsity"),
        ("method=lora allocator=experts", "Experts"),
        ("method=drop", "Blocks"),
        ("method=drop estimator=datainf", "Blocks"),
        ("method=drop estimator=skip_curve", "Blocks"),
        ("estimator=angular method=drop", "Blocks"),
        ("method=none estimator=angular", "Blocks"),
        ("method=drop allocator=position estimator=skip_curve", "Position"),
        ("method=prune arm=curves", "Knapsack"),
        ("method=prune arm=curves allocator=depth", "Depth"),
        ("method=prune arm=first_block_spared", "Depth"),
        ("method=lora estimator=gain_curve", "Knapsack"),
        ("estimator=gain_curve method=lora_moe", "Knapsack"),
        ("method=lora estimator=gain_curve allocator=layers", "Layers"),
        ("method=quantise", "Knapsack"),
        ("method=quantise estimator=bits_curve", "Knapsack"),
        ("method=none estimator=bits_curve", "Knapsack"),
        ("method=quantise estimator=datainf", "Bits"),
        ("estimator=uniform method=quantise", "Bits"),
        ("method=quantise allocator=file allocator.path=a.json", "SavedAllocation"),
        ("method=quantise arm=uniform", "Bits"),
        ("method=quantise arm=layerif_all", "Bits"),
    ],
)
def test_method_and_estimator_pick_the_allocator_and_the_command_line_wins(overrides, picked):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", [*overrides.split(), "outputs=/nowhere", "logger=none"])
    assert config.allocator._target_.rpartition(".")[2] == picked


@pytest.mark.parametrize(
    ("overrides", "picked"),
    [
        ("", "datainf"),
        ("method=prune", "datainf"),
        ("method=quantise", "bits_curve"),
        ("estimator=uniform method=quantise", "uniform"),
        ("method=quantise allocator=bits", "bits_curve"),
        ("method=quantise arm=uniform", "uniform"),
        ("method=adalora", "uniform"),
        ("method=adalora estimator=random", "random"),
        ("method=quantise arm=uniform estimator=random", "random"),
    ],
)
def test_the_method_picks_the_estimator_where_nobody_names_one(overrides, picked):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        settings = [*overrides.split(), "outputs=/nowhere", "logger=none"]
        config = compose("config", settings, return_hydra_config=True)
    assert config.hydra.runtime.choices["estimator"] == picked
    assert config.estimator._target_.split(".")[-2] == picked


SPENT: dict[str, Any] = {
    "lora_moe": ("experts", "layers"),
    "lora_equal": "experts",
    "lora": ("rank", "layers"),
    "adalora": "rank",
    "full": "layers",
    "prune": "sparsity",
    "quantise": "bits",
    "drop": "blocks",
}
SCORES = "an estimator of scores, such as datainf"
ADVISED = {
    ("lora_moe", "scores"): "allocator=experts or allocator=layers",
    ("lora_equal", "scores"): "allocator=experts",
    ("lora", "scores"): "allocator=rank or allocator=layers",
    ("full", "scores"): "allocator=layers",
    ("adalora", "scores"): "allocator=rank",
    ("adalora", "curves"): r"allocator=knapsack|estimator=gain_curve",
    ("prune", "scores"): "allocator=sparsity",
    ("lora_moe", "curves"): r"allocator=knapsack|estimator=gain_curve",
    ("lora_equal", "curves"): r"allocator=knapsack|estimator=gain_curve",
    ("lora", "curves"): r"allocator=knapsack|estimator=gain_curve",
    ("full", "curves"): SCORES,
    ("prune", "curves"): r"allocator=knapsack|estimator=loss_curve",
    ("quantise", "scores"): "allocator=bits",
    ("quantise", "curves"): r"allocator=knapsack|estimator=bits_curve",
    ("drop", "scores"): "allocator=blocks",
    ("drop", "curves"): "allocator=blocks",
}


def test_the_table_is_that_of_the_methods():
    assert {name: found.allocates for name, found in methods().items() if found.allocates} == SPENT


def methods() -> dict[str, Any]:
    files = sorted((conf_folder() / "method").glob("*.yaml"))
    return {file.stem: get_class(str(OmegaConf.load(file)["_target_"])) for file in files}  # type: ignore[index]


def test_every_combination_inside_is_accepted_and_every_other_one_is_answered_by_those_that_fit(decider, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat runs over the red hill " * 40)
    windows = Calibration(text=str(text), num_windows=4, window=16)
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "wide")
    decider = replace(decider, model=LocalModel(path=str(tmp_path / "wide")))  # the formats' blocks divide its rows
    estimators: list[Any] = [
        GradDot(),
        LossCurve(calibration=windows),
        MeasuredLoss(calibration=windows),
        BitsCurve(calibration=windows),
        SkipCurve(calibration=windows),
        Angular(calibration=windows),
        GainCurve(),
        GainCurve(kind="experts"),
    ]
    allocators: list[tuple[str, Any]] = [
        ("experts", Experts()),
        ("experts", Shape(shape=[1, 2, 3])),
        ("experts", WaterFilling(kind="experts")),
        ("rank", Rank()),
        ("rank", WaterFilling(kind="rank")),
        ("rank", Shape(shape=[1, 2, 3], kind="rank")),
        ("layers", Layers()),
        ("layers", Position(keep=1)),
        ("sparsity", Sparsity(smoothing=False)),
        ("sparsity", WaterFilling()),
        ("sparsity", Depth()),
        ("sparsity", Knapsack()),
        ("bits", Knapsack(target=5.0)),
        ("rank", Knapsack()),
        ("experts", Knapsack()),
        ("bits", Bits()),
        ("blocks", Blocks()),
        ("blocks", Position(kind="blocks")),
    ]
    saved = {
        "experts": [1, 2, 3],
        "rank": [1, 2, 3],
        "sparsity": [0.4, 0.5, 0.6],
        "bits": [4.5, 5.0, 5.5],
        "blocks": [1, 0, 1],
        "layers": [0, 1, 1],
    }
    for kind, values in saved.items():
        file = tmp_path / f"{kind}.json"
        file.write_text(json.dumps(values))
        allocators.append((kind, SavedAllocation(path=str(file), kind=kind)))  # type: ignore[arg-type]
    accepted = set()
    for (name, spent), estimator, (given, allocator) in product(SPENT.items(), estimators, allocators):
        method: Any = SimpleNamespace(name=name, allocates=spent)
        kinds = (spent,) if isinstance(spent, str) else spent
        evidence = "curves" if isinstance(estimator, CurveEstimator) else "scores"
        is_priced = evidence == "scores" or estimator.kind in kinds or allocator.spends == "nothing"
        fits = given in kinds and allocator.spends in (evidence, "either", "nothing") and is_priced
        priced = estimator.kind if evidence == "curves" else "sparsity"
        if isinstance(allocator, Knapsack) and priced not in (given, "blocks"):
            continue  # it gives what the curves are of
        tried = replace(decider, estimator=estimator, allocator=allocator)
        if fits:
            check_spent(method, tried)
            accepted.add((name, evidence, type(allocator).__name__))
            continue
        is_other = evidence == "curves" and estimator.kind not in kinds
        with pytest.raises(ValueError, match=SCORES if is_other else ADVISED[name, evidence]):
            check_spent(method, tried)
    assert {("lora", "scores", "Rank"), ("lora", "scores", "Layers")} <= accepted
    knapsacks = {row for row in accepted if row[2] == "Knapsack"}
    spenders = ("prune", "quantise", "lora", "adalora", "lora_moe", "lora_equal")
    assert knapsacks == {(name, "curves", "Knapsack") for name in spenders}
    assert {row for row in accepted if row[2] == "Blocks"} == {
        ("drop", "scores", "Blocks"),
        ("drop", "curves", "Blocks"),
    }


def test_any_kind_may_be_decided_where_nothing_is_spent_but_not_by_other_evidence(decider):
    method: Any = SimpleNamespace(name="none", allocates=None)
    for allocator in (Experts(), Rank(), Sparsity(smoothing=False), Depth(), Blocks(), Layers(), Position()):
        check_spent(method, replace(decider, allocator=allocator))
    with pytest.raises(ValueError, match=r"estimator=grad_dot gives scores, and this allocator spends curves; use an "):
        check_spent(method, replace(decider, allocator=Knapsack()))
    with pytest.raises(ValueError, match=r"estimator=loss_curve gives curves, .* use allocator=knapsack, or an estim"):
        check_spent(method, replace(decider, estimator=LossCurve()))
