"""Laws of the report of allocations by matrix: every arm has its picture, and repeated settings make no arm."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from layerif.record.record import AllocationRecord, RunRecord
from layerif.report import write_report
from layerif.report.arms import comparable, runs_of
from layerif.report.plots import plot_allocation_profiles, plot_matrix_allocations, plot_routing
from tests.records import MATRICES, by_curves, by_matrix, record, written

CALIBRATION = {"text": "documentation", "num_windows": 16}
PRUNER = {"_target_": "layerif.pruning.wanda.Wanda", "n": None, "skip": []}


def curves(
    seed: int = 0,
    *,
    number: int | None = None,
    own: Mapping[str, Any] | None = None,
    **settings: Mapping[str, Any],
) -> RunRecord:
    """A run by loss curves, whose configuration repeats the pruner and the calibration in the estimator.

    Args:
        seed: of the run.
        number: of its allocation; None: the seed.
        own: settings of the estimator, which may replace those that it repeats.
        settings: of `calibration`, `pruner` and `allocator`.
    """
    one = by_curves(by_matrix(4, seed=seed if number is None else number), seed=seed)
    config: dict[str, Any] = copy.deepcopy(dict(one.config))
    pruner, calibration = (
        {**default, **settings.get(section, {})}
        for section, default in (("pruner", PRUNER), ("calibration", {**CALIBRATION, "seed": seed}))
    )
    config["pruner"], config["method"] = pruner, {"pruner": pruner, "calibration": calibration}
    config["estimator"] = {"form": "exact", "pruner": pruner, "calibration": calibration, "seed": seed, **(own or {})}
    config["allocator"] = {"target": 0.5, "unit": None, **settings.get("allocator", {})}
    one.config = config
    one.decision.allocation.budget = 0.5
    return one


def arms(*jobs: RunRecord) -> list[str]:
    return [run.arm for run in runs_of(jobs)]


def test_runs_that_differ_in_their_seed_alone_are_one_arm():
    runs = runs_of([curves(0), curves(1)])
    assert {run.arm for run in runs} == {"loss_curve knapsack"}
    assert [run.seed for run in runs] == ["0", "1"]


def test_a_seed_of_the_calibration_alone_is_told_once():
    runs = runs_of([curves(), curves(calibration={"seed": 7})])
    assert {run.arm for run in runs} == {"loss_curve knapsack"}
    assert [dict(run.seeds) for run in runs] == [{"method.calibration.seed": 0}, {"method.calibration.seed": 7}]


def test_a_setting_that_the_estimator_repeats_is_told_once_and_is_one_difference():
    told = [f"loss_curve knapsack method.calibration.num_windows={number}" for number in (16, 8)]
    assert arms(curves(), curves(calibration={"num_windows": 8})) == told
    skipping = runs_of([curves(), curves(pruner={"skip": ["down_proj"]})])
    skips = ("[]", '["down_proj"]')
    assert [run.arm for run in skipping] == [f"loss_curve knapsack pruner.skip={skip}" for skip in skips]
    assert comparable(*skipping)  # another pruner, and the same way to the allocation


def test_what_the_estimator_has_of_its_own_is_told():
    shorter = {"calibration": {**CALIBRATION, "num_windows": 4, "seed": 0}}
    skipping = {"pruner": {**PRUNER, "skip": ["up_proj"]}}
    for own, said in (
        (shorter, "estimator.calibration.num_windows=4"),
        ({"calibration": None}, "estimator.calibration=null"),
        (skipping, 'estimator.pruner.skip=["up_proj"]'),
    ):
        assert arms(curves(), curves(own=own)) == ["loss_curve knapsack", f"loss_curve knapsack {said}"]


def test_an_estimator_without_a_method_to_repeat_has_no_setting_for_it():
    runs = [curves(own={"calibration": None}), curves(own={"calibration": None}, allocator={"unit": "block"})]
    for run in runs:
        run.choices, run.config = {**run.choices, "method": "plan"}, {**run.config, "method": {}}
    assert arms(*runs) == [f"loss_curve knapsack allocator.unit={unit}" for unit in ("null", "block")]


def test_the_pruner_of_curves_that_nothing_spends_yet_tells_arms_apart():
    runs = [curves(), curves()]
    for run, pruner in zip(runs, ("wanda", "magnitude"), strict=True):
        run.choices = {**run.choices, "method": "plan", "pruner": pruner}
    assert arms(*runs) == [f"loss_curve knapsack pruner={pruner}" for pruner in ("wanda", "magnitude")]


def test_what_goes_by_depth_alone_is_told_once_and_without_the_estimator():
    slopes = {"slope": 0.01, "spare": 1}, {"slope": None, "spare": 0}
    runs = [curves(own={"form": form}, allocator=slope) for form in ("exact", "diagonal") for slope in slopes]
    for run in runs:
        run.choices = {**run.choices, "allocator": "depth"}
    names = ["depth(slope=0.01, spare=1)", "depth(slope=by trials, spare=0)"]
    assert [name.removesuffix(" (1)").removesuffix(" (2)") for name in arms(*runs)] == names * 2


def test_settings_of_the_allocator_are_in_the_name():
    names = arms(curves(), curves(allocator={"unit": "block"}))
    assert names == [f"loss_curve knapsack allocator.unit={unit}" for unit in ("null", "block")]


def test_a_budget_that_a_step_misses_is_the_same_size():
    stepped, uniform, larger = curves(), curves(), curves()
    for run, budget in ((stepped, 0.49974), (uniform, 0.5), (larger, 0.52)):
        run.decision.allocation.budget = budget
    uniform.choices = {**uniform.choices, "estimator": "uniform", "allocator": "sparsity"}
    first, second, third = runs_of([uniform, stepped, larger])
    assert comparable(first, second)
    assert not comparable(first, third)


def test_the_first_allocation_of_each_arm_has_a_picture_on_one_scale_and_six_are_drawn():
    jobs = [curves(seed, number=2 * arm + seed, allocator={"floor": arm / 10}) for arm in range(8) for seed in (0, 1)]
    by_block = curves()
    by_block.choices = {**by_block.choices, "estimator": "uniform", "allocator": "sparsity"}
    by_block.decision.allocation = AllocationRecord(kind="sparsity", units=["h.0"], values=[0.5], budget=0.5, sizes=[1])
    plot, num_left_out = plot_matrix_allocations(runs_of([by_block, *jobs]))
    assert plot is not None
    assert num_left_out == 2
    panels = [axes for axes in plot.figure.axes if axes.get_title(loc="left")]
    firsts = [by_matrix(4, seed=2 * arm) for arm in range(6)]
    values = [value for one in firsts for value in one.values]
    for arm, (axes, wanted) in enumerate(zip(panels, firsts, strict=True)):
        assert axes.get_title(loc="left") == f"loss_curve knapsack allocator.floor={arm / 10} (budget 0.5)"
        (image,) = axes.images
        np.testing.assert_allclose(
            np.asarray(image.get_array()), [list(of.values()) for of in wanted.by_matrix().values()], rtol=1e-6
        )
        assert image.get_clim() == (min(values), max(values))
    assert plot_matrix_allocations(runs_of([by_block])) == (None, 0)


def test_profiles_have_the_means_of_blocks():
    plot = plot_allocation_profiles(runs_of([curves()]))
    assert plot is not None
    patches: Any = plot.figure.axes[0].patches
    assert [bar.get_height() for bar in patches] == pytest.approx(list(by_matrix(4).by_block().values()))


def test_routers_of_a_recovery_stand_at_their_blocks_beside_an_allocation_by_matrix():
    one = curves()
    one.decision.allocation = by_matrix(without=[f"0.{kind}" for kind in MATRICES])
    even, collapsed = {"load": [0.5, 0.5], "entropy": np.log(2)}, {"load": [1.0, 0.0], "entropy": 0.0}
    one.routing = {"model.layers.0": even, "model.layers.2": collapsed}
    plot = plot_routing(runs_of([one]))
    assert plot is not None
    (line,) = plot.figure.axes[0].lines
    np.testing.assert_allclose(np.array(line.get_ydata(), dtype=float), [1.0, np.nan, 0.0])


def test_the_page_shows_the_matrices_and_says_what_it_leaves_out(tmp_path):
    jobs = [curves(number=arm, allocator={"floor": arm / 10}) for arm in range(7)]
    write_report(written(tmp_path, jobs), Console(quiet=True))
    page = (tmp_path / "report.html").read_text()
    assert '<h2 id="h' in page
    assert "Allocated sparsity per matrix</h2>" in page
    assert "Further arms that are not drawn here: 1. The allocation.png of each run shows its own." in page
    assert (tmp_path / "matrices.png").read_bytes().startswith(b"\x89PNG")


def test_an_allocation_by_block_has_no_picture_of_matrices(tmp_path):
    one, blocks = record("uniform", [True], choices={"method": "prune"}), ["h.0", "h.1"]
    one.decision.allocation = AllocationRecord(
        kind="sparsity", units=blocks, values=[0.5, 0.5], budget=0.5, sizes=[1, 1]
    )
    write_report(written(tmp_path, [one]), Console(quiet=True))
    assert not (tmp_path / "matrices.png").exists()
    assert "per matrix" not in (tmp_path / "report.html").read_text()
