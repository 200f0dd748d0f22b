"""Fixtures that many tests share: a tiny model with its tokenizer and a tiny task, as folders on disk."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; `make test-gpu` where there is one"))


def pytest_terminal_summary(terminalreporter):
    """Says how many kills, bad inputs and the like were survived: what tests gave to `record_property` as numbers."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        counts.update({name: value for name, value in report.user_properties if isinstance(value, int)})
    if counts:
        terminalreporter.write_line(", ".join(f"{number} {what}" for what, number in counts.items()) + ": survived")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A random Llama of three blocks and its tokenizer, as `save_pretrained` writes them."""
    from tests.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", attn_implementation="sdpa").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """Four-way questions with the columns of `task=jsonl`."""
    folder = tmp_path_factory.mktemp("task")
    chosen = random.Random(0)
    for split, count in (("train", 20), ("validation", 8), ("test", 10)):
        rows = []
        for number in range(count):
            options = [f"{chosen.choice('abcdefgh')}{chosen.randrange(99)}{letter}" for letter in "wxyz"]
            answer = chosen.randrange(4)
            rows.append({"question": f"Which of {split} {number}?", "options": options, "answer": answer})
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


@pytest.fixture
def decider(model_folder, task_folder, tmp_path):
    """A decider for the tiny model, with a store of its own."""
    from layerif.allocate.experts import Experts
    from layerif.decide import Decider
    from layerif.estimators.grad_dot import GradDot
    from layerif.models.pretrained import LocalModel
    from layerif.probe.settings import Probe
    from layerif.probe.store import Store
    from tests.tiny import shipped_task

    model = LocalModel(path=str(model_folder))
    return Decider(
        model=model,
        tokenizer=model.tokenizer(),
        splits=shipped_task("jsonl", f"task.path={task_folder}").load(),
        probe=Probe(num_train=8, num_validation=4),
        estimator=GradDot(),
        allocator=Experts(budget=9),
        store=Store(tmp_path / "store"),
    )


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the files of plots empty, because drawing them takes most of the time of a run's end or of a report."""
    from matplotlib.figure import Figure

    def touch(figure, file, **options):
        if isinstance(file, str | Path):
            Path(file).touch()

    monkeypatch.setattr(Figure, "savefig", touch)


@pytest.fixture
def softmax_in_the_models_dtype(monkeypatch):
    """Lets eager attention take its softmax in the model's dtype, because a float64 reference needs float64."""
    import torch

    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))


@pytest.fixture
def tiny_overrides(model_folder, task_folder, tmp_path) -> list[str]:
    """Command-line overrides that make any run take about a second, with its outputs below `tmp_path`."""
    return [
        "model=local",
        f"model.path={model_folder}",
        "task=jsonl",
        f"task.path={task_folder}",
        f"outputs={tmp_path}",
        "trainer.max_steps=2",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "data.batch_size=4",
    ]


@pytest.fixture
def all_in_the_models_dtype(monkeypatch):
    """Lets routers and the states of a Mamba compute in the model's dtype, for float64 references."""
    import torch

    def unless_double(method):
        def stay(each, *args, **options):
            is_kept = each.dtype == torch.float64 and args in ((), (torch.float32,)) and not options
            return each if is_kept else method(each, *args, **options)

        return stay

    for name in ("float", "to", "type"):
        monkeypatch.setattr(torch.Tensor, name, unless_double(getattr(torch.Tensor, name)))
