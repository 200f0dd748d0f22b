"""DataInf from Grams against a loop over samples, and two hundred settings against the one pass they share.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python experiments/benchmark_scoring/datainf_loop.py

The first part takes per-sample gradients as given (random, with a common direction): 12 blocks × 7 linears × A and B of
a rank-8 LoRA on a 768-wide Llama, n = 64, m = 32, float32. Ours forms K and C of every matrix and solves them in
float64. The loop is the definition: dictionaries of gradients, λ per matrix, and for every validation row the product
with each sample's inverse, averaged. It is run twice: on gradients of the matrices' shape with elementwise products
and sums, as such loops are written, and on flat ones with dot products, the best a loop can do. All take turns in one
process; figures are medians.

The second part measures SmolLM2-135M once (attention weights, 64 + 32 samples of 64 random tokens) and then computes
estimator × damping × aggregation × smoothing × budget from the Grams. "One" is that gradient pass and one setting.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerif.allocate import Experts
from layerif.estimators.datainf import DataInf, datainf
from layerif.estimators.exact import Exact
from layerif.estimators.grad_dot import GradDot
from layerif.estimators.gram import GramEstimator
from layerif.estimators.lissa import Lissa
from layerif.layers import LayerGrams, LayerMap
from layerif.models import Embedded, layer_map
from layerif.probe import IndexedBatch
from layerif.probe import measure as probe

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
    contestants: dict[str, Callable[[], dict[str, Tensor]]] = {
        "grams": lambda: from_grams(train, validation),
        "loop": partial(from_loop, _by_sample(train, _shape), _by_sample(validation, _shape), elementwise),
        "dot loop": partial(from_loop, _by_sample(train), _by_sample(validation), torch.dot),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    influences: dict[str, dict[str, Tensor]] = {"grams": contestants["grams"]()}  # and warm
    for _ in range(rounds):
        for name, work in contestants.items():
            influences[name], spent = _timed(work)
            seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "threads": torch.get_num_threads(),
        "matrices": len(train),
        "seconds": medians,
        "ratio": {loop: medians[loop] / medians["grams"] for loop in ("loop", "dot loop")},
        "difference": {loop: difference(influences["grams"], influences[loop]) for loop in ("loop", "dot loop")},
    }


def from_grams(train: Gradients, validation: Gradients) -> dict[str, Tensor]:
    return {
        name: datainf(rows @ rows.T, validation[name] @ rows.T, numel=rows.shape[1], damping=DAMPING)
        for name, rows in train.items()
    }


def from_loop(
    train: list[dict[str, Tensor]], validation: list[dict[str, Tensor]], product: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """I_ji = −v_jᵀ·(1/N)Σ_l (g_l g_lᵀ + λ)⁻¹·g_i, sample by sample. product: of two gradients."""
    names, num_train = train[0].keys(), len(train)
    lams = {name: DAMPING * sum(float(sample[name].square().mean()) for sample in train) / num_train for name in names}
    influences = {name: torch.zeros(len(validation), num_train) for name in names}
    for j, val_sample in enumerate(validation):
        for name, v in val_sample.items():
            solved = torch.zeros_like(v)
            for sample in train:
                g = sample[name]
                solved += (v - product(v, g) / (lams[name] + product(g, g)) * g) / (num_train * lams[name])
            for i, sample in enumerate(train):
                influences[name][j, i] = -product(solved, sample[name])
    return influences


def elementwise(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum()


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - other).abs().max() / other.abs().max()) for name, other in theirs.items())


def measure_settings() -> dict[str, Any]:
    """Seconds of the pass, of one setting and of all, sharing scores or each on its own; ratios to pass + one."""
    grams, one_pass = _timed(_one_pass)
    estimators = list(_estimators())
    allocators = [
        Experts(budget=budget, smoothing=smoothing)
        for smoothing, budget in itertools.product((False, True), (90, 120, 150, 180, 210))
    ]

    def shared() -> int:
        count = 0
        for estimator in estimators:
            scores = estimator.score(grams)
            count += len([allocator(scores, grams.layers) for allocator in allocators])
        return count

    def alone() -> int:
        settings = itertools.product(estimators, allocators)
        return len([allocator(estimator.score(grams), grams.layers) for estimator, allocator in settings])

    allocators[0](estimators[0].score(grams), grams.layers)  # warm
    _, one_setting = _timed(lambda: allocators[0](estimators[0].score(grams), grams.layers))
    (count, all_shared), (_, all_alone) = _timed(shared), _timed(alone)
    one = one_pass + one_setting
    return {
        "settings": count,
        "seconds": {"pass": one_pass, "one setting": one_setting, "shared": all_shared, "alone": all_alone},
        "ratio": {"shared": (one_pass + all_shared) / one, "alone": (one_pass + all_alone) / one},
    }


def _estimators() -> Iterator[GramEstimator]:
    for aggregation in ("all", "positive"):
        yield GradDot(aggregation=aggregation)
        for damping in (0.01, 0.1, 1.0):
            for cls in (DataInf, Exact, Lissa):
                yield cls(aggregation=aggregation, damping=damping)


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


def _one_pass() -> LayerGrams:
    model, layers = _model()
    return probe(model, layers, _samples(NUM_TRAIN, seed=0), _samples(NUM_VALIDATION, seed=1))


def _model() -> tuple[Any, LayerMap]:
    model = Embedded(cache="outputs/store/models").load()
    return model, layer_map(model)


def _samples(count: int, *, seed: int, tokens: int = 64, batch_size: int = 8) -> list[IndexedBatch]:
    ids = torch.randint(10_000, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [
        (rows.tolist(), {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": ids[rows]})
        for rows in torch.arange(count).split(batch_size)
    ]


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def main() -> None:
    row = measure()
    print(f"DataInf, {row['matrices']} LoRA matrices, n = {NUM_TRAIN}, m = {NUM_VALIDATION}, {row['threads']} threads")
    print("            seconds   over Grams   largest relative difference")
    print(f"Grams    {row['seconds']['grams']:10.3f}")
    for loop in ("loop", "dot loop"):
        print(f"{loop:<9}{row['seconds'][loop]:10.2f}{row['ratio'][loop]:13.0f}{row['difference'][loop]:30.1e}")
    print()
    row = measure_settings()
    seconds, ratio = row["seconds"], row["ratio"]
    print(
        f"{row['settings']} settings from the Grams of one pass: SmolLM2-135M, attention weights, 64 + 32 × 64 tokens"
    )
    print("one pass s   one setting s   all, scores shared s   over one   all, each alone s   over one")
    print(
        f"{seconds['pass']:10.2f}{seconds['one setting']:16.3f}{seconds['shared']:23.2f}{ratio['shared']:11.3f}"
        f"{seconds['alone']:20.2f}{ratio['alone']:11.3f}"
    )


if __name__ == "__main__":
    main()
