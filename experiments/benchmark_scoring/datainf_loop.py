"""DataInf from Grams against a loop over samples.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python experiments/benchmark_scoring/datainf_loop.py

It takes per-sample gradients as given (random, with a common direction): 12 blocks × 7 linears × A and B of
a rank-8 LoRA on a 768-wide Llama, n = 64, m = 32, float32. Ours forms K and C of every matrix and solves them in
float64; the second figure is the solve alone, which is what a further damping or estimator costs. The loop is the
definition: dictionaries of gradients, and for every validation row and matrix λ and the average over the samples of
the product with their inverse, with elementwise products and sums of gradients in their matrix's shape. The dot loop
is the best such a loop can do: λ once per matrix, dot products of flat gradients. All take turns in one process;
figures are medians.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.timing import timed
from layerif.estimators.datainf import datainf

NUM_TRAIN, NUM_VALIDATION, DAMPING = 64, 32, 0.1
BLOCKS, WIDTH, HIDDEN, RANK = 12, 768, 3072, 8
LINEARS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (WIDTH, WIDTH)),  # (inputs, outputs)
    **dict.fromkeys(("gate_proj", "up_proj"), (WIDTH, HIDDEN)),
    "down_proj": (HIDDEN, WIDTH),
}

Gradients = dict[str, Tensor]  # of every matrix: one row a sample


def measure(*, blocks: int = BLOCKS, rounds: int = 3) -> dict[str, Any]:
    """Median seconds, ratios to ours, and the largest difference of an influence relative to its matrix's largest.

    blocks: fewer measure the same in less time; all grow in proportion.
    """
    train, validation = _gradients(NUM_TRAIN, blocks, seed=0), _gradients(NUM_VALIDATION, blocks, seed=1)
    grams = gram_matrices(train, validation)
    contestants: dict[str, Callable[[], dict[str, Tensor]]] = {
        "grams": lambda: solved(gram_matrices(train, validation)),
        "solve": lambda: solved(grams),
        "loop": partial(from_loop, _by_sample(train, _shape), _by_sample(validation, _shape)),
        "dot loop": partial(from_dot_loop, _by_sample(train), _by_sample(validation)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    influences: dict[str, dict[str, Tensor]] = {"grams": contestants["grams"]()}  # and warm
    for _ in range(rounds):
        for name, work in contestants.items():
            influences[name], spent = timed(work)
            seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "threads": torch.get_num_threads(),
        "matrices": len(train),
        "seconds": medians,
        "ratio": {loop: medians[loop] / medians["grams"] for loop in ("loop", "dot loop")},
        "ratio to solve": {loop: medians[loop] / medians["solve"] for loop in ("loop", "dot loop")},
        "difference": {loop: difference(influences["grams"], influences[loop]) for loop in ("loop", "dot loop")},
    }


def gram_matrices(train: Gradients, validation: Gradients) -> dict[str, tuple[Tensor, Tensor, int]]:
    """K, C and the number of parameters of every matrix."""
    return {name: (rows @ rows.T, validation[name] @ rows.T, rows.shape[1]) for name, rows in train.items()}


def solved(grams: dict[str, tuple[Tensor, Tensor, int]]) -> dict[str, Tensor]:
    return {
        name: datainf(gram_NN, gram_MN, numel=numel, damping=DAMPING)
        for name, (gram_NN, gram_MN, numel) in grams.items()
    }


def from_loop(train: list[dict[str, Tensor]], validation: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """I_ji = −v_jᵀ·(1/N)Σ_l (g_l g_lᵀ + λ)⁻¹·g_i, sample by sample, every validation row on its own."""
    influences = {name: torch.zeros(len(validation), len(train)) for name in train[0]}
    for j, val_sample in enumerate(validation):
        for name, v in val_sample.items():
            lam = DAMPING * sum((sample[name] ** 2).mean() for sample in train) / len(train)
            product = torch.zeros_like(v)
            for sample in train:
                g = sample[name]
                product += (v - (v * g).sum() / (lam + (g**2).sum()) * g) / (len(train) * lam)
            for i, sample in enumerate(train):
                influences[name][j, i] = -(product * sample[name]).sum()
    return influences


def from_dot_loop(train: list[dict[str, Tensor]], validation: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The same, with what does not depend on the validation row taken out, and dot products."""
    lams = {name: DAMPING * sum(float(s[name].square().mean()) for s in train) / len(train) for name in train[0]}
    damped = [{name: lams[name] + float(g @ g) for name, g in sample.items()} for sample in train]
    influences = {name: torch.zeros(len(validation), len(train)) for name in train[0]}
    for j, val_sample in enumerate(validation):
        for name, v in val_sample.items():
            product = torch.zeros_like(v)
            for sample, damped_norm in zip(train, damped, strict=True):
                product += v - (v @ sample[name]) / damped_norm[name] * sample[name]
            for i, sample in enumerate(train):
                influences[name][j, i] = -(product @ sample[name]) / (len(train) * lams[name])
    return influences


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - other).abs().max() / other.abs().max()) for name, other in theirs.items())


def _gradients(count: int, blocks: int, *, seed: int) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for block, (linear, (inputs, outputs)) in itertools.product(range(blocks), LINEARS.items()):
        for factor, numel in (("A", RANK * inputs), ("B", outputs * RANK)):
            rows = torch.randn(count, numel, generator=generator)
            gradients[f"{block}.{linear}.{factor}"] = (rows + 0.2) * 1e-3
    return gradients


def _by_sample(gradients: Gradients, shape: Callable[[str], tuple[int, int]] | None = None) -> list[dict[str, Tensor]]:
    """The same memory, sample by sample; flat without a shape."""
    count = len(next(iter(gradients.values())))
    return [
        {name: rows[i].view(shape(name)) if shape else rows[i] for name, rows in gradients.items()}
        for i in range(count)
    ]


def _shape(name: str) -> tuple[int, int]:
    _, linear, factor = name.split(".")
    inputs, outputs = LINEARS[linear]
    return (RANK, inputs) if factor == "A" else (outputs, RANK)


def main() -> None:
    row = measure()
    print(f"DataInf, {row['matrices']} LoRA matrices, n = {NUM_TRAIN}, m = {NUM_VALIDATION}, {row['threads']} threads")
    print("               seconds   over Grams   over solve   largest relative difference")
    print(f"Grams + solve{row['seconds']['grams']:9.3f}\nsolve        {row['seconds']['solve']:9.3f}")
    for loop in ("loop", "dot loop"):
        print(
            f"{loop:<12}{row['seconds'][loop]:10.2f}{row['ratio'][loop]:13.0f}{row['ratio to solve'][loop]:13.0f}"
            f"{row['difference'][loop]:30.1e}"
        )


if __name__ == "__main__":
    main()
