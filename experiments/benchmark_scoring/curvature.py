"""Measures what influence under K-FAC, EK-FAC and Shampoo costs, beside Grams and a plain forward and backward.

    OMP_WAIT_POLICY=passive python experiments/benchmark_scoring/curvature.py   (a minute; --tiny only tries if it runs)

The model is that of growth.py, whose attention weights are measured in float32. Seconds are those of the processor, so
that other work on the machine does not count, and each is the median of some rounds that take turns. Every measurement
of curvature holds all of its dampings. A further damping is arithmetic on what is kept, and is timed as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmark_scoring.growth import START, TINY_START, llama, samples
from experiments.timing import check_plausible, machine
from layerif.estimators.ekfac import Ekfac
from layerif.models.blocks import layer_map
from layerif.models.loss import per_sample_loss
from layerif.probe.curvature.measure import measure_curvature
from layerif.probe.grams.measure import measure

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="few samples, one round: does it run?")
    sizes, rounds = (TINY_START, 1) if parser.parse_args().tiny else (START, ROUNDS)
    model: Any = llama(sizes["blocks"])
    layers = layer_map(model)
    both = samples(sizes["train"], sizes["tokens"], seed=0), samples(sizes["validation"], sizes["tokens"], seed=1)

    def plain() -> None:
        for _, batch in (*both[0], *both[1]):
            per_sample_loss(model, batch).sum().backward()
            model.zero_grad()

    kept = measure_curvature(model, layers, *both, spectra=("ekfac",))
    work: dict[str, Callable[[], object]] = {
        "plain forward and backward": plain,
        "Grams": lambda: measure(model, layers, *both),
        "K-FAC and EK-FAC": lambda: measure_curvature(model, layers, *both, spectra=("kfac", "ekfac")),
        "Shampoo": lambda: measure_curvature(model, layers, *both, spectra=("shampoo",)),
        "all three": lambda: measure_curvature(model, layers, *both),
        "EK-FAC at a further damping": lambda: Ekfac(damping=0.3).score(kept),
    }
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, each in work.items():
            start = time.process_time()
            each()
            found[name].append(time.process_time() - start)
    print(f"{machine()}; {', '.join(f'{count} {what}' for what, count in sizes.items())}\n")
    print("                               seconds   over the plain pass")
    for name, seconds in found.items():
        median = statistics.median(seconds)
        check_plausible(name, median)
        print(f"{name:<30}{median:>8.3f}{median / statistics.median(found['plain forward and backward']):>12.2f}")


if __name__ == "__main__":
    main()
