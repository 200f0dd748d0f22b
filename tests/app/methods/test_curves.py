"""Loss curves in a run: measured, spent to the weight, told in the record, resumed, refined, and refused elsewhere."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
import pytest
import torch
from hydra.errors import InstantiationException
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from layerif.app.setup import Setup
from layerif.layers import is_named
from layerif.pruning import refine, walk
from layerif.pruning.targets import matrices
from layerif.pruning.trials import least_loss, mean_token_loss
from layerif.record.record import RunRecord
from tests.app.methods.runs import pruned
from tests.command import layerif_here, run_layerif
from tests.tiny import tiny_model, tiny_tokenizer

SIZES = [
    "method.calibration.num_windows=4",
    "method.calibration.window=32",
    "method.calibration.batch_size=2",
    "evaluation.metrics=[perplexity]",
    "evaluation.window=40",
    "evaluation.num_windows=2",
]
CURVES = ["method=prune", "estimator=loss_curve", "allocator.target=0.6", *SIZES]
QUICK = ["method.save=false", "method.dense=false"]
KEYS = {"kind", "sense", "unit", "levels", "everywhere", "predicted", "source", "fingerprint", "dense_loss", "actual"}


@pytest.fixture
def setup(setup_of):
    return lambda *overrides: setup_of(*CURVES, *overrides)


def curves_in(record: RunRecord) -> dict[str, Any]:
    """What the record keeps of curves."""
    assert record.decision is not None
    assert record.decision.curves is not None
    return record.decision.curves


def sizes_in(record: RunRecord) -> list[int]:
    """The weights of the units that sparsity was given to."""
    assert record.decision is not None
    assert record.decision.allocation.sizes is not None
    return record.decision.allocation.sizes


def assert_budget(record: RunRecord, target: float = 0.6) -> None:
    """All matrices that are pruned lose exactly the target, to the weight."""
    given = record.decision.allocation
    counted = sum(sizes_in(record))
    assert given.budget == pytest.approx(target, abs=0.5 / counted + 1e-9)
    assert record.parameters["zero"] == math.floor(target * counted + 0.5)


def test_curves_are_measured_spent_to_the_weight_and_told(setup, tmp_path):
    found = setup()
    record = pruned(found, tmp_path / "run")
    given, told = record.decision.allocation, curves_in(record)
    assert len(given.units) == 21
    assert len(set(given.values)) > 10
    assert_budget(record)
    table = pd.read_csv(tmp_path / "run" / "sparsity.csv")
    assert dict(zip(table["matrix"], table["sparsity"], strict=True)) == pytest.approx(record.sparsity)
    assert record.sparsity == pytest.approx(dict(zip(given.units, given.values, strict=True)), abs=1e-3)

    assert told.keys() == KEYS
    assert told["levels"] == [0.0, *(level / 10 for level in range(2, 10))]
    assert told["everywhere"][0] == 0.0
    assert 0 < told["predicted"] < told["everywhere"][5]  # of 60 % everywhere
    assert told["source"] == given.source
    assert set(given.source) == {"model", "pruner", "calibration", "loss_text"}
    windows = found.method.calibration.batches(found.tokenizer)
    dense, after = (mean_token_loss(model, windows) for model in (found.model.load(), reloaded(tmp_path / "run")))
    assert told["dense_loss"] == pytest.approx(dense, rel=1e-5)
    assert told["actual"] == pytest.approx(after - dense, rel=1e-3, abs=1e-4)

    assert {"evidence", "score", "allocate", "prune", "evaluate", "before/evaluate"} <= record.seconds.keys()
    assert all(seconds >= 0 for seconds in record.seconds.values())
    assert record.metrics["before/perplexity_40"] != record.metrics["perplexity_40"]
    assert record.fingerprint == told["fingerprint"] != ""
    assert not any("from the store" in note for note in record.notes)

    again = pruned(setup(*QUICK), tmp_path / "again")
    assert any("curves from the store" in note for note in again.notes)
    assert again.decision.allocation == given
    assert "before/perplexity_40" not in again.metrics
    assert again.metrics["perplexity_40"] == record.metrics["perplexity_40"]
    assert not (tmp_path / "again" / "model").exists()


def reloaded(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def test_a_killed_run_by_curves_carries_on_to_the_same_bits(setup, tmp_path, monkeypatch):
    whole = pruned(setup("pruner=sparsegpt"), tmp_path / "whole")
    real = walk.Walk._prune

    def die(self, name, block):
        if name == "model.layers.2":
            raise KeyboardInterrupt
        real(self, name, block)

    with monkeypatch.context() as patch:
        patch.setattr(walk.Walk, "_prune", die)
        with pytest.raises(KeyboardInterrupt):
            pruned(setup("pruner=sparsegpt"), tmp_path / "killed")
    resumed = pruned(setup("pruner=sparsegpt"), tmp_path / "killed")
    assert "2 blocks were pruned by a run that did not finish" in resumed.notes
    assert resumed.decision.allocation == whole.decision.allocation
    assert resumed.decision.curves == whole.decision.curves
    assert resumed.metrics == whole.metrics
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("overrides", "num_units"),
    [
        ("pruner=magnitude", 21),
        ("pruner=sparsegpt estimator.masks=wanda estimator.form=diagonal", 21),
        ("pruner.swaps=true estimator.masks=wanda", 21),
        ("estimator.granularity=block", 3),
        ("allocator.unit=block estimator.form=diagonal", 3),
        ("estimator.loss_text=task", 21),
        ("estimator.loss_text={windows:0.5,task:0.5} allocator.floor=0.5 allocator.cap=0.7", 21),
        ("pruner.skip=[down_proj,model.layers.0]", 12),
        ("estimator=measured_loss estimator.levels=[0.4,0.6,0.8]", 3),
    ],
)
def test_every_form_of_curves_meets_the_budget(setup, tmp_path, overrides, num_units):
    found = setup(*QUICK, *overrides.split())
    dense = {name: linear.weight.clone() for name, linear in matrices(found.model.load()).items()}
    record = pruned(found, tmp_path / "run")
    given = record.decision.allocation
    assert len(given.units) == num_units
    assert_budget(record)
    assert curves_in(record)["predicted"] > 0
    decider = found.decider
    low, high = decider.allocator.range(decider.estimator.equal(decider.units()), decider.allocator.target)
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in given.values)
    skipped = [name for name in dense if is_named(name, found.method.pruner.skip)]
    assert all(record.sparsity[name] == float((dense[name] == 0).double().mean()) for name in skipped)
    has_task = "task" in overrides
    assert (record.decision.samples.get("train") == 20) == has_task
    assert ("actual" in curves_in(record)) == ("measured_loss" not in overrides)
    assert record.decision.reliability is None or -1 <= record.decision.reliability <= 1


@pytest.mark.parametrize("unit", ["matrix", "block"])
def test_n_of_m_is_chosen_by_curves_and_never_above_the_budget(setup, tmp_path, unit):
    record = pruned(setup(*QUICK, "pruner.m=4", f"estimator.granularity={unit}"), tmp_path / "run")
    given = record.decision.allocation
    assert set(given.values) <= {0.25, 0.5, 0.75}
    assert len(set(given.values)) > 1
    smallest = min(size for value, size in zip(given.values, sizes_in(record), strict=True) if value < 0.75) / 4
    assert 0.6 - smallest / sum(sizes_in(record)) < given.budget <= 0.6
    assert record.metrics["sparsity"] == pytest.approx(given.budget, abs=1e-12)
    assert curves_in(record)["levels"] == [0.0, 0.25, 0.5, 0.75]


REFINED = [*QUICK, "method.refine=swaps", "method.swaps.forwards=8", "method.swaps.num_windows=2"]


def test_swaps_of_levels_start_from_curves_and_carry_on_after_a_kill(setup, tmp_path, monkeypatch):
    whole = pruned(setup(*REFINED), tmp_path / "whole")
    assert_budget(whole)
    (note,) = (note for note in whole.notes if note.startswith("method.refine=swaps: "))
    assert "of 8 swaps of levels were kept; KL to the dense model on 2 windows" in note
    assert whole.seconds["refine"] > 0
    assert whole.decision.allocation.source["pruner"] == "wanda(compare=row)"
    assert curves_in(whole)["actual"] > 0
    real, tried = refine._tried, []

    def die(*arguments):
        tried.append(arguments)
        if len(tried) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(refine, "_tried", die)
        with pytest.raises(KeyboardInterrupt):
            pruned(setup(*REFINED), tmp_path / "killed")
    state = json.loads((tmp_path / "killed" / "refine.json").read_text())
    assert state["tried"] == 4
    resumed = pruned(setup(*REFINED), tmp_path / "killed")
    assert resumed.decision.allocation == whole.decision.allocation
    assert resumed.metrics == whole.metrics
    assert note in resumed.notes
    assert resumed.seconds["prune"] >= 0


@pytest.mark.parametrize(
    "overrides",
    [
        "estimator.granularity=block",
        "pruner.m=4 method.swaps.step=0.3",
        "pruner.skip=[down_proj,model.layers.0]",
        "pruner=magnitude",
    ],
)
def test_swaps_of_levels_keep_to_what_the_pruner_may_do(setup, tmp_path, overrides):
    found = setup(*REFINED, *overrides.split())
    dense = {name: float((linear.weight == 0).double().mean()) for name, linear in matrices(found.model.load()).items()}
    record = pruned(found, tmp_path / "run")
    given = record.decision.allocation
    assert record.metrics["sparsity"] * record.parameters["pruned"] == pytest.approx(
        given.budget * sum(sizes_in(record)), abs=0.5 + 1e-6
    )
    assert given.budget <= 0.6 + 1e-4
    assert curves_in(record)["predicted"] > 0
    for name, sparsity in record.sparsity.items():
        if is_named(name, found.method.pruner.skip):
            assert sparsity == dense[name]
            assert name not in given.units
        if found.method.pruner.m:
            assert sparsity * 4 == round(sparsity * 4)


def test_the_slope_in_depth_is_chosen_by_trials_and_no_curve_is_measured(setup, tmp_path):
    found = setup(*QUICK, "allocator=depth")  # the command line's allocator, whatever the estimator asks for
    record = pruned(found, tmp_path / "run")
    assert record.decision.curves is None
    assert record.measurements == []
    assert record.seconds["trials"] > 0
    (note,) = (note for note in record.notes if note.startswith("allocator.slope="))
    allocator, layers = found.decider.allocator, found.decider.layers()
    candidates = [one.by_name() for one in allocator.candidates(layers)]
    windows = found.method.calibration.batches(found.tokenizer)
    best, losses = least_loss(found.model.load(), found.method.pruner, candidates, windows)
    slope = allocator.with_each_slope(layers)[best].slope
    assert note.startswith(f"allocator.slope={slope:.4f} by the loss on the calibration windows (")
    assert all(f"{loss:.4f}" in note for loss in losses)
    assert record.decision.source == f"depth(slope={slope:g}, spare=0)"
    assert dict(zip(record.decision.allocation.units, record.decision.allocation.values, strict=True)) == (
        pytest.approx(candidates[best])
    )
    assert_budget(record)


def test_curves_without_pruning_are_decided_and_recorded(setup_of, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat runs over the red hill and the old dog sleeps " * 40)
    kind = "_target_: layerif.pruning.calibration.Calibration"
    windows = f"estimator.calibration={{{kind}, text: '{text}', num_windows: 4, window: 16}}"
    found = setup_of("method=none", "estimator=loss_curve", "allocator.target=0.6", windows)
    record = RunRecord(name="test", seed=0, config={}, overrides=[])
    found.method.run(found, record, tmp_path)
    assert record.decision.allocation.kind == "sparsity"
    assert len(record.decision.allocation.units) == 21
    assert curves_in(record).keys() == KEYS - {"dense_loss", "actual"}
    assert record.metrics == {}


def test_recovery_by_lora_after_curves_keeps_every_zero(setup, tmp_path):
    record = pruned(setup("method.recover=lora", "trainer.max_steps=1", "method.dense=false"), tmp_path / "run")
    assert record.recovery["decision"] is None
    assert curves_in(record)["actual"] != 0
    assert {"pruned/perplexity_40", "perplexity_40"} <= record.metrics.keys()
    before, after = (
        matrices(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)) for name in ("model", "recovered")
    )
    assert all(bool((after[name].weight[before[name].weight == 0] == 0).all()) for name in before)


def test_what_curves_decided_is_spent_again_where_it_belongs_and_nowhere_else(setup, setup_of, tmp_path):
    record = pruned(setup(*QUICK), tmp_path / "run")
    given = record.decision.allocation
    file = tmp_path / "matrices.json"
    file.write_text(json.dumps(dict(zip(given.units, given.values, strict=True))))
    again = pruned(setup(*QUICK, f"method.allocation={file}"), tmp_path / "again")
    assert again.sparsity == record.sparsity
    assert again.decision.curves is None
    assert again.metrics["perplexity_40"] == record.metrics["perplexity_40"]

    saved = record.write(tmp_path / "run")
    with pytest.raises(ValueError, match=r"got a record; .* allocator=file allocator\.kind=sparsity"):
        check(setup(f"method.allocation={saved}"))
    spent = ["method=prune", *SIZES, "allocator=file", "allocator.kind=sparsity", f"allocator.path={saved}"]
    check(setup_of(*spent))
    check(setup_of(*spent, "pruner=sparsegpt"))
    check(setup_of(*spent, "pruner.swaps=true"))
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    for override, said in {
        "method.calibration.seed=5": "curves of another calibration text; use the same calibration windows",
        "pruner=magnitude": r"curves of another pruner, wanda\(compare=row\), than this one, magnitude\(\)",
        "pruner.compare=cumulative": r"another pruner, wanda\(compare=row\), than this one, wanda\(compare=cumulative",
        f"model.path={tmp_path / 'other'}": "curves of another model; measure them again for this one",
        "pruner.skip=[k_proj]": "names the matrix 'model.layers.0.self_attn.k_proj', .* or pruner.skip leaves out",
    }.items():
        with pytest.raises(ValueError, match=said):
            check(setup_of(*spent, override))


def check(setup: Setup) -> None:
    setup.method.check(setup)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("pruner=magnitude estimator.masks=wanda", r"another pruner, wanda\(compare=row\), than this one, magnitude"),
        ("estimator.masks=sparsegpt", r"another pruner, sparsegpt\(.*\), than this one, wanda\(compare=row\); use "),
        ("pruner.m=4 allocator.target=0.8", r"0\.8 is outside the levels .* leave of 0, 0\.25, 0\.5, 0\.75; change"),
        ("pruner.m=4 pruner.n=2 allocator.target=0.5", r"leaves nothing to allocate; use estimator=uniform"),
        ("pruner.m=4 estimator.levels=[0.25,0.5,0.75]", r"whose levels are 0\.25, 0\.5, 0\.75; use estimator\.levels"),
        ("pruner.m=4 estimator=measured_loss estimator.levels=[0.3,0.5,0.7]", r"levels=\[.*\] has no meaning with"),
        (
            "method.recover=lora_moe",
            r"spends scores of the pruned model, .*loss_curve gives curves; use method\.recover",
        ),
        ("pruner=magnitude method.calibration.text={text} evaluation.text={text}", r"are the same file"),
        ("pruner=magnitude method.calibration.text=/nowhere", r"the text '/nowhere' cannot be read"),
        ("allocator=depth pruner=magnitude method.calibration.text=/nowhere", r"the text '/nowhere' cannot be read"),
        ("allocator=depth method.calibration.text={text} evaluation.text={text}", r"are the same file"),
        ("method.refine=swaps pruner=magnitude method.calibration.text=/nowhere", r"'/nowhere' cannot be read"),
        ("method.refine=swaps method.allocation={text}", r"starts from scores, curves or a shape"),
        ("method.refine=swaps pruner.m=4 pruner.n=2 allocator.target=0.5", r"leaves nothing to allocate"),
        ("estimator.granularity=block allocator.unit=matrix", r"needs curves of matrices, and these are of blocks"),
        ("pruner.skip=[model.layers]", r"pruner\.skip=\['model\.layers'\] leaves no matrix"),
    ],
)
def test_curves_are_refused_before_anything_is_measured(setup, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr("layerif.models.pretrained.LocalModel.load", lambda self: pytest.fail("it was loaded"))
    text = tmp_path / "text.txt"
    text.write_text("the cat runs over the red hill " * 400)
    given = [override for override in CURVES if not ("allocator=depth" in overrides and "target" in override)]

    def refused():
        check(setup(*(["allocator=depth"] if given != CURVES else []), *overrides.format(text=text).split()))

    with pytest.raises((ValueError, InstantiationException), match=message):
        refused()


def test_few_windows_and_few_tokens_are_told_in_the_record(tiny_overrides, tmp_path):
    few = ["method.calibration.num_windows=2", "method.calibration.window=16", "pruner=sparsegpt", "logger=none"]
    record = run_layerif([*tiny_overrides, *CURVES, *QUICK, *few], tmp_path)
    assert "2 calibration windows of loss curves rank the matrices poorly; 8 rank nearly as well as 16" in record.notes
    (note,) = (note for note in record.notes if note.startswith("SparseGPT has 32 calibration tokens for the 56 "))
    assert "down_proj, so that its Hessian is singular and pruner.damping decides about the rest" in note
    assert_budget(record)


def test_arms_of_curves_and_of_nothing_share_a_sweep(tiny_overrides, tmp_path):
    folder = tmp_path / "deep"
    tiny_model(num_hidden_layers=7).save_pretrained(folder)  # smoothing takes seven layers
    tiny_tokenizer().save_pretrained(folder)
    sweep = ["-m", "arm=curves,uniform", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    others = [*tiny_overrides, "method=prune", "allocator.target=0.6", *SIZES, *QUICK, "logger=none"]
    done = layerif_here([*sweep, *others, f"model.path={folder}"], tmp_path)
    assert done.returncode == 0, done.stderr
    records = {
        record.choices["arm"]: record
        for record in (RunRecord.read(file.parent) for file in tmp_path.glob("sweep/*/record.json"))
    }
    assert {arm: record.choices["allocator"] for arm, record in records.items()} == {
        "curves": "knapsack",
        "uniform": "sparsity",
    }
    for record in records.values():
        assert_budget(record)
    assert [arm for arm, record in records.items() if record.decision.curves] == ["curves"]
    assert len({*records["uniform"].decision.allocation.values}) == 1
