"""The expected cost of gradient passes under each strategy, and the strategy that a probe would take.

An estimator's request says which passes its evidence takes (`Request.planned`); nothing of them is run here. Sizes come
from the model's configuration; rates come from a short trial on this machine (`layerif.probe.speed`).
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

from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.models.pretrained import Pretrained
from layerif.probe.grams.gather import budget
from layerif.probe.grams.passes import Passes, Workload, passes
from layerif.probe.measurements import Measurements
from layerif.probe.request import Planned, Request
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


def estimate(measurements: Measurements, request: Request) -> tuple[Planned, Workload, list[Strategy]] | None:
    """Gives the passes of the evidence and every strategy with its expected cost; one is chosen, as a probe would.

    Returns:
        What is planned, its sizes and the strategies; None where the cost of this evidence is not known beforehand.
    """
    probe, device = measurements.probe, torch.device(measurements.device)
    model, store = measurements.model, measurements.store
    assert isinstance(model, Pretrained)
    assert isinstance(store, Store)
    skeleton = model.skeleton(with_adapter=probe.parameters == "lora")
    planned = request.planned(measurements, skeleton)
    if planned is None:
        return None
    trial = Trial(model, measurements, planned)
    load, num_processes = planned.workload(trial.reads_with()), measurements.num_processes
    weights = sum(parameter.numel() * parameter.element_size() for parameter in skeleton.parameters())
    memory, host_memory = budget(device, probe.memory_gb, num_processes, weights)

    def arranged(limit: float, offload: Any) -> Passes:
        return passes(
            load,
            limit,
            form=planned.form,
            offload=offload,
            tile_bytes=planned.tile_bytes,
            host_memory=host_memory,
        )

    taken = arranged(memory, probe.offload)
    rates = trial.rates(taken, Path(store.root))
    everything = layer_map(skeleton, skip_unsupported=True, scope="all")
    sizes = _Sizes(rates, planned, everything, skeleton.config.get_text_config())
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
        elif name == "several passes" and strategy.passes == planned.num_models:
            continue  # that is one pass
        elif taken.offload == offload and len(taken.groups) * planned.num_models == strategy.passes:
            strategy = replace(strategy, chosen=True)
            why = "asked for" if probe.offload == offload else _WHY[name]
        elif name == "disk":
            why = "only when asked for (probe.offload=disk): slower, but an interruption loses one batch"
        else:
            why = "fits, and needs as many passes or more than what is chosen"
        found.append(replace(strategy, why=why))
    return planned, load, found


_WHY = {
    "one pass": "fits into the budget",
    "several passes": "the factors of one pass over all matrices do not fit",
    "cpu": "fewer passes than on the device alone",
}


def show_plan(planned: Planned, load: Workload, strategies: Sequence[Strategy], device: torch.device | str) -> None:
    """Prints the strategies as a table, and marks the chosen one."""
    console = Console()
    models = f"; {planned.num_models} models, whose passes and seconds are added up" if planned.num_models > 1 else ""
    console.print(
        f"{planned.about}, {load.num_tokens:,} tokens with padding, the longest {load.longest}; device {device}{models}"
    )
    counts = Counter((matrix.num_out, matrix.num_in) for matrix in load.matrices)
    first = {(matrix.num_out, matrix.num_in): matrix for matrix in reversed(load.matrices)}
    costs = {shape: planned.operations(load, first[shape]) for shape in counts}
    shapes = Table(title=planned.title)
    for column in ("shape", "matrices", *(f"{form} GFLOP" for form in next(iter(costs.values()))), "chosen"):
        shapes.add_column(column, justify="left" if column in ("shape", "chosen") else "right")
    for shape, count in counts.items():
        spelt = [f"{count * cost / 1e9:,.0f}" for cost in costs[shape].values()]
        shapes.add_row(f"{shape[0]} × {shape[1]}", str(count), *spelt, planned.chosen(load, first[shape]))
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
    """Turns passes into seconds; `everything` has all linear layers of all blocks, for the operations of a pass."""

    rates: Rates
    planned: Planned
    everything: LayerMap
    config: Any

    def strategy(self, name: str, arranged: Passes) -> Strategy:
        load, rates, planned = arranged.workload, self.rates, self.planned
        names, numel, num_models = self.everything.names, sum(self.everything.numel), planned.num_models
        num_blocks = len(names)
        head = self.config.vocab_size * self.config.hidden_size
        operations = 2.0 * planned.forward_tokens * numel
        seconds = planned.forward_tokens * num_blocks * rates.forward
        for group in arranged.groups:
            first = names.index(planned.layers.block_of[group[0].name])
            above = num_blocks - first  # the backward ends at the first block that is measured
            operations += 2.0 * load.num_tokens * (numel * (1 + above / num_blocks) + 2 * head)
            backward = rates.block - rates.forward
            seconds += (
                load.num_tokens / load.num_processes * (rates.head + num_blocks * rates.forward + above * backward)
            )
        weights = 0.0 if planned.per_weight is None else float(sum(planned.layers.numel))
        elsewhere = load.kept_bytes(load.matrices) if arranged.offload != "none" else 0.0
        speed = {"none": float("inf"), "cpu": rates.host, "disk": rates.disk}[arranged.offload]
        divided = arranged.operations / rates.products + weights * rates.weights + 2 * elsewhere / speed
        return Strategy(
            name,
            why="",
            passes=num_models * len(arranged.groups),
            device_gb=arranged.device_bytes / 1e9,
            elsewhere_gb=elsewhere / 1e9,
            pass_operations=num_models * operations,
            product_operations=num_models * arranged.operations,
            seconds=num_models * (seconds + divided / load.num_processes),
        )
