"""Quantising as a run: decided, spent, written, read again, told in the record, and refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra.errors import InstantiationException
from transformers import AutoModelForCausalLM, GgufConfig

from layerif.app.setup import Setup
from layerif.data.text import text
from layerif.evaluate.perplexity import perplexity
from layerif.formats import FORMATS, formats_called
from layerif.layers import block_of
from layerif.models.blocks import layer_map
from layerif.pruning.trials import mean_token_loss
from layerif.record.record import RunRecord
from tests.app.methods.runs import pruned as ran
from tests.command import layerif_here, run_layerif
from tests.tiny import tiny_model, tiny_tokenizer

QUANTISE = [
    "method=quantise",
    "method.calibration.num_windows=4",
    "method.calibration.window=32",
    "method.calibration.batch_size=2",
    "evaluation.metrics=[perplexity]",
    "evaluation.window=40",
    "evaluation.num_windows=2",
]
QUICK = ["method.save=false", "method.dense=false"]
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # every format divides its rows
KEYS = {"kind", "sense", "unit", "levels", "everywhere", "predicted", "source", "fingerprint", "dense_loss", "actual"}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return saved(tiny_model(**WIDE), tmp_path_factory.mktemp("wide"))


@pytest.fixture
def setup(setup_of, wide):
    return lambda *overrides: setup_of(*QUANTISE, f"model.path={wide}", *overrides)


def check(setup: Setup) -> None:
    setup.method.check(setup)


def allocation_in(record: RunRecord) -> Any:
    assert record.decision is not None
    return record.decision.allocation


def test_curves_are_measured_spent_written_and_read_again(setup, tmp_path):
    found = setup("allocator.target=5.2")
    assert found.method.preview(found)["quantise"].endswith(
        "parameters together to MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0"
    )
    record, folder = ran(found, tmp_path / "run"), tmp_path / "run"
    given, curves = allocation_in(record), record.decision.curves
    assert curves is not None
    assert (given.kind, len(given.units), len(record.formats)) == ("bits", 21, 21)
    by_bits = {each.bits: name for name, each in FORMATS.items() if each.is_gguf}
    assert record.formats == {unit: by_bits[bits] for unit, bits in zip(given.units, given.values, strict=True)}
    assert record.metrics["bits"] == pytest.approx(given.budget)
    assert 5.0 < record.metrics["bits"] <= 5.2
    table = pd.read_csv(folder / "formats.csv")
    assert dict(zip(table["matrix"], table["format"], strict=True)) == record.formats
    numel = table["parameters"].tolist()
    total = sum(bits * size for bits, size in zip(table["bits"].tolist(), numel, strict=True))
    assert total / sum(numel) == pytest.approx(record.metrics["bits"])
    assert record.parameters["quantised"] == sum(numel)

    assert curves.keys() == KEYS
    assert curves["levels"] == sorted(by_bits)
    assert 0 < curves["predicted"] < curves["everywhere"][0]
    again = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    ids = found.tokenizer(text("documentation", "test"))["input_ids"][: 2 * 40]
    assert perplexity(again, ids, window=40, batch_size=16) == pytest.approx(record.metrics["perplexity_40"], rel=1e-6)
    dense = found.model.load()
    windows = found.method.calibration.batches(found.tokenizer)
    rise = mean_token_loss(again, windows) - mean_token_loss(dense, windows)
    assert curves["actual"] == pytest.approx(rise, rel=1e-3, abs=1e-6)
    assert record.metrics["before/perplexity_40"] == pytest.approx(perplexity(dense, ids, window=40, batch_size=16))
    assert len((folder / "tensor_types.txt").read_text().splitlines()) == 21
    groups = json.loads((folder / "config_groups.json").read_text())["config_groups"]
    assert len(groups) == len({*record.formats.values()})
    assert {"evidence", "allocate", "quantise", "evaluate", "before/evaluate"} <= record.seconds.keys()
    assert record.notes == []

    quick = ran(setup("allocator.target=5.2", *QUICK), tmp_path / "quick")
    assert any("curves from the store" in note for note in quick.notes)
    assert quick.formats == record.formats
    assert quick.metrics == {name: value for name, value in record.metrics.items() if not name.startswith("before/")}
    assert sorted(file.name for file in (tmp_path / "quick").iterdir()) == ["formats.csv"]


def test_scores_give_every_matrix_of_a_block_the_same_format(setup, tmp_path):
    found = setup("estimator=grad_dot", "allocator.target=5.6", "allocator.spread=3", *QUICK)
    record = ran(found, tmp_path / "run")
    given = allocation_in(record)
    assert (given.kind, len(given.units), record.decision.curves) == ("bits", 3, None)
    assert len({*given.values}) > 1
    assert record.decision.scores.higher_means == "undertrained"
    for name, used in record.formats.items():
        assert FORMATS[used].bits == given.values[given.units.index(block_of(name))]
    assert record.metrics["bits"] <= 5.6


@pytest.mark.parametrize(("target", "name"), [(3.5, "INT3_ASYM"), (4.5, "Q4_0"), (5.5, "Q5_0"), (6.0, "Q5_1")])
def test_uniform_scores_give_one_format_throughout(setup, tmp_path, target, name):
    found = setup("estimator=uniform", f"allocator.target={target}", "method.formats=all", "method.dense=false")
    record = ran(found, tmp_path / "run")
    assert {*record.formats.values()} == {name}
    assert record.metrics["bits"] == target
    is_written = FORMATS[name].is_gguf
    assert (tmp_path / "run" / "model.gguf").exists() == is_written
    assert (tmp_path / "run" / "config_groups.json").exists()
    said = "no GGUF file was written: the package gguf does not write INT3_ASYM"
    assert (said in record.notes) != is_written


def test_embedding_and_head_are_quantised_when_asked(setup, tmp_path):
    record = ran(setup("allocator.target=4.5", "method.embeddings=Q8_0", "method.dense=false"), tmp_path / "run")
    assert record.formats["model.embed_tokens"] == record.formats["lm_head"] == "Q8_0"
    assert record.metrics["bits"] <= 4.5 < record.metrics["bits_with_embeddings"] < 8.5
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run", gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True)
    )
    dense = tiny_model(**WIDE).get_parameter("lm_head.weight")
    assert torch.equal(again.lm_head.weight, FORMATS["Q8_0"](dense))


def test_a_model_on_the_grid_of_a_format_says_so_and_uses_the_others(setup, tmp_path):
    model = tiny_model(**WIDE)
    with torch.no_grad():
        for param in layer_map(model, scope="all").matrices:
            model.get_parameter(param).copy_(FORMATS["Q4_1"](model.get_parameter(param)))
    on_grid = f"model.path={saved(model, tmp_path / 'on_grid')}"
    for chosen in ("estimator=uniform", "estimator=bits_curve"):
        record = ran(setup(on_grid, "allocator.target=5.0", chosen, *QUICK), tmp_path / chosen)
        assert "Q4_1" not in record.formats.values()
        assert len([note for note in record.notes if note.startswith("left out: Q4_1 (5) reproduces the weights")]) == 1
    few = ["allocator.target=5.0", "method.formats=[Q4_1,Q8_0]", *QUICK]
    for chosen in ("estimator=uniform", "estimator=bits_curve"):
        with pytest.raises(ValueError, match=r"target=5\.0 is outside the feasible range 8\.5 to 8\.5 bits"):
            ran(setup(on_grid, *few, chosen), tmp_path / "few")
    with pytest.raises(ValueError, match=r"the weights stand on the grid of Q4_1"):
        ran(setup(on_grid, "allocator.target=5.0", "estimator=uniform", "method.formats=[Q4_1]"), tmp_path / "none")


def test_an_allocation_of_a_run_is_spent_again_where_it_belongs_and_nowhere_else(setup, tmp_path, wide):
    first = ran(setup("allocator.target=5.2", *QUICK), tmp_path / "run")
    file = first.write(tmp_path / "run")
    again = ["allocator=file", "allocator.kind=bits", f"allocator.path={file}", *QUICK]
    second = ran(setup(*again), tmp_path / "again")
    assert second.formats == first.formats
    assert second.metrics == first.metrics
    assert second.decision.curves is None
    other = saved(tiny_model(seed=1, **WIDE), tmp_path / "other")
    with pytest.raises(ValueError, match="made by curves of another model; measure them again for this one"):
        check(setup(*again, f"model.path={other}"))
    with pytest.raises(ValueError, match=r"no format takes them; allowed: Q4_0 \(4\.5\)"):
        check(setup(*again, "method.formats=[Q4_0]"))
    named = f"method.formats=[{','.join(sorted({*first.formats.values()} - {'Q4_0'} | {'INT4_ASYM'}))}]"
    assert "Q4_0" in first.formats.values()
    with pytest.raises(ValueError, match=r"method\.formats would spend INT4_ASYM in place of one of them; give those"):
        check(setup(*again, named))
    matrices = tmp_path / "matrices.json"
    matrices.write_text(json.dumps(dict(zip(first.decision.allocation.units, [5.0, *[4.25] * 20], strict=True))))
    third = ran(setup(*again, f"allocator.path={matrices}"), tmp_path / "third")
    assert [*third.formats.values()] == ["Q4_1", *["MXFP4"] * 20]


def test_on_the_command_line_with_another_family(tiny_overrides, tmp_path):
    folder = saved(tiny_model("qwen3", **WIDE), tmp_path / "qwen3")
    overrides = [*tiny_overrides, *QUANTISE, "allocator.target=5.0", f"model.path={folder}", "logger=none"]
    dry = layerif_here([*overrides, "dry_run=true"], tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "bits, budget 5 over 21 matrices of 3 layers; equal curves would give" in dry.stdout
    record = run_layerif(overrides, tmp_path)
    assert record.metrics["bits"] <= 5.0
    assert record.choices["estimator"] == "bits_curve"
    assert any(note.startswith("no GGUF file was written: models of the kind qwen3") for note in record.notes)
    assert not (tmp_path / "run" / "model.gguf").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("", r"target=0\.5 is outside the feasible range 4\.25 to 8\.5 bits; change it, as allocator\.target=6, or"),
        ("allocator.target=9.0", r"allocator\.target=9\.0 is outside the feasible range 4\.25 to 8\.5 bits"),
        ("allocator.target=3.5", r"allocator\.target=3\.5 is outside the feasible range 4\.25 to 8\.5 bits"),
        ("estimator=uniform allocator.target=3.5", r"target=3\.5 is outside the feasible range 4\.25 to 8\.5 bits"),
        ("allocator.target=5.0 model.path={narrow}", r"MXFP4 has blocks of 32 weights, which do not divide the 48"),
        ("estimator=uniform model.path={narrow}", r"MXFP4 has blocks of 32 weights, which do not divide the 48"),
        ("allocator.target=5.0 method.formats=[Q4_2]", r"method\.formats='Q4_2' is not allowed; .*did you mean"),
        ("allocator.target=5.0 method.formats=[Q4_0,INT4_ASYM]", r"which both take 4\.5 bits; give one of them"),
        ("allocator.target=5.0 method.embeddings=Q9_0", r"method\.embeddings='Q9_0' is not allowed; .*did you mean"),
        (
            "allocator.target=5.0 estimator.formats=all",
            r"estimator\.formats has INT2, .* which method\.formats=gguf does",
        ),
        (
            "estimator=uniform allocator.formats=[INT3,Q8_0]",
            r"allocator\.formats has INT3, which method\.formats=gguf does not have; give method\.formats alone",
        ),
        ("allocator.target=5.0 model.adapter=/nowhere", r"the adapter '/nowhere' holds no adapter_config\.json"),
        ("allocator.target=5.0 method.calibration.text=/nowhere", r"the text '/nowhere' cannot be read"),
        ("allocator.target=5.0 method.calibration.text={text} evaluation.text={text}", r"are the same file"),
        ("allocator.target=5.0 trainer.devices=2", r"quantising works on one device, got 2; use trainer\.devices=1"),
        (
            "allocator=sparsity estimator=uniform allocator.smoothing=false",
            r"gives sparsity, and method=quantise spends bits; use allocator=bits",
        ),
        ("estimator=loss_curve", r"prices sparsity, and method=quantise spends bits; use .*, or estimator=bits_curve"),
        ("allocator=bits", r"bits_curve gives curves, and this allocator spends scores; .*use allocator=knapsack"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    setup, model_folder, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr("layerif.models.pretrained.LocalModel.load", lambda self: pytest.fail("it was loaded"))
    file = tmp_path / "text.txt"
    file.write_text("the cat runs over the red hill " * 400)

    def refused():
        check(setup(*overrides.format(text=file, narrow=model_folder).split()))

    with pytest.raises((ValueError, InstantiationException), match=message):
        refused()


def test_all_formats_without_gguf_need_groups_that_divide(setup_of, tmp_path):
    narrow = saved(tiny_model(hidden_size=32, intermediate_size=64, head_dim=8), tmp_path / "narrow")
    allowed = setup_of(*QUANTISE, f"model.path={narrow}", "allocator.target=5.0")
    check(allowed)
    with pytest.raises(
        ValueError, match=r"INT2 has blocks of 64 weights, which do not divide the 32 weights in a row of"
    ):
        check(setup_of(*QUANTISE, f"model.path={narrow}", "allocator.target=5.0", "method.formats=all"))
    assert len(formats_called("gguf")) == 6
