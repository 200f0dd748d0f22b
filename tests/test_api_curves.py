"""Curves of a model in memory: spent at their target by `prune`, nowhere else, and the model unharmed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import layerif
from layerif.allocate.curves import Curves
from layerif.pruning import pruner_called
from layerif.pruning.targets import matrices
from layerif.pruning.wanda import Wanda
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unharmed import assert_unharmed_by

TOKENIZER = tiny_tokenizer()
TEXTS = [
    f"the {noun} runs over the {colour} hill and sleeps" for noun in ("cat", "dog", "pig") for colour in ("red", "old")
]
WINDOWS: dict[str, Any] = {"window": 16, "progress": False}


def curves_of(model: Any = None, texts: Any = TEXTS, **options: Any) -> Curves:
    shared = {"progress": False} if options.get("kind") in ("rank", "experts") else WINDOWS
    return layerif.curves(tiny_model() if model is None else model, TOKENIZER, texts, **shared | options)


def pruned(given: Any, model: Any = None, texts: Any = TEXTS, **options: Any) -> Any:
    model = tiny_model() if model is None else model
    return layerif.prune(model, TOKENIZER, given, calibration=texts, **WINDOWS | options)


def num_zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((linear.weight == 0).sum()) for name, linear in matrices(model).items()}


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_curves_of_a_pruner_are_spent_by_it_to_the_weight(pruner):
    model = tiny_model()
    given = curves_of(model, pruner=pruner).allocate(0.6)
    assert len(given.units) == 21
    zeros = num_zeros(pruned(given, model, pruner=pruner))
    assert sum(zeros.values()) == round(0.6 * sum(given.sizes or ()))
    for unit, value, size in zip(given.units, given.values, given.sizes or (), strict=True):
        assert abs(zeros[unit] - value * size) <= 33  # Wanda rounds each row


def test_the_model_comes_back_as_it_was():
    assert_unharmed_by(lambda model: curves_of(model, rows=["a b c d", "b c d e"], form="diagonal"))


def test_rows_are_another_loss_text_and_another_unit_is_a_sum_or_a_measurement():
    model = tiny_model()
    windows, rows = curves_of(model), curves_of(model, rows=["a b c d e f", "b c d e"])
    assert not torch.allclose(windows.costs, rows.costs)
    assert windows.source["loss_text"] != rows.source["loss_text"]
    assert {part: windows.source[part] == rows.source[part] for part in windows.source} == {
        "model": True,
        "pruner": True,
        "calibration": True,
        "loss_text": False,
    }
    pruned(rows.allocate(0.6), model)  # masks are of the same windows
    by_block = windows.allocate(0.6, unit="block")
    assert by_block.units == ("model.layers.0", "model.layers.1", "model.layers.2")
    of_blocks = curves_of(granularity="block")
    assert of_blocks.allocate(0.6).units == by_block.units
    with pytest.raises(ValueError, match=r"allocator\.unit=matrix needs curves of matrices"):
        of_blocks.allocate(0.6, unit="matrix")
    with pytest.raises(ValueError, match=r"allocator\.target=0\.6 is outside the feasible range 0\.7 to 0\.9"):
        windows.allocate(0.6, floor=0.7)
    with pytest.raises(ValueError, match=r"allocator\.target=0\.95 is outside"):
        windows.allocate(0.95)


def test_gains_of_ranks_are_spent_in_parameters_and_need_rows_of_their_own():
    rows = ["a b c d the cat", "b c d e a dog"]
    found = curves_of(rows=rows, kind="rank")
    assert (found.kind, found.sense, len(found.units)) == ("rank", "gain", 21)
    ranks = found.allocate(3000)
    assert found.size_at(ranks.by_name()) <= 3000
    experts = curves_of(rows=rows, kind="experts", r=2, form="preconditioned", target_modules=["q_proj"])
    assert len(experts.units) == 3
    assert min(experts.allocate().values) >= 1
    assert curves_of(rows=rows, kind="rank", granularity="block", r_max=4).levels == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert_unharmed_by(lambda model: curves_of(model, rows=rows, kind="rank"))
    with pytest.raises(ValueError, match="kind='rank' needs the rows whose loss is watched, apart from those of texts"):
        curves_of(kind="rank")
    with pytest.raises(ValueError, match="the same"):
        curves_of(rows=TEXTS[:2], kind="rank")
    with pytest.raises(ValueError, match=r"form='exact' is not allowed|form"):
        curves_of(rows=rows, kind="rank", form="exact")


def test_nothing_is_written_without_a_store_and_a_store_answers_the_second_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = curves_of()
    assert list(tmp_path.iterdir()) == []
    for batch_size in (4, 1):
        found = curves_of(store=tmp_path / "store", batch_size=batch_size)
        torch.testing.assert_close(found.costs, first.costs)
    assert len(list(tmp_path.glob("store/*/*.safetensors"))) == 1
    assert found.source == first.source
    assert found.allocate(0.6).values == pytest.approx(first.allocate(0.6).values, abs=1e-4)


def test_the_allocation_equals_the_command_lines_for_the_same_windows(tmp_path, tiny_overrides, model_folder):
    from transformers import AutoModelForCausalLM

    from tests.command import run_layerif

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS))
    run = [
        "method=none",
        "estimator=loss_curve",
        "allocator.target=0.6",
        "estimator.calibration={_target_: layerif.pruning.calibration.Calibration, num_windows: 4, window: 16, "
        f"text: '{text}'}}",
        "logger=none",
    ]
    theirs = run_layerif([*tiny_overrides, *run], tmp_path).decision.allocation
    found = curves_of(AutoModelForCausalLM.from_pretrained(model_folder), num_windows=4)
    ours = found.allocate(0.6)
    assert list(ours.units) == theirs.units
    assert list(ours.values) == pytest.approx(theirs.values, abs=1e-9)
    assert {part: ours.source[part] for part in ("pruner", "calibration", "loss_text")} == {
        part: theirs.source[part] for part in ("pruner", "calibration", "loss_text")
    }


def test_curves_are_not_spent_on_another_model_or_by_another_pruner_or_text():
    model = tiny_model()
    given = curves_of(model).allocate(0.6)
    for said, options in {
        "another pruner, wanda(compare=row), than this one, magnitude()": {"pruner": "magnitude"},
        "another calibration text; use the same calibration windows": {"texts": TEXTS[::-1]},
        "another model; measure them again for this one": {"model": tiny_model(seed=1)},
        "another pruner, wanda(compare=row), than this one, wanda(m=4": {"pruner": Wanda(m=4)},
    }.items():
        other = options.pop("model", model)
        with pytest.raises(ValueError, match=re.escape(said)):
            pruned(given, other, **options)
    assert sum(num_zeros(model).values()) == 0
    pruned(given, pruner="sparsegpt")
    pruned(given, pruner=Wanda(swaps=True))


def with_weight(value: float) -> Any:
    model: Any = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    return model


def with_idle_matrix() -> Any:
    model: Any = tiny_model()
    model.model.layers[1].mlp.idle = nn.Linear(32, 32, bias=False)
    return model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "sparsty"}, "kind='sparsty' is not allowed; allowed: sparsity, experts, rank (did you mean"),
        ({"pruner": "wonda"}, "did you mean 'wanda'"),
        ({"r_max": 4}, "r_max has no meaning for curves of kind='sparsity'; leave it out, or use kind='rank'"),
        ({"kind": "rank", "window": 8}, "window has no meaning for curves of kind='rank'; leave it out, or use"),
        ({"form": "diagonl"}, "form='diagonl' is not allowed; allowed: exact, diagonal (did you mean 'diagonal'?)"),
        ({"tokens": 0.0}, "tokens=0.0 is not allowed"),
        ({"texts": []}, "calibration holds no row"),
        ({"rows": []}, "rows holds no row"),
        ({"window": 5000}, "the model reads at most 512 tokens"),
        ({"pruner": pruner_called("wanda", skip=["dwn_proj"])}, "did you mean 'down_proj'"),
        ({"pruner": pruner_called("wanda", skip=["model"])}, "pruner.skip=['model'] leaves no matrix; name fewer"),
        ({"model": with_weight(float("nan"))}, "from block model.layers.1 on"),
        ({"model": with_weight(3e38), "pruner": "magnitude"}, "model.layers.1"),
        ({"model": with_idle_matrix()}, "model.layers.1.mlp.idle took no part in the forward pass, so it has no "
         "gradient; name it in pruner.skip"),
        ({"model": with_idle_matrix(), "rows": ["a b c d"]}, "no calibration token reaches model.layers.1.mlp.idle; "
         "give more calibration windows, or name them: pruner.skip=[model.layers.1.mlp.idle]"),
    ],
)  # fmt: skip
def test_what_has_no_curves_is_one_clear_error_and_harms_no_model(options, said):
    model = options.pop("model", None) or tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(said)):
        curves_of(model, **options)
    assert all(torch.equal(model.state_dict()[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


def test_a_matrix_without_inputs_is_left_out_by_name():
    skip = pruner_called("wanda", skip=["idle"])
    model = with_idle_matrix()
    given = curves_of(model, pruner=skip).allocate(0.5)
    assert len(given.units) == 21
    with pytest.raises(
        ValueError, match=r"no calibration token reaches model\.layers\.1\.mlp\.idle; give .*pruner\.skip"
    ):
        pruned(0.5, with_idle_matrix())
    zeros = num_zeros(pruned(given, model, pruner=skip))
    assert zeros["model.layers.1.mlp.idle"] == 0
    assert sum(zeros.values()) == round(0.5 * sum(given.sizes or ()))


def test_an_adapter_is_merged_first_and_few_windows_are_told():
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="under an adapter; merge it into a folder"):
        curves_of(adapted)
    with pytest.warns(RuntimeWarning, match=r"^2 calibration windows of loss curves rank the matrices poorly"):
        curves_of(num_windows=2)
    with pytest.warns(RuntimeWarning, match=r"^SparseGPT has 48 calibration tokens for the 56 inputs of model\.layers"):
        curves_of(num_windows=3, pruner="sparsegpt")
