"""Code that comes with a model runs when the user says so, is warned about and changes the fingerprint."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from layerif.models.blocks import layer_map
from layerif.models.pretrained import LocalModel

_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(model_folder, tmp_path, monkeypatch) -> Path:
    """The tiny Llama as a model whose classes lie beside its weights."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = Path(shutil.copytree(model_folder, tmp_path / "own_model"))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(_CODE)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23).view(2, 10)).logits


def test_without_the_flag_it_is_refused_with_the_way_out(own):
    for work in (LocalModel(path=str(own)).check, LocalModel(path=str(own)).layers, LocalModel(path=str(own)).load):
        with pytest.raises(ValueError, match=r"contains custom code.*\(model\.trust_remote_code=true\)"):
            work()


def test_with_the_flag_it_runs_as_the_model_it_is_and_says_so(own, model_folder):
    model = LocalModel(path=str(own), trust_remote_code=True)
    with pytest.warns(RuntimeWarning, match="runs the Python files that come with .* all rights"):
        model.check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, plain = model.load(), LocalModel(path=str(model_folder)).load()
        assert type(loaded).__name__ == "OwnForCausalLM"
        assert layer_map(loaded, scope="all") == layer_map(plain, scope="all") == model.layers()
        assert torch.equal(logits(loaded), logits(plain))
        before = model.fingerprint()
        assert "code" in before
        (own / "own_code.py").write_text(_CODE + "\n# another line\n")
        assert model.fingerprint() != before
    assert "code" not in LocalModel(path=str(model_folder)).fingerprint()
