"""Measures what exact swaps of Wanda's mask bring and cost, by their number a row, in `make bench`.

    OMP_WAIT_POLICY=passive python experiments/benchmark_pruning/swaps.py

It takes four matrices of SmolLM2-135M at 60 %. The mask sees 16 calibration windows of 256 tokens of the documentation;
the squared error of the matrix's output is measured on them, and on 16 windows of the documentation's other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.timing import machine, timed
from layerif.data.text import text
from layerif.data.windows import cut_windows, running_ids
from layerif.models.embedded import EmbeddedModel
from layerif.models.hooks import hooked
from layerif.pruning.calibration import Calibration
from layerif.pruning.swaps import swapped
from layerif.pruning.wanda import Wanda, wanda_mask

MATRICES = (
    "model.layers.5.self_attn.q_proj",
    "model.layers.5.mlp.down_proj",
    "model.layers.20.self_attn.o_proj",
    "model.layers.20.mlp.gate_proj",
)
SPARSITY = 0.6
NUMBERS = (10, 25, 50, 100)


def main() -> None:
    print(machine())
    source = EmbeddedModel(cache="outputs/store/models")
    model: Any = source.load()
    tokenizer = source.tokenizer()
    ids, bos = running_ids(tokenizer, text("documentation", "test"), "tokenizer")
    seen = grams(model, Calibration().batches(tokenizer))
    other = grams(model, list(torch.tensor(cut_windows(ids, 256, bos)[:16]).split(4)))
    print(f"\nsquared error left of Wanda's at {SPARSITY:.0%}: on the calibration windows, on other pages; seconds")
    print(f"{'matrix':<36}{'shape':>12}" + "".join(f"{f'{number} swaps':>24}" for number in NUMBERS))
    for name in MATRICES:
        weight = model.get_submodule(name).weight.detach()
        mask = wanda_mask(weight, seen[name].diagonal(), SPARSITY)
        cells = []
        for number in NUMBERS:
            found, seconds = timed(partial(swapped, weight, mask, seen[name], most=number))
            left = [error(weight, found, gram) / error(weight, mask, gram) for gram in (seen[name], other[name])]
            cells.append(f"{left[0]:.2f}, {left[1]:.2f}; {seconds:.2f} s")
        shape = "×".join(map(str, weight.shape))
        print(f"{name:<36}{shape:>12}" + "".join(f"{cell:>24}" for cell in cells))


def grams(model: nn.Module, windows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns the Gram matrix of the inputs of each matrix."""
    pruner, found = Wanda(swaps=True), {}

    def observing(name: str):
        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = pruner.observe(found.get(name), inputs[0].flatten(0, -2))

        return observe

    hooks = [(model.get_submodule(name), observing(name)) for name in MATRICES]
    with hooked(hooks, before=True), torch.no_grad():
        for ids_BT in windows:
            model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
    return found


def error(weight: Tensor, mask: Tensor, gram: Tensor) -> float:
    """Computes Σ ‖X Δ_row‖² of the removed weights Δ, in float64."""
    removed = (weight * mask).double()
    return float(((removed @ gram.double()) * removed).sum())


if __name__ == "__main__":
    main()
