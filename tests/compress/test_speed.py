"""The bytes of a measurement are counted, and its seconds are the median of runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerif.compress import speed
from layerif.compress.speed import Speed, folder_bytes, weight_bytes
from tests.tiny import tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_save_pretrained_writes_them(tied, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < written - weight_bytes(model) < 10_000  # the header
    assert folder_bytes(tmp_path) == written + (tmp_path / "config.json").stat().st_size


def test_memory_on_a_cpu_is_that_of_the_tensors(monkeypatch):
    model = tiny_model("llama")
    found = Speed(prompt_tokens=10, new_tokens=4, batch_size=2, repeats=1)(model)
    cache = 2 * 3 * 2 * 12 * 2 * (10 + 4) * 4  # keys and values, blocks, heads, numbers, prompts, tokens, bytes
    buffers = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    assert found["memory_bytes"] == weight_bytes(model) + buffers + cache


def test_the_median_of_the_runs_counts_and_the_first_run_warms_up(monkeypatch):
    # the clock at the start, after the prompt and at the end of each run: prompts take 9, 1, 5 and 2 seconds
    ticks = iter([0, 9, 10, 20, 21, 22, 30, 35, 39, 40, 42, 50])
    monkeypatch.setattr(speed, "_now", lambda device: float(next(ticks)))
    found = Speed(prompt_tokens=10, new_tokens=4, batch_size=2, repeats=3)(tiny_model("llama"))
    assert found["prefill_tokens_per_second"] == 20 / 2
    assert found["decode_tokens_per_second"] == 8 / 4


def test_a_model_in_training_mode_stays_in_it():
    model = tiny_model("llama").train()
    Speed(prompt_tokens=4, new_tokens=1, repeats=1)(model)
    assert model.training


@pytest.mark.gpu
def test_memory_on_a_gpu_is_what_torch_allocated():
    model: Any = tiny_model("llama")
    model.cuda()
    assert Speed(prompt_tokens=8, new_tokens=2, repeats=1)(model)["memory_bytes"] >= weight_bytes(model)
    assert torch.cuda.max_memory_allocated() > 0
