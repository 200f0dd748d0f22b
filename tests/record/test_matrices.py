"""Laws of an allocation by matrix in the record, its frames, its text and its picture."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from layerif.layers import block_of
from layerif.record.frames import frames
from layerif.record.plots import plot_allocations, plots_of_run
from layerif.record.record import AllocationRecord, RunRecord
from layerif.record.text import allocation_lines, print_run
from tests.records import MATRICES, by_curves, by_matrix, record

ENDS = [kind.rpartition(".")[2] for kind in MATRICES]
MISSING = ("0.mlp.up_proj", "1.self_attn.q_proj")


def dense(one: AllocationRecord, depth: int) -> np.ndarray:
    """The table kind of matrix × block by names alone, NaN where there is no value."""
    of = dict(zip(one.units, one.values, strict=True))
    return np.array([[of.get(f"model.layers.{block}.{kind}", np.nan) for block in range(depth)] for kind in MATRICES])


@given(st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_blocks_have_the_weighted_means_of_their_matrices(depth, seed):
    one = by_matrix(depth, seed=seed, without=MISSING)
    table, weights = dense(one, depth), np.array(list(MATRICES.values()))[:, None] * np.ones(depth)
    weights[np.isnan(table)] = 0
    wanted = np.nansum(table * weights, axis=0) / weights.sum(axis=0)
    assert list(one.by_block()) == [f"model.layers.{block}" for block in range(depth)]
    assert list(one.by_block().values()) == pytest.approx(wanted.tolist())
    assert np.average(wanted, weights=weights.sum(axis=0)) == pytest.approx(one.budget)


def test_the_table_has_every_value_once_in_the_order_of_the_model():
    one = by_matrix(without=MISSING)
    table = one.by_matrix()
    assert list(table) == list(MATRICES)  # up_proj and q_proj, too, which some blocks lack
    assert table["mlp.up_proj"].keys() == {"model.layers.1", "model.layers.2"}
    found = {f"{block}.{kind}": value for kind, of in table.items() for block, value in of.items()}
    assert found == dict(zip(one.units, one.values, strict=True))


def test_a_block_keeps_its_value_and_stands_at_its_number():
    units = ["model.layers.10", "model.layers.2", "model.layers.3"]
    one = AllocationRecord(kind="experts", units=units, values=[3, 1, 2], budget=6)
    assert not one.is_by_matrix
    assert one.by_matrix() == {}
    assert list(one.by_block().items()) == [("model.layers.2", 1), ("model.layers.3", 2), ("model.layers.10", 3)]


def test_the_value_of_a_block_is_that_of_its_matrices_without_one_of_their_own():
    units = ["model.layers.0", "model.layers.0.mlp.up_proj", "model.layers.1.mlp", "model.layers.1.mlp.up_proj"]
    one = AllocationRecord(kind="sparsity", units=units, values=[0.5, 0.8, 0.2, 0.4], budget=0.5, sizes=[3, 1, 2, 2])
    assert one.by_block() == pytest.approx({"model.layers.0": (1.5 + 0.8) / 4, "model.layers.1": 0.3})
    assert one.by_matrix() == {
        "mlp": {"model.layers.0": 0.5, "model.layers.1": 0.2},
        "mlp.up_proj": {"model.layers.0": 0.8, "model.layers.1": 0.4},
    }


@pytest.mark.parametrize(("sizes", "said"), [([1] * 20, "has 20 numbers for 21 names"), ([0] * 21, "sizes holds 0")])
def test_sizes_that_no_mean_can_be_weighted_by_are_refused(tmp_path, sizes, said):
    one = by_curves(by_matrix())
    one.decision.allocation.sizes = sizes
    one.write(tmp_path)
    with pytest.raises(ValueError, match=said):
        RunRecord.read(tmp_path)


def test_the_frame_of_layers_has_a_row_for_each_matrix():
    one = by_matrix(without=[f"0.{kind}" for kind in MATRICES])
    layers = frames(by_curves(one))["layers"]
    assert list(layers) == ["depth", "layer", "matrix", "sparsity"]
    assert layers["depth"].tolist() == [1] * 7 + [2] * 7  # the first block was left out
    assert layers["matrix"].tolist() == list(MATRICES) * 2
    assert (layers["layer"] + "." + layers["matrix"]).tolist() == one.units
    assert layers["sparsity"].tolist() == one.values


def test_scores_of_blocks_stand_beside_each_of_their_matrices():
    run = record(
        "datainf", [True], decision={"layers": ["model.layers.0", "model.layers.1"], "scores": (1, 3), "values": (1, 2)}
    )
    run.decision.allocation = by_matrix(2)
    layers = frames(run)["layers"]
    assert layers["score"].tolist() == [1] * 7 + [3] * 7


@pytest.mark.usefixtures("undrawn")
def test_the_console_tells_blocks_and_ranges_and_not_every_matrix(tmp_path):
    one, console = by_matrix(30), Console(record=True, width=2000)
    run = by_curves(one)
    print_run(run, tmp_path, console)
    said = console.export_text()
    assert len(re.findall(r"\d\.\d{3}(?!\d)", said.partition("reliability")[0])) == 30 + 2 + 2 * 7  # means and ranges
    assert all(f"{mean:.3f}" in said for mean in one.by_block().values())
    table = dense(one, 30)
    assert f"210 matrices from {table.min():.3f} to {table.max():.3f}: " in said
    for end, row in zip(ENDS, table, strict=True):
        assert f"{end} {row.min():.3f} to {row.max():.3f}" in said
    assert "reliability 0.93 (rank correlation of the allocations by two halves of the samples)" in said
    assert "predicted rise of the loss 1.450 nats\n" in said
    assert len(pd.read_csv(tmp_path / "layers.csv")) == 210

    run.decision.curves |= {"actual": 1.54}  # type: ignore[operator]
    print_run(run, tmp_path, console := Console(record=True, width=2000))
    assert "predicted rise of the loss 1.450 nats, actual 1.540 nats\n" in console.export_text()


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_wider_than_the_console_is_a_column(tmp_path):
    run = by_curves(by_matrix())
    wide, narrow = (Console(record=True, width=width) for width in (200, 60))
    for console in (wide, narrow):
        print_run(run, tmp_path, console)
    assert re.search(r"│ loss_curve knapsack +│ capital +│", wide.export_text())
    said = narrow.export_text()
    assert re.search(r"┃ +┃ loss_curve knapsack +┃", said)
    assert re.search(r"│ task +│ capital +│", said)


def test_values_that_are_alike_are_told_once():
    one = by_matrix()
    one.values = [0.5] * 21
    assert allocation_lines(one) == ["0.500 for each of 21 matrices"]
    experts = AllocationRecord(kind="experts", units=["block.0", "block.1"], values=[3, 1], budget=4)
    assert allocation_lines(experts) == ["[3, 1]"]


def test_hundreds_of_kinds_are_one_range():
    units = [f"model.layers.0.mlp.experts.{expert}.w{part}" for expert in range(8) for part in (1, 2)]
    one = AllocationRecord(kind="sparsity", units=units, values=[0.25, 0.75] * 8, budget=0.5, sizes=[1] * 16)
    assert allocation_lines(one) == ["[0.500] as means of the blocks", "16 matrices from 0.250 to 0.750"]


def test_the_picture_of_a_run_has_a_row_for_each_kind_and_a_column_for_each_block():
    one = by_matrix(30, without=MISSING)
    plot = plots_of_run(by_curves(one))["allocation"]
    of_values, bar = plot.figure.axes
    (image,) = of_values.images
    np.testing.assert_allclose(np.ma.filled(np.ma.asarray(image.get_array()), np.nan), dense(one, 30), rtol=1e-6)
    assert [text.get_text() for text in of_values.texts] == ENDS
    assert bar.get_ylabel() == "sparsity"
    assert "grey: no value" in of_values.get_xlabel()
    assert plot.title == "Allocated sparsity per matrix"
    values = dense(one, 30)[0]
    assert f"q_proj {np.nanmin(values):.3g} to {np.nanmax(values):.3g}" in plot.alt


def test_an_allocation_by_block_stays_a_picture_of_bars_at_the_numbers_of_the_blocks():
    units = ["model.layers.1", "model.layers.3"]
    one = AllocationRecord(kind="sparsity", units=units, values=[0.25, 0.75], budget=0.5, sizes=[1, 1])
    patches: Any = plot_allocations({"mine": one}).figure.axes[0].patches
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in patches if bar.get_height() > 0}
    assert bars == {1: 0.25, 3: 0.75}


def test_profiles_beside_one_another_have_the_means_of_blocks():
    one, uniform = by_matrix(30), by_matrix(30)
    uniform.units = [f"model.layers.{block}" for block in range(30)]
    uniform.values, uniform.sizes = [0.5] * 30, [32] * 30
    plot = plot_allocations({"curves": one, "uniform": uniform})
    patches: Any = plot.figure.axes[0].patches
    assert [bar.get_height() for bar in patches] == pytest.approx([*one.by_block().values(), *[0.5] * 30])
    highest = max(one.by_block(), key=lambda block: one.by_block()[block])
    assert f"most at blocks {highest.rpartition('.')[2]}, " in plot.alt
    assert "(means where matrices differ)" in plot.title
    assert {block_of(unit) for unit in one.units} == one.by_block().keys()
