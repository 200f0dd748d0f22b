"""The expected cost of a probe under each strategy, and the strategy that it would take, without running it.

Sizes come from the model's configuration; rates come from a short trial on this machine (`layerif.probe.speed`).
Seconds are those of forward, backward, products and moving factors at these rates. Costs that come once and do not grow
with the samples are left out (start-up, loading the model, scoring), and so is the load of other programs on the
machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from layerif.data.batches import batches
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.models.pretrained import Pretrained
from layerif.probe.grams.gather import budget, wanted_tile_bytes, workload
from layerif.probe.grams.passes import Passes, Workload, passes
from layerif.probe.grams.products import FORMS
from layerif.probe.grams.projection import Projection
from layerif.probe.measurements import Measurements
from layerif.probe.speed import Rates, Trial
from layerif.probe.store import Store


@dataclass(frozen=True)
class Strategy:
    """One way to measure, with its expected cost.

    Attributes:
        name: of the strategy.
        why: the reason why it is chosen, or not, or impossible (then the numbers are zero).
        chosen: True for the one that a probe would take.
        passes: passes over the samples.
        device_gb: on the device, beside the model and one batch.
        elsewhere_gb: of factors that wait in main memory or on disk.
        pass_operations, product_operations: of forward and backward, and of the products.
        seconds: of all of it.
    """

    name: str
    why: str
    chosen: bool = False
    passes: int = 0
    device_gb: float = 0.0
    elsewhere_gb: float = 0.0
    pass_operations: float = 0.0
    product_operations: float = 0.0
    seconds: float = 0.0


def estimate(measurements: Measurements) -> tuple[Workload, list[Strategy]]:
    """Gives the workload, and every strategy with its expected cost; one is chosen, as a probe would."""
    probe, device = measurements.probe, torch.device(measurements.device)
    model, store = measurements.model, measurements.store
    assert isinstance(model, Pretrained)
    assert isinstance(store, Store)
    skeleton = model.skeleton(with_adapter=probe.parameters == "lora")
    layers = measurements.measured_layers(skeleton)
    train, validation = (list(batches(part, probe.batch_size, measurements.pad_id)) for part in measurements.samples())
    trial = Trial(model, measurements, train[0][1])
    projection = Projection(probe.projection, probe.projection_seed) if probe.projection else None
    reads_with, num_processes = trial.reads_with(layers), measurements.num_processes
    load = workload(skeleton, layers.matrices, train, validation, reads_with, projection, num_processes)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in skeleton.parameters())
    memory, host_memory = budget(device, probe.memory_gb, num_processes, weights)

    def arranged(limit: float, offload: Any) -> Passes:
        return passes(
            load, limit, form=probe.form, offload=offload, tile_bytes=wanted_tile_bytes(device), host_memory=host_memory
        )

    taken = arranged(memory, probe.offload)
    rates = trial.rates(load, taken, Path(store.root))
    sizes = _Sizes(rates, layers, sum(layer_map(skeleton, skip_unsupported=True, scope="all").numel), skeleton.config)
    found = []
    for name, limit, offload in (
        ("one pass", float("inf"), "none"),
        ("several passes", memory, "none"),
        ("cpu", memory, "cpu"),
        ("disk", memory, "disk"),
    ):
        if offload == "cpu" and not host_memory:
            found.append(Strategy(name, "the model is in main memory already"))
            continue
        try:
            strategy = sizes.strategy(name, arranged(limit, offload))
        except ValueError as error:
            found.append(Strategy(name, str(error)))
            continue
        if name == "one pass" and strategy.device_gb > memory / 1e9:
            why = f"needs more than the {memory / 1e9:.3g} GB of the budget"
        elif name == "several passes" and strategy.passes == 1:
            continue  # that is one pass
        elif taken.offload == offload and len(taken.groups) == strategy.passes:
            strategy = replace(strategy, chosen=True)
            why = "asked for" if probe.offload == offload else _WHY[name]
        elif name == "disk":
            why = "only when asked for (probe.offload=disk): slower, but an interruption loses one batch"
        else:
            why = "fits, and needs as many passes or more than what is chosen"
        found.append(replace(strategy, why=why))
    return load, found


_WHY = {
    "one pass": "fits into the budget",
    "several passes": "the factors of one pass over all matrices do not fit",
    "cpu": "fewer passes than on the device alone",
}


def show_plan(measurements: Measurements, load: Workload, strategies: Sequence[Strategy]) -> None:
    """Prints the strategies as a table, and marks the chosen one."""
    console = Console()
    probe = measurements.probe
    console.print(
        f"{len(load.matrices)} matrices ({probe.parameters}, {probe.scope}); {load.num_train} + {load.num_val} samples"
        f", {load.num_tokens:,} tokens with padding, the longest {load.longest}; device {measurements.device}"
    )
    shapes = Table(title="inner products, by shape (outputs × inputs)")
    for column in ("shape", "matrices", *(f"{form} GFLOP" for form in FORMS), "chosen"):
        shapes.add_column(column, justify="left" if column in ("shape", "chosen") else "right")
    counts = Counter((matrix.num_out, matrix.num_in) for matrix in load.matrices)
    first = {(matrix.num_out, matrix.num_in): matrix for matrix in reversed(load.matrices)}
    for shape, count in counts.items():
        costs = [f"{count * load.operations(first[shape], form) / 1e9:,.0f}" for form in FORMS]
        shapes.add_row(f"{shape[0]} × {shape[1]}", str(count), *costs, load.form(first[shape], probe.form))
    console.print(shapes)
    table = Table(title="strategies")
    for column in ("strategy", "passes", "GB on device", "GB elsewhere", "TFLOP passes", "TFLOP products", "seconds"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for each in strategies:
        numbers = [f"{each.passes}", f"{each.device_gb:.3g}", f"{each.elsewhere_gb:.3g}"]
        numbers += [
            f"{each.pass_operations / 1e12:.3g}",
            f"{each.product_operations / 1e12:.3g}",
            f"{each.seconds:.3g}",
        ]
        name = f"[bold]{each.name}[/] ←" if each.chosen else each.name
        table.add_row(name, *(numbers if each.passes else ["–"] * 6))
    console.print(table)
    for each in strategies:
        console.print(f"{each.name}: {each.why}", highlight=False)
    console.print(
        "memory is beside the model and one batch; seconds are of the passes and products alone, on a machine as busy "
        "as in the trial just now: start-up, loading the model and scoring come on top; nothing was measured"
    )


@dataclass(frozen=True)
class _Sizes:
    """Turns passes into seconds; `numel` counts all linear layers of the blocks, for the operations of a pass."""

    rates: Rates
    layers: LayerMap
    numel: int
    config: Any

    def strategy(self, name: str, arranged: Passes) -> Strategy:
        load, rates, num_blocks = arranged.workload, self.rates, len(self.layers.names)
        head = self.config.vocab_size * self.config.hidden_size
        operations = seconds = 0.0
        for group in arranged.groups:
            first = self.layers.names.index(self.layers.block_of[group[0].name])
            above = num_blocks - first  # the backward ends at the first block that is measured
            operations += 2.0 * load.num_tokens * (self.numel * (1 + above / num_blocks) + 2 * head)
            backward = rates.block - rates.forward
            seconds += (
                load.num_tokens / load.num_processes * (rates.head + num_blocks * rates.forward + above * backward)
            )
        elsewhere = load.kept_bytes(load.matrices) if arranged.offload != "none" else 0.0
        speed = {"none": float("inf"), "cpu": rates.host, "disk": rates.disk}[arranged.offload]
        return Strategy(
            name,
            why="",
            passes=len(arranged.groups),
            device_gb=arranged.device_bytes / 1e9,
            elsewhere_gb=elsewhere / 1e9,
            pass_operations=operations,
            product_operations=arranged.operations,
            seconds=seconds + (arranged.operations / rates.products + 2 * elsewhere / speed) / load.num_processes,
        )
