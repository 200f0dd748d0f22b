"""What the report says first: in plain words, no more than its comparisons support, with the power that they had."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from layerif.record.names import UNTOUCHED
from layerif.record.plots import COLOURS, plot_allocations, profiles_plot
from layerif.record.record import AllocationRecord, RunRecord
from layerif.report import comparisons as compare
from layerif.report import write_report
from layerif.report.arms import runs_of
from layerif.report.reading import FinishedJobs
from layerif.report.sections import sections
from layerif.report.tables import in_full, results, table_metrics
from layerif.report.verdicts import collapsed, one_rate, power, unequal, verdicts
from tests.records import record, with_before, with_losses, written

pytestmark = pytest.mark.usefixtures("undrawn")
ROWS = 80
HARD = np.random.default_rng(0).gamma(2.0, 0.6, ROWS)


def run_of(name: str, *, gain: float, seed: int = 0, noise: float = 0.1, **options) -> RunRecord:
    """A run whose loss is `gain` below the untouched model's, and whose answers do not show it."""
    rng = np.random.default_rng((seed, len(name)))
    right = [bool(answer) for answer in np.arange(ROWS) + rng.integers(-2, 3, ROWS) < 40]
    one = with_before(record(name, right, seed=seed, **options), [number < 40 for number in range(ROWS)])
    return with_losses(one, HARD - gain + noise * rng.standard_normal(ROWS), before=HARD)


def said_of(records) -> list[str]:
    runs = runs_of(records)
    return verdicts(runs, {metric: compare.comparisons(runs, metric)[0] for metric in table_metrics(runs)})


def test_the_loss_sees_what_the_accuracy_does_not_and_the_page_begins_with_it(tmp_path):
    records = [
        run_of(name, gain=gain, seed=seed) for name, gain in (("uniform", 0.3), ("datainf", 0.5)) for seed in (0, 1, 2)
    ]
    said = said_of(records)
    assert said[0].startswith(
        f"uniform experts and datainf experts are better than the {UNTOUCHED}: loss per token lower by 0."
    )
    (arms,) = [sentence for sentence in said if sentence.startswith("datainf experts is better than uniform experts: ")]
    assert "loss per token lower by 0.2" in arms
    assert "by accuracy they cannot be told apart" in arms
    console = Console(record=True, width=200)
    write_report(written(tmp_path, records), console)
    titles = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("## ")]
    assert titles[:3] == ["## What was found", "## Results: loss", "## Results: accuracy"]
    printed = console.export_text()
    assert printed.index("What was found") < printed.index("Results: loss")


def test_arms_that_cannot_be_told_apart_are_called_so_with_what_would_have_been_missed():
    first, second = (record(name, [True, False] * 20, seed=0) for name in ("uniform", "datainf"))
    (said,) = said_of([with_losses(first, HARD[:40]), with_losses(second, HARD[::-1][:40])])
    assert said.startswith(
        "datainf experts and uniform experts cannot be told apart: a difference in loss per token below "
    )
    assert " nats and in accuracy below 0." in said


def test_one_arm_is_compared_with_nothing_and_no_measurement_says_nothing():
    assert said_of([record("uniform", [True] * 4)]) == [
        "There is one arm, so nothing is compared. uniform experts: accuracy 1.000 on capital."
    ]
    assert said_of([record("uniform", [], metrics={}, answers={})]) == []


def test_arms_are_compared_by_loss_first_where_every_arm_has_it():
    both = [run_of("uniform", gain=0.1), run_of("datainf", gain=0.2)]
    assert table_metrics(runs_of(both)) == ["loss", "accuracy"]
    without = [*both, record("exact", [True] * ROWS)]
    assert table_metrics(runs_of(without)) == ["accuracy", "loss"]
    table, _ = compare.comparisons(runs_of(both), "loss")
    assert table["rows"].tolist() == [ROWS] * 3
    assert table["from"].tolist() == [UNTOUCHED, UNTOUCHED, "uniform experts"]
    assert np.all(table["p Holm"].to_numpy() >= table["p"].to_numpy())
    assert results(runs_of(both), "loss").cells["uniform experts", "capital"].basis == f"t over {ROWS} rows, 1 seed"


def test_every_table_of_results_and_comparisons_states_its_power():
    runs = runs_of([run_of(name, gain=0.3, seed=seed) for name in ("uniform", "datainf") for seed in (0, 1)])
    for metric in ("loss", "accuracy"):
        table, _ = compare.comparisons(runs, metric)
        least = table["smallest found"].to_numpy()
        assert f"{least.min():.3f} to {least.max():.3f}" in power(metric, table) or np.isinf(least.max())
    jobs = FinishedJobs(name="", records=[], failures=[], failed_again=[], unfinished=[], left_out=[])
    found = sections(jobs, runs)
    shown = [part for part in found if part.title.startswith("Results")]
    assert all(any("80 % power" in line for line in part.said) for part in shown)
    compared = [part for part in found if part.title.startswith(("Comparisons", "Tukey")) and part.table is not None]
    assert len(compared) == 4
    assert all("smallest found" in part.table for part in compared)  # type: ignore[operator]


def test_a_model_beyond_the_token_frequencies_has_collapsed_unless_the_untouched_one_is_beyond_them_too():
    broken, fine = run_of("uniform", gain=-9.0), run_of("datainf", gain=0.2)
    for one in (broken, fine):
        one.context_free = {"loss": 4.0, "perplexity_256": 700.0}
    (said,) = collapsed(runs_of([broken, fine]), ["loss"])
    assert said.startswith("Collapsed on capital: uniform experts has a loss per token of ")
    for one in (broken, fine):
        one.context_free = {"loss": 0.5}
    assert collapsed(runs_of([broken, fine]), ["loss"]) == []
    for bound, is_said in ((700.0, True), (2000.0, False)):
        pruned = record("uniform", [True], metrics={"perplexity_256": 1000.0}, context_free={"perplexity_256": bound})
        assert bool(collapsed(runs_of([pruned]), ["perplexity_256"])) == is_said


def test_an_interval_of_an_accuracy_stays_within_what_it_can_be():
    runs = runs_of([record("uniform", [True] * right + [False] * (10 - right), seed=right) for right in (0, 4)])
    cell = results(runs, "accuracy").cells["uniform experts", "capital"]
    assert (cell.low, cell.high) == (0.0, 1.0)


def test_the_seeds_of_an_arm_stand_together():
    runs = runs_of([record(name, [True], seed=seed) for seed in (0, 1) for name in ("uniform", "datainf", "exact")])
    assert in_full(runs)["run"].tolist() == [
        f"{name} experts" for name in ("uniform", "datainf", "exact") for _ in "01"
    ]


def test_runs_of_an_arm_have_one_colour_and_one_label_and_layers_are_whole():
    values = {f"{arm} seed {seed}": np.full(4, 0.5) for arm in "abc" for seed in range(3)}
    figure = profiles_plot(values, "", "", "", [name.split()[0] for name in values]).figure
    (axes,) = figure.axes
    assert [to_hex(line.get_color()) for line in axes.lines] == [
        COLOURS[number] for number in range(3) for _ in range(3)
    ]
    assert axes.get_legend_handles_labels()[1] == [f"{arm} (3 seeds)" for arm in "abc"]
    many = {f"{arm} seed {seed}": np.full(4, 0.5) for seed in range(2) for arm in "abcdefgh"}
    rows = profiles_plot(many, "", "", "", [name.split()[0] for name in many]).figure.axes[0].texts
    assert [text.get_text()[0] for text in rows] == [arm for arm in "abcdefgh" for _ in range(2)]
    one = AllocationRecord(kind="experts", units=list("wxyz"), values=[1, 2, 3, 2], budget=8)
    bars = plot_allocations({"a 0": one, "a 1": one, "b": one}, ["a", "a", "b"]).figure.axes[0]
    assert bars.get_legend_handles_labels()[1] == ["a (2 seeds)", "b (budget 8)"]
    for each in (axes, bars):
        each.set_xlim(-0.5, 3.5)
        assert all(tick == int(tick) for tick in each.get_xticks())
    plt.close("all")


def test_unequal_sizes_and_one_learning_rate_for_all_arms_are_said():
    def runs(size: int, rate: float):
        settings = {"method.learning_rate": rate}
        arms = (("uniform", 1000, {"method.learning_rate": 3e-4}), ("datainf", size, settings))
        records = [run_of(name, gain=0.3, parameters={"trainable": of}, settings=given) for name, of, given in arms]
        return runs_of(records)

    assert unequal(runs(1004, 3e-4)) == []
    (said,) = unequal(runs(1006, 3e-4))
    assert "uniform experts trains 1,000 parameters and datainf experts 1,006" in said
    (at_one,) = one_rate(runs(1000, 3e-4))
    assert at_one.startswith("All arms were fine-tuned at one learning rate, 0.0003.")
    assert one_rate(runs(1000, 1e-3)) == []
    assert one_rate(runs(1000, 3e-4)[:1]) == []
