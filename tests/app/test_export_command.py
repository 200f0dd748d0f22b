"""`layerif-export` hands a finished run over, and other programs read the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from layerif.app.export import main
from layerif.record.record import RunRecord
from tests.command import run_layerif
from tests.tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(40)[None]
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # every format divides its rows
WINDOWS = [f"method.calibration.{setting}" for setting in ("num_windows=4", "window=32", "batch_size=2")]
CARD = "---\nlicense: mit\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(**WIDE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def run(tiny_overrides, base, tmp_path):
    """Runs a method on the base in the folder `run`."""
    return lambda *given: run_layerif([*tiny_overrides, f"model.path={base}", "logger=none", *given], tmp_path)


@pytest.fixture
def ranks(tmp_path) -> list[str]:
    (tmp_path / "ranks.json").write_text("[1, 5, 2]")
    return ["allocator=file", f"allocator.path={tmp_path / 'ranks.json'}"]


def handed(folder: Path, form: str) -> Path:
    main([str(folder / "run"), "--to", form, "--into", str(folder / form)])
    card = (folder / form / "README.md").read_text()
    assert "| licence of the base model | mit |" in card
    assert "## How to load it" in card
    return folder / form


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("layerif-export: ")
    assert said.count("\n") == 1
    return said


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def of_gguf(folder: Path) -> Any:
    settings: Any = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


def test_an_adapter_of_several_ranks_is_read_merged_by_peft_and_as_gguf(run, ranks, base, tmp_path):
    run("method=lora", *ranks, "allocator.kind=rank", "method.learning_rate=0.05")
    expected = logits(PeftModel.from_pretrained(plain(base), str(tmp_path / "run" / "adapter")))
    assert not torch.allclose(expected, logits(plain(base)), atol=1e-2)
    merged = handed(tmp_path, "merged")
    torch.testing.assert_close(logits(plain(merged)), expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(merged)("Which?").input_ids
    peft = handed(tmp_path, "peft")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(plain(base), str(peft))), expected, rtol=1e-4, atol=1e-4
    )
    assert "Every tensor has the rank r = 5" in (peft / "README.md").read_text()
    torch.testing.assert_close(logits(of_gguf(handed(tmp_path, "gguf"))), expected, rtol=1e-4, atol=1e-4)
    card = (merged / "README.md").read_text()
    assert "| budget of rank | 8 |" in card
    loss = RunRecord.read(tmp_path / "run").metrics
    assert f"| loss | {loss['loss']:.3f} | {loss['loss_low']:.3f} to {loss['loss_high']:.3f} |" in card


def test_a_model_with_fewer_blocks_is_copied_and_written_as_gguf(run, tmp_path):
    settings = ["allocator=position", "allocator.kind=blocks", "allocator.keep=2", "method.speed=null"]
    run("method=drop", *settings, "evaluation.metrics=[loss]", *WINDOWS)
    before = load_file(tmp_path / "run" / "model" / "model.safetensors")
    after = load_file(handed(tmp_path, "merged") / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    expected = logits(plain(tmp_path / "run" / "model"))
    torch.testing.assert_close(logits(of_gguf(handed(tmp_path, "gguf"))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [True, False])
def test_a_quantised_run_hands_over_what_it_wrote_or_did_not_write_itself(run, tmp_path, base, save):
    settings = [
        "estimator=ends",
        "estimator.number=1",
        "allocator.target=6.0",
        "evaluation.metrics=[loss]",
        f"method.save={save}",
    ]
    run("method=quantise", *settings, *WINDOWS, "method.embeddings=Q8_0")
    written = handed(tmp_path, "gguf") / "model.gguf"
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(written).tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    texts = {"gguf-types": "tensor_types.txt", "compressor": "config_groups.json"}
    found = {name: (handed(tmp_path, form) / name).read_text() for form, name in texts.items()}
    for line in found["tensor_types.txt"].splitlines():
        pattern, _, kind = line.partition("=")
        assert types[pattern.replace("\\", "")] == kind.upper()
    groups = json.loads(found["config_groups.json"])
    targets = [target for group in groups["config_groups"].values() for target in group["targets"]]
    matrices = RunRecord.read(tmp_path / "run").formats
    assert sorted(targets) == sorted(name for name in matrices if ".layers." in name)
    assert groups["quant_method"] == "compressed-tensors"
    assert not torch.equal(logits(of_gguf(written.parent)), logits(plain(base)))
    if not save:
        assert not (tmp_path / "run" / "model.gguf").exists()
        return
    torch.testing.assert_close(logits(of_gguf(written.parent)), logits(of_gguf(tmp_path / "run")), rtol=0, atol=0)
    assert {name: (tmp_path / "run" / name).read_text() for name in texts.values()} == found


def test_a_recovered_model_is_handed_over_and_not_the_pruned_one(run, tmp_path):
    run(
        "method=prune",
        "estimator=uniform",
        "allocator.smoothing=false",
        "method.recover=lora",
        "evaluation.metrics=[loss]",
        *WINDOWS,
    )
    found = load_file(handed(tmp_path, "merged") / "model.safetensors")
    recovered, pruned = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("recovered", "model"))
    assert all(torch.equal(found[name], weight) for name, weight in recovered.items())
    assert any(not torch.equal(found[name], weight) for name, weight in pruned.items())
    assert "| recovered by | lora |" in (tmp_path / "merged" / "README.md").read_text()


def test_routers_are_refused_in_every_form_and_experts_that_are_alone_are_not(run, ranks, base, tmp_path, capsys):
    run("method=lora_moe", *ranks, "allocator.kind=experts")
    for form in ("merged", "peft", "gguf"):
        said = refused(capsys, str(tmp_path / "run"), "--to", form)
        assert "none of vLLM, SGLang and llama.cpp serves that" in said
    (tmp_path / "ranks.json").write_text("[1, 1, 1]")
    run("method=lora_moe", *ranks, "allocator.kind=experts", "method.learning_rate=0.05")
    merged, peft = (handed(tmp_path, form) for form in ("merged", "peft"))
    expected = logits(PeftModel.from_pretrained(plain(base), str(tmp_path / "run" / "adapter")))
    torch.testing.assert_close(logits(plain(merged)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(plain(base), str(peft))), expected, rtol=1e-4, atol=1e-4
    )


# Refused


@pytest.fixture(scope="module")
def full(tmp_path_factory, model_folder, task_folder) -> Path:
    """A run of full fine-tuning on a model that a test may change."""
    folder = tmp_path_factory.mktemp("full")
    plain(model_folder).save_pretrained(folder / "mine")
    tiny_tokenizer().save_pretrained(folder / "mine")
    settings = ["model=local", f"model.path={folder / 'mine'}", "task=jsonl", f"task.path={task_folder}"]
    settings += [f"outputs={folder}", "trainer.max_steps=1", "trainer.accelerator=cpu", "logger=none"]
    run_layerif([*settings, "method=full", "allocator=position", "allocator.keep=1"], folder)
    return folder / "run"


def test_the_default_folder_is_below_the_run_and_is_written_once(full, capsys):
    main([str(full), "--to", "merged"])
    assert capsys.readouterr().out.endswith(f"{full / 'export' / 'merged'}\n")
    assert torch.equal(logits(plain(full / "export" / "merged")), logits(plain(full / "model")))
    assert "is there already; name a new folder with --into" in refused(capsys, str(full), "--to", "merged")


def test_a_folder_that_is_empty_may_be_there(full, tmp_path):
    (tmp_path / "new").mkdir()
    main([str(full), "--to", "merged", "--into", str(tmp_path / "new")])
    assert (tmp_path / "new" / "model.safetensors").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_a_mistyped_form_has_a_nearest_one(full, capsys):
    said = refused(capsys, str(full), "--to", "gguf-type")
    assert "allowed: merged, peft, gguf, gguf-types, compressor (did you mean 'gguf-types'?)" in said


def test_the_folder_above_the_run_is_refused_with_the_one_below(full, capsys):
    assert f"(did you mean {str(full)!r}?)" in refused(capsys, str(full.parent), "--to", "merged")


def test_a_form_that_does_not_fit_names_those_that_do_and_leaves_nothing(full, capsys, tmp_path):
    said = refused(capsys, str(full), "--to", "peft", "--into", str(tmp_path / "new" / "folder"))
    assert "of method=full, which left model/: it left no adapter; use --to merged or --to gguf" in said
    assert not (tmp_path / "new").exists()


def test_another_kind_of_model_is_not_written_as_gguf(full, capsys, tmp_path):
    config = json.loads((full / "model" / "config.json").read_text())
    changed = {**config, "attention_bias": True}
    (full / "model" / "config.json").write_text(json.dumps(changed))
    said = refused(capsys, str(full), "--to", "gguf", "--into", str(tmp_path / "gguf"))
    (full / "model" / "config.json").write_text(json.dumps(config))
    assert "which left model/: a model with attention_bias is not written as GGUF; use --to merged" in said


def test_a_configuration_that_is_not_one_is_refused(full, capsys, tmp_path):
    file = full / ".hydra" / "config.yaml"
    content = file.read_text()
    for wrong, says in (
        ("- a\n", "names no model with a _target_"),
        ("model: 3\n", "names no model with a _target_"),
        ("model: {_target_: x, path: '${nothing}'}\n", "cannot be resolved: Interpolation key 'nothing' not found"),
        ("model: {_target_: os.system}\n", r"os.system"),
        ("model: {_target_: layerif.models.pretrained.LocalModel, pth: a}\n", "(did you mean 'path'?)"),
        (None, "is missing, which says what model the run had"),
    ):
        file.unlink() if wrong is None else file.write_text(wrong)
        assert says in refused(capsys, str(full), "--to", "merged", "--into", str(tmp_path / "new"))
    file.write_text(content)


def test_a_base_model_that_has_changed_since_is_refused(run, ranks, base, tmp_path, capsys):
    run("method=lora", *ranks, "allocator.kind=rank")
    saved = (base / "model.safetensors").read_bytes()
    tiny_model(seed=1, **WIDE).save_pretrained(base)
    said = refused(capsys, str(tmp_path / "run"), "--to", "merged")
    (base / "model.safetensors").write_bytes(saved)
    assert "have changed since the run" in said
    assert not (tmp_path / "run" / "export").exists()


def test_the_help_and_a_wrong_folder_are_answered_before_anything_heavy_is_loaded(tmp_path):
    for arguments, code in (("'--help'", 0), ("'nowhere', '--to', 'merged'", 1)):
        program = f"import sys, layerif.app.export as i\ntry: i.main([{arguments}])\n"
        program += "finally: print('torch' in sys.modules, 'pandas' in sys.modules, file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == code
        assert "False False" in done.stderr
