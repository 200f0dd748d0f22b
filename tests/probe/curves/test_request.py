"""The request for loss curves: mixtures of texts add up, and the store keeps apart what determines curves alone."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from layerif.allocate.curves import Curves, Knapsack
from layerif.data.batches import batches
from layerif.decide import Decider
from layerif.estimators.loss_curve import LossCurve
from layerif.models.pretrained import LocalModel
from layerif.probe.curves import request
from layerif.probe.curves.measure import measure_loss_curves
from layerif.probe.curves.text import LossText
from layerif.pruning import Pruner
from layerif.pruning.calibration import Calibration
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.sparsegpt import SparseGPT
from layerif.pruning.wanda import Wanda

LEVELS = (0.3, 0.6, 0.8)
TEXT = " ".join(f"the {number} answers of row {number * 7 % 31} are cities or cats" for number in range(60))


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> Calibration:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return Calibration(text=str(file), num_windows=5, window=16, batch_size=2)


@pytest.fixture
def decider(decider: Decider, windows: Calibration) -> Decider:
    """In float64, so that sums can be compared."""
    assert isinstance(decider.model, LocalModel)
    return replace(
        decider,
        model=replace(decider.model, dtype="float64"),
        probe=replace(decider.probe, num_train=5, batch_size=3),
        estimator=LossCurve(calibration=windows, levels=LEVELS, tokens=1.0),
        allocator=Knapsack(target=0.5),
    )


def with_(decider: Decider, **settings: Any) -> Decider:
    estimator: Any = decider.estimator
    return replace(decider, estimator=replace(estimator, **settings))


def taken(decider: Decider) -> tuple[Curves, bool]:
    return decider.estimator.needs.take(decider, decider.model.load)


def curves_of(decider: Decider, **settings: Any) -> Curves:
    return taken(with_(decider, **settings))[0]


# Texts


@pytest.mark.parametrize("settings", [{}, {"granularity": "block"}, {"form": "diagonal"}], ids=str)
def test_a_mixture_of_texts_costs_their_weighted_sum(decider, settings):
    windows, task, mixed = (
        curves_of(decider, loss_text=text, **settings) for text in ("windows", "task", {"task": 0.3, "windows": 0.7})
    )
    assert not torch.allclose(windows.costs, task.costs, rtol=0.01)
    torch.testing.assert_close(mixed.costs, 0.7 * windows.costs + 0.3 * task.costs, rtol=1e-6, atol=0)
    assert windows.by_half is not None
    assert windows.fingerprint != task.fingerprint != mixed.fingerprint


def test_the_curves_of_a_task_are_of_its_rows_and_of_the_masks_of_the_windows(decider):
    found = curves_of(decider, loss_text="task")
    model, rows = decider.model.load(), decider.samples()[0]
    names, weights = [str(index) for index in range(len(rows))], torch.full((len(rows),), 1 / len(rows)).double()
    text = LossText(list(batches(rows, 2, decider.pad_id)), weights, names)
    mask_windows = decider.estimator.calibration.batches(decider.tokenizer)
    params = decider.layers().matrices
    expected = measure_loss_curves(model, params, Wanda(), text, LEVELS, mask_windows=mask_windows)
    torch.testing.assert_close(found.costs, expected.costs, rtol=1e-6, atol=0)
    other = measure_loss_curves(model, params, Wanda(), text, LEVELS)
    assert not torch.allclose(other.costs, expected.costs, rtol=1e-3)


@pytest.mark.usefixtures("unmeasured")
def test_other_rows_of_the_task_are_other_curves_of_the_task_alone(decider):
    fewer = replace(decider, probe=replace(decider.probe, num_train=4))
    assert not taken(with_(decider, loss_text="task"))[1]
    assert not taken(with_(fewer, loss_text="task"))[1]
    assert not taken(decider)[1]
    assert taken(fewer)[1]


# The store


def test_the_second_take_is_answered_from_the_store_with_equal_curves(decider):
    first, reused = taken(decider)
    assert not reused

    def never() -> Any:
        raise AssertionError("must not be measured")

    # Another store object, so that the file is read and not what is remembered of it.
    again, reused = with_(decider).estimator.needs.take(decider, never)
    assert reused
    for field in ("units", "levels", "kind", "sense", "unit", "source", "fingerprint", "is_stepped"):
        assert getattr(again, field) == getattr(first, field), field
    for field in ("costs", "sizes", "by_half"):
        assert torch.equal(getattr(again, field), getattr(first, field)), field
    assert {*first.source} == {"model", "pruner", "calibration", "loss_text"}
    assert [file.parent.name for file in decider.store.files(first.fingerprint)] == ["loss_curves"]


def file_with(windows: Calibration, text: str, tmp_path) -> Calibration:
    file = tmp_path / "other.txt"
    file.write_text(text)
    return replace(windows, text=str(file))


CHANGES: dict[str, dict[str, Any]] = {
    "pruner": {"pruner": Magnitude()},
    "setting of the pruner": {"pruner": Wanda(compare="cumulative")},
    "masks": {"masks": "sparsegpt"},
    "n of m": {"pruner": Wanda(m=4), "levels": None},
    "skipped matrices": {"pruner": Wanda(skip=["down_proj"])},
    "levels": {"levels": (0.3, 0.6, 0.81)},
    "form": {"form": "diagonal"},
    "granularity": {"granularity": "block"},
    "tokens": {"tokens": 0.5},
    "loss text": {"loss_text": {"windows": 0.5, "task": 0.5}},
}


@pytest.fixture
def unmeasured(monkeypatch):
    """Gives curves at once: for laws of keys, which many measurements would make slow."""

    def curves(model, params, masks, loss_text, levels, *, fingerprint, **settings) -> Curves:
        costs_K = torch.arange(len(levels) + 1).double()[None]
        return Curves(("a",), (0.0, *levels), costs_K, costs_K, fingerprint=fingerprint, by_half=costs_K[None] / 2)

    monkeypatch.setattr(request, "measure_loss_curves", curves)


@pytest.mark.usefixtures("unmeasured")
def test_whatever_changes_curves_misses_the_store(decider, windows, tmp_path):
    keys = [curves_of(decider).fingerprint]
    shorter, other = replace(windows, window=15), file_with(windows, TEXT[40:], tmp_path)
    more = {"windows": {"calibration": replace(windows, num_windows=4)}, "shorter": {"calibration": shorter}}
    more |= {"another choice": {"calibration": replace(windows, seed=9)}, "another text": {"calibration": other}}
    for what, settings in (CHANGES | more).items():
        found, reused = taken(with_(decider, **settings))
        assert not reused, what
        keys.append(found.fingerprint)
    seeds = [taken(with_(decider, tokens=0.5, seed=seed)) for seed in (0, 1)]
    assert [reused for _, reused in seeds] == [True, False]
    assert len({*keys}) == len(keys)


@pytest.mark.usefixtures("unmeasured")
def test_what_changes_no_curve_finds_them_in_the_store(decider, windows, tmp_path):
    first = curves_of(decider).fingerprint
    same = file_with(windows, TEXT, tmp_path)
    for settings in (
        {"calibration": replace(windows, batch_size=4)},
        {"calibration": same},  # the text decides, and not its name
        {"seed": 3},  # all tokens are looked at, and the windows have a seed of their own
        {"pruner": Wanda(paper_epsilon=0.3)},
        {"pruner": SparseGPT(), "masks": "wanda"},
    ):
        assert taken(with_(decider, **settings))[1], settings
    probe = replace(decider.probe, batch_size=1, memory_gb=0.5, num_train=3, scope="mlp")
    again, reused = taken(replace(decider, probe=probe))
    assert reused
    assert again.fingerprint == first


def test_batch_sizes_change_no_curve(decider, windows, tmp_path):
    mixed = with_(decider, loss_text={"windows": 0.5, "task": 0.5}, pruner=SparseGPT(damping=0.05))
    first = curves_of(mixed)
    other = replace(mixed, store=type(decider.store)(tmp_path / "other"), probe=replace(decider.probe, batch_size=1))
    again, reused = taken(with_(other, calibration=replace(windows, batch_size=5)))
    assert not reused
    assert again.fingerprint == first.fingerprint
    torch.testing.assert_close(again.costs, first.costs, rtol=1e-6, atol=0)


# Decisions


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT(), Wanda(m=4)], ids=lambda pruner: pruner.called)
def test_a_decision_spends_the_curves_of_its_pruner(decider, pruner):
    asked = with_(decider, pruner=pruner, levels=None if pruner.m else LEVELS)
    decision = asked()
    curves, reused = taken(asked)
    assert reused
    assert isinstance(decision.curves, Curves)
    assert torch.equal(decision.curves.costs, curves.costs)
    assert decision.allocation == Knapsack(target=0.5)(curves)
    assert decision.allocation.units == tuple(name.removesuffix(".weight") for name in decider.layers().matrices)
    assert decision.allocation.source["pruner"] == pruner.called
    assert (decision.allocation.source["calibration"] == "none") == (pruner == Magnitude())
    assert {*decision.allocation.values} <= {0.25, 0.5, 0.75} if pruner.m else min(decision.allocation.values) >= 0.2
    assert decision.num_samples == (0, 0)
    assert asked().reused


def test_skipped_matrices_have_no_curve_and_no_part_of_the_budget(decider):
    skip = ("down_proj", "model.layers.1")
    decision = replace(with_(decider, pruner=Wanda(skip=skip)), skip=skip)()
    assert len(decision.allocation.units) == 2 * 6
    assert not any("down_proj" in unit or ".1." in unit for unit in decision.allocation.units)
    assert decision.allocation.sizes == decider.layers().without(skip).matrix_numel
    whole = curves_of(decider)
    kept = [whole.units.index(unit) for unit in decision.allocation.units]
    assert isinstance(decision.curves, Curves)
    torch.testing.assert_close(decision.curves.costs, whole.costs[kept], rtol=1e-9, atol=0)


def test_the_preview_is_uniform_and_measures_nothing(decider):
    def never() -> Any:
        raise AssertionError("must not be measured")

    for granularity in ("matrix", "block"):
        previewed = with_(decider, granularity=granularity).preview()
        assert previewed.values == pytest.approx([0.5] * len(previewed.values), abs=1e-12)
    impossible = replace(decider, allocator=Knapsack(target=0.85))  # above the highest of LEVELS
    with pytest.raises(ValueError, match=r"allocator\.target=0\.85 is outside the levels"):
        impossible(never)
    blocks = replace(with_(decider, granularity="block"), allocator=Knapsack(unit="matrix"))
    with pytest.raises(ValueError, match=r"allocator\.unit=matrix needs curves of matrices"):
        blocks(never)


# Settings


def test_few_windows_are_warned_of(decider, windows):
    few = with_(decider, calibration=replace(windows, num_windows=3))
    with pytest.warns(RuntimeWarning, match=r"3 calibration windows of loss curves rank the matrices poorly"):
        few.preview()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decider.preview()
        with_(few, loss_text="task").preview()


def test_an_adapter_is_refused(decider):
    adapted = replace(decider, model=replace(decider.model, adapter="/folder"))
    with pytest.raises(ValueError, match="cannot price the weights under an adapter; merge it"):
        adapted.estimator.needs.check(adapted)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_text": "rows"}, r"estimator\.loss_text='rows' is not allowed; allowed: windows, task"),
        ({"loss_text": {"windows": 0.5, "task": 0.4}}, r"loss_text add up to 0\.9; give weights that add up to 1"),
        ({"loss_text": {"windows": 1.5, "task": -0.5}}, r"loss_text\.windows=1\.5 is not allowed; allowed: above 0"),
        ({"loss_text": {}}, r"loss_text add up to 0; give weights that add up to 1"),
        ({"levels": (0.5, 0.6)}, r"levels=\[0\.5, 0\.6\] must be three or more different sparsities, ascending"),
        ({"levels": (0.5, 0.5, 0.6)}, "three or more different sparsities, ascending"),
        ({"levels": (0.2, 0.5, 1.0)}, r"estimator\.levels=1\.0 is not allowed; allowed: .* below 1"),
        (
            {"levels": LEVELS, "pruner": Wanda(m=4)},
            r"no meaning with pruner\.m=4, whose levels are 0\.25, 0\.5, 0\.75;",
        ),
        ({"tokens": 0.0}, r"estimator\.tokens=0\.0 is not allowed; allowed: .* above 0"),
        ({"tokens": 1.1}, r"of at most 1; 1 takes all positions"),
        ({"form": "kfac"}, r"estimator\.form='kfac' is not allowed; allowed: exact, diagonal"),
        ({"masks": "wnda"}, r"did you mean 'wanda'"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LossCurve(**settings)


@pytest.mark.parametrize(
    ("masks", "pruner", "by"),
    [
        (None, SparseGPT(damping=0.1), SparseGPT(damping=0.1)),
        ("sparsegpt", SparseGPT(damping=0.1), SparseGPT(damping=0.1)),
        ("wanda", SparseGPT(damping=0.1, m=8, skip=["up_proj"]), Wanda(m=8, skip=["up_proj"])),
        ("magnitude", Wanda(n=2, m=4), Magnitude(n=2, m=4)),
    ],
)
def test_masks_are_those_that_are_named_with_the_groups_and_exceptions_of_the_pruner(masks, pruner: Pruner, by):
    estimator = LossCurve(masks=masks, pruner=pruner)
    assert estimator.masked_by == by
    assert estimator.needs.changes == by
    assert estimator.needs.levels == (by.levels() or (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    assert f"masks={by.called}" in estimator.source
