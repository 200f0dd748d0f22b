"""Times scoring, estimating and a LoRA-MoE linear against the plain ways to do the same, in `make bench`.

    OMP_WAIT_POLICY=passive python experiments/benchmark_first_light/run.py

The contestants take turns in one process, and each figure is a median. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from moe_linear import main as measure_moe_linear

from experiments.timing import check_plausible, fresh, machine, reading
from experiments.timing import seconds as seconds_of
from layerif.data.batches import batches, encode, padding_id
from layerif.data.countries import Countries
from layerif.data.task import Task
from layerif.estimators.cosine import Cosine
from layerif.estimators.datainf import DataInf
from layerif.estimators.exact import Exact
from layerif.estimators.grad_dot import GradDot
from layerif.evidence import LayerGrams
from layerif.models.blocks import layer_map
from layerif.models.embedded import EmbeddedModel
from layerif.models.loss import per_sample_loss
from layerif.probe.grams.gather import IndexedBatch
from layerif.probe.grams.measure import measure

NUM_TRAIN, NUM_VALIDATION, BATCH_SIZE, ROUNDS = 64, 32, 8, 3


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{machine()}, device {device}\n")
    grams = scoring(device)
    estimating(grams)
    measure_moe_linear()


def scoring(device: str) -> LayerGrams:
    """Times a probe of all blocks against a plain forward + backward (all weight gradients) of the same batches."""
    embedded = EmbeddedModel(cache="outputs/store/models")
    model: Any = embedded.load()
    model.to(device)
    tokenizer = embedded.tokenizer()
    layers = layer_map(model)
    of_capitals = samples(tokenizer, padding_id(tokenizer))
    print(f"scoring {NUM_TRAIN} + {NUM_VALIDATION} samples, {len(layers.names)} blocks, attention weights, float32")
    print("samples                      tokens   probe s   plain s   probe/plain")
    for name, (train, validation) in {
        "capital cities": of_capitals,
        "random, 128 tokens each": long_samples(tokenizer.vocab_size),
    }.items():
        both = [*train, *validation]
        seconds: dict[str, list[float]] = {"probe": [], "plain": []}
        for _ in range(ROUNDS):
            seconds["probe"].append(seconds_of(lambda t=train, v=validation: measure(model, layers, t, v), device))
            seconds["plain"].append(seconds_of(lambda b=both: plain(model, b, device), device))
        probe, whole = (statistics.median(seconds[key]) for key in ("probe", "plain"))
        tokens = sum(int(batch["attention_mask"].sum()) for _, batch in both)
        check_plausible(f"the probe of {name}", probe, 0.1 * whole)  # a probe runs the same forward and backward passes
        print(f"{name:<27}{tokens:>8}{probe:>10.1f}{whole:>10.1f}{probe / whole:>14.2f}")
    print()
    return measure(model, layers, *of_capitals)


def plain(model: torch.nn.Module, batched: list[IndexedBatch], device: str) -> None:
    for _, batch in batched:
        per_sample_loss(model, {key: tensor.to(device) for key, tensor in batch.items()}).sum().backward()
        model.zero_grad()


def samples(tokenizer, pad: int) -> tuple[list[IndexedBatch], list[IndexedBatch]]:
    task = Task(
        name="capital",
        source=Countries(kind="capital"),
        columns={"id": "id", "question": "question", "options": "options", "answer": "answer"},
        instruction="Question: {{ question }}\n",
        output="Answer: {{ label }}.",
        labels="options",
        answer="answer",
        pattern="Answer: (.*)",
        splits={"train": "train", "validation": "validation", "test": "test"},
    )
    splits = task.load()
    encoded = [
        encode(examples, tokenizer, template="plain", max_length=128, eos=False)
        for examples in (splits.train[:NUM_TRAIN], splits.validation[:NUM_VALIDATION])
    ]
    return list(batches(encoded[0], BATCH_SIZE, pad)), list(batches(encoded[1], BATCH_SIZE, pad))


def long_samples(vocabulary: int) -> tuple[list[IndexedBatch], list[IndexedBatch]]:
    generator = torch.Generator().manual_seed(0)

    def batched(count: int) -> list[IndexedBatch]:
        ids = torch.randint(vocabulary, (count, 128), generator=generator)
        return [
            (rows.tolist(), {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": ids[rows]})
            for rows in torch.arange(count).split(BATCH_SIZE)
        ]

    return batched(NUM_TRAIN), batched(NUM_VALIDATION)


def estimating(grams: LayerGrams) -> None:
    """Times an estimator and its aggregation on ready Grams: 30 blocks × 4 matrices, n = 64, m = 32."""
    print("estimator and aggregation from ready Grams, milliseconds")
    least = reading(tensor for gram in grams.grams.values() for tensor in (gram.train_train, gram.val_train))
    for estimator in (DataInf(), DataInf(granularity="block"), Exact(), GradDot(), Cosine()):
        name = f"{type(estimator).__name__} {estimator.granularity}"
        copies = [fresh(grams) for _ in range(15)]  # an estimator remembers what it derived from its Grams
        median = statistics.median(seconds_of(lambda e=estimator, g=copy: e.score(g), "cpu") for copy in copies)
        check_plausible(name, median, least)
        print(f"{name:<18}{1000 * median:>8.1f}")
    print()


if __name__ == "__main__":
    main()
