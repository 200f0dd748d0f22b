"""Times DataInf from Grams against loops over samples.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python experiments/benchmark_scoring/datainf_loop.py

All contestants get the same per-sample gradients (random, with a common direction): those of 12 blocks × 7 linears × A
and B of a rank-8 LoRA on a 768-wide Llama, with n = 64, m = 32 and float32. The gradients of all matrices of one size
lie in one tensor, matrix by matrix and sample by sample. So ours forms K and C of these matrices at once, and solves
them at once in float64. The second figure is the solve alone, which is the cost of another damping. The loops read the
same memory as a dictionary of gradients for each sample.

The pair loop is the definition to the letter. For every pair of a validation row v and a train row i it averages over
the train samples l:

    I = −(1/N)·Σ_l (v·g_i − (v·g_l)·(g_l·g_i)/(λ + ‖g_l‖²))/λ.

All pairs take minutes, so a few are timed and the time is multiplied.

The loop is written as such code usually is. For every validation row and every matrix it computes λ, and then averages
the product of v with the inverse over l, by Sherman and Morrison:

    v·(g_l g_lᵀ + λ)⁻¹ = (v − (v·g_l)/(λ + ‖g_l‖²)·g_l)/λ.

Then it multiplies the average with every train sample. All of these are elementwise products and sums of gradients in
the shape of their matrix.

The dot loop takes λ and ‖g_l‖² out of the loop over validation rows, and uses dot products of flat gradients. All
contestants take turns in one process, and the figures are medians.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.timing import check_plausible, reading, timed
from layerif.estimators.datainf import datainf

NUM_TRAIN, NUM_VALIDATION, DAMPING = 64, 32, 0.1
NUM_SCORED = 2  # the pair loop is timed on one validation row with this many train rows
LOOPS = ("pair loop", "loop", "dot loop")
BLOCKS, WIDTH, HIDDEN, RANK = 12, 768, 3072, 8
LINEARS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (WIDTH, WIDTH)),  # (inputs, outputs)
    **dict.fromkeys(("gate_proj", "up_proj"), (WIDTH, HIDDEN)),
    "down_proj": (HIDDEN, WIDTH),
}

Sample = dict[str, Tensor]  # matrix -> gradient


@dataclass(frozen=True)
class Stack:
    """The gradients of all matrices of one size, B×S×P, with the train samples before the validation samples."""

    names: tuple[str, ...]
    rows_BSP: Tensor


def measure(*, blocks: int = BLOCKS, rounds: int = 3) -> dict[str, Any]:
    """Measures median seconds, ratios to ours, and differences of the influences.

    A difference is the largest of a matrix, relative to the matrix's largest influence.

    Args:
        blocks: the number of blocks. All times grow in proportion, so that fewer blocks show the same in less time.
        rounds: the number of turns of each contestant.
    """
    stacks = _gradients(blocks)
    grams = gram_matrices(stacks)
    train, validation = _by_sample(stacks)
    contestants: dict[str, Callable[[], dict[str, Tensor]]] = {
        "grams": lambda: solved(stacks, gram_matrices(stacks)),
        "solve": lambda: solved(stacks, [gram_BSN.clone() for gram_BSN in grams]),
        "pair loop": partial(from_pair_loop, train, validation[:1], train[:NUM_SCORED]),
        "loop": partial(from_loop, *_by_sample(stacks, _shape)),
        "dot loop": partial(from_dot_loop, train, validation),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    influences: dict[str, dict[str, Tensor]] = {"grams": contestants["grams"]()}  # this call also warms up
    for _ in range(rounds):
        for name, work in contestants.items():
            influences[name], spent = timed(work)
            seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    check_plausible("solve", medians["solve"], reading(grams))
    check_plausible("Grams and solve", medians["grams"], medians["solve"])
    medians["pair loop"] *= NUM_TRAIN * NUM_VALIDATION / NUM_SCORED
    return {
        "threads": torch.get_num_threads(),
        "matrices": sum(len(stack.names) for stack in stacks),
        "seconds": medians,
        "ratio": {loop: medians[loop] / medians["grams"] for loop in LOOPS},
        "ratio to solve": {loop: medians[loop] / medians["solve"] for loop in LOOPS},
        "difference": {loop: difference(influences["grams"], influences[loop]) for loop in LOOPS},
    }


def gram_matrices(stacks: Sequence[Stack]) -> list[Tensor]:
    """Returns K over C of every matrix, as one batch (B×S×N) for each stack."""
    return [torch.bmm(stack.rows_BSP, stack.rows_BSP[:, :NUM_TRAIN].mT) for stack in stacks]


def solved(stacks: Sequence[Stack], grams: Sequence[Tensor]) -> dict[str, Tensor]:
    influences: dict[str, Tensor] = {}
    for stack, gram_BSN in zip(stacks, grams, strict=True):
        train_train, val_train = gram_BSN.split((NUM_TRAIN, NUM_VALIDATION), dim=1)
        numel = stack.rows_BSP.shape[-1]
        found_BMN = datainf(train_train, val_train, numel=numel, damping=DAMPING)
        influences |= zip(stack.names, found_BMN, strict=True)
    return influences


def from_pair_loop(train: list[Sample], validation: list[Sample], scored: list[Sample]) -> dict[str, Tensor]:
    """Computes I_ji = −(1/N)Σ_l v_jᵀ·(g_l g_lᵀ + λ)⁻¹·g_i for each pair of a validation row and a scored train row."""
    influences = {name: torch.zeros(len(validation), len(scored)) for name in train[0]}
    for j, val_sample in enumerate(validation):
        for name, v in val_sample.items():
            lam = DAMPING * sum(sample[name].square().mean() for sample in train) / len(train)
            for i, scored_sample in enumerate(scored):
                total = torch.zeros(())
                for sample in train:
                    g = sample[name]
                    total += v @ scored_sample[name] - (v @ g) * (g @ scored_sample[name]) / (lam + g @ g)
                influences[name][j, i] = -total / (len(train) * lam)
    return influences


def from_loop(train: list[Sample], validation: list[Sample]) -> dict[str, Tensor]:
    """Computes I_ji = −v_jᵀ·(1/N)Σ_l (g_l g_lᵀ + λ)⁻¹·g_i sample by sample, for each validation row by itself."""
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


def from_dot_loop(train: list[Sample], validation: list[Sample]) -> dict[str, Tensor]:
    """Computes the same by dot products, and takes λ and norms out of the loop over validation rows."""
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
    """Returns the largest relative difference over the pairs that `theirs` has."""
    both = ((ours[name][: other.shape[0], : other.shape[1]], other) for name, other in theirs.items())
    return max(float((mine - other).abs().max() / other.abs().max()) for mine, other in both)


def _gradients(blocks: int) -> list[Stack]:
    generator = torch.Generator().manual_seed(0)
    names: dict[int, list[str]] = {}
    for block, linear, factor in itertools.product(range(blocks), LINEARS, "AB"):
        name = f"{block}.{linear}.{factor}"
        names.setdefault(math.prod(_shape(name)), []).append(name)
    shapes = {numel: (len(found), NUM_TRAIN + NUM_VALIDATION, numel) for numel, found in names.items()}
    return [
        Stack(tuple(found), torch.randn(shapes[numel], generator=generator).add_(0.2).mul_(1e-3))
        for numel, found in names.items()
    ]


def _by_sample(
    stacks: Sequence[Stack], shape: Callable[[str], tuple[int, ...]] = lambda name: (-1,)
) -> tuple[list[Sample], list[Sample]]:
    """Returns the train and the validation samples as views of the same memory, flat unless a shape is given."""
    rows = {name: rows_SP for stack in stacks for name, rows_SP in zip(stack.names, stack.rows_BSP, strict=True)}
    samples = [
        {name: rows_SP[i].view(shape(name)) for name, rows_SP in rows.items()}
        for i in range(NUM_TRAIN + NUM_VALIDATION)
    ]
    return samples[:NUM_TRAIN], samples[NUM_TRAIN:]


def _shape(name: str) -> tuple[int, int]:
    _, linear, factor = name.split(".")
    inputs, outputs = LINEARS[linear]
    return (RANK, inputs) if factor == "A" else (outputs, RANK)


def main() -> None:
    row = measure()
    print(f"DataInf, {row['matrices']} LoRA matrices, n = {NUM_TRAIN}, m = {NUM_VALIDATION}, {row['threads']} threads")
    print("               seconds   over Grams   over solve   largest relative difference")
    print(f"Grams + solve{row['seconds']['grams']:9.3f}\nsolve        {row['seconds']['solve']:9.3f}")
    for loop in LOOPS:
        print(
            f"{loop:<12}{row['seconds'][loop]:10.2f}{row['ratio'][loop]:13.0f}{row['ratio to solve'][loop]:13.0f}"
            f"{row['difference'][loop]:30.1e}"
        )


if __name__ == "__main__":
    main()
