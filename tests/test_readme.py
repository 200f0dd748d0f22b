"""The README's code runs, and its commands and those of `--help` compose."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from layerif.app.messages import first_of
from layerif.app.schema import check, register
from layerif.evidence import LayerGrams, MatrixGram
from layerif.files import conf_folder
from layerif.layers import LayerMap
from layerif.scores import LayerScores

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0] for kind, text in BLOCKS if not kind for line in text.splitlines() if line.startswith("layerif ")
]


HELP = yaml.safe_load((conf_folder() / "config.yaml").read_text())["hydra"]["help"]["template"]
COMMANDS += [
    re.split(r"\s{2,}", line.strip())[0]
    for line in HELP.splitlines()
    if line.startswith("  layerif") and "…" not in line
]


def block(kind: str, containing: str) -> str:
    (found,) = [text for language, text in BLOCKS if language == kind and containing in text]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command):
    arguments = [word for word in shlex.split(command)[1:] if "=" in word and not word.startswith("-")]
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        assert compose("config", [first_of(argument) for argument in arguments])


def test_the_python_example_runs(model_folder, tmp_path, monkeypatch):
    """As printed, but on a tiny model."""
    code = block("python", "get_peft_model").replace('"model=smollm2"', f'"model=local", "model.path={model_folder}"')
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    decision = names["decision"]
    assert sum(decision.allocation.values) == 150
    assert names["adapted"].peft_config["default"].num_experts == decision.allocation.by_name()


def test_the_estimator_example_is_a_working_estimator():
    module = types.ModuleType("layerif.estimators.squared")
    sys.modules[module.__name__] = module
    exec(block("python", "class Squared"), module.__dict__)
    fields = yaml.safe_load(block("yaml", "squared"))
    assert fields.pop("_target_") == "layerif.estimators.squared.Squared"
    gradients = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    gram = MatrixGram(gradients @ gradients.T, gradients @ gradients.T, gradients.norm(dim=1), 2)
    grams = LayerGrams(LayerMap(("block.0",), (("block.0.q.weight",),), (2,)), {"block.0.q.weight": gram}, "none")
    scores = module.Squared(**fields).score(grams)
    assert scores.values == (25.0 + 4 + 4 + 1,)
    assert scores.source.startswith("squared(")
    single = MatrixGram(gram.train_train.float(), gram.val_train.float(), gram.val_norms.float(), 2)
    assert module.Squared(**fields).influence(single).dtype == torch.float64


def test_the_allocator_example_is_a_working_allocator():
    module = types.ModuleType("layerif.top")
    sys.modules[module.__name__] = module
    exec(block("python", "class Top"), module.__dict__)
    fields = yaml.safe_load(block("yaml", "top.Top"))
    assert fields.pop("_target_") == "layerif.top.Top"
    layers = LayerMap(("a", "b", "c"), (("a.q",), ("b.q",), ("c.q",)), (4, 4, 4))
    scores = LayerScores(layers.names, (0.1, 3.0, 2.0), "undertrained", "test", "")
    assert module.Top(**fields | {"number": 2})(scores, layers).values == (1, 5, 5)


def test_the_task_and_model_examples_are_choices(tmp_path):
    for group in ("task", "model"):
        text = block("yaml", f"# conf/{group}/")
        file = tmp_path / re.findall(r"# conf/(\S+\.yaml)", text)[0]
        file.parent.mkdir()
        file.write_text(text)
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        overrides = [f"hydra.searchpath=[file://{tmp_path}]", "task=quiz", "model=smollm2_360m"]
        config = compose("config", overrides)
    for group in ("task", "model"):
        check(OmegaConf.create({group: config[group], "seed": config.seed}))
    assert config.task.columns.answer == "key"
    assert config.task.pattern  # of jsonl
    assert config.model.attention == "sdpa"


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
