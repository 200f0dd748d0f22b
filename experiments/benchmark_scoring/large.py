"""Measures the seconds and the peak memory of one probe of Mistral-7B's shape, with 300 + 50 samples of 128 tokens.

The weights are random. It needs a CUDA device with 80 GB. Anywhere else the same code runs on a small model of the same
family, and says so.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from layerif.models.blocks import layer_map
from layerif.probe.grams.gather import IndexedBatch
from layerif.probe.grams.measure import measure

SMALL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}


def main() -> None:
    small = not torch.cuda.is_available()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    num_train, num_validation, batch_size = (24, 8, 8) if small else (300, 50, 16)

    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(dtype)
        model = MistralForCausalLM(MistralConfig(**(SMALL if small else {}))).eval()
        torch.set_default_dtype(torch.float32)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}, torch {torch.__version__}, {size / 1e9:.2f} billion parameters in {dtype}")
    if small:
        print("there is no CUDA device, so this is a small model of the family and not Mistral-7B's shape")
    train, validation = (
        random_batches(count, batch_size, model.config.vocab_size, seed)
        for seed, count in enumerate((num_train, num_validation))
    )
    print("| scope | matrices | seconds | peak GB |\n|---|---|---|---|")
    for scope in ("attention", "all"):
        layers = layer_map(model, scope=scope)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        grams = measure(model, layers, train, validation)
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 1e9
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"| {scope} | {len(grams.grams)} | {time.perf_counter() - start:.1f} | {peak:.1f} |", flush=True)


def random_batches(count: int, size: int, vocabulary: int, seed: int) -> list[IndexedBatch]:
    ids = torch.randint(0, vocabulary, (count, 128), generator=torch.Generator().manual_seed(seed))
    return [
        (
            list(range(start, min(start + size, count))),
            {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part.clone()},
        )
        for start, part in zip(range(0, count, size), ids.split(size), strict=True)
    ]


if __name__ == "__main__":
    main()
