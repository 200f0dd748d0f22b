"""Trains all blocks, half of them and a quarter of them, by LoRA and in full, and compares the losses row by row.

    sh experiments/layers_to_train_smollm2/run.sh

If it is stopped, the same command carries on. `--outputs FOLDER` puts everything elsewhere. All other arguments are
overrides of every run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAME = "layers_to_train_smollm2"
SEEDS = range(3)
ALL = ("allocator=position", "allocator.keep=1.0")
FIRST, LAST = ("allocator=position", "allocator.rule=first"), ("allocator=position", "allocator.rule=last")
HALF, QUARTER = "allocator.keep=0.5", "allocator.keep=0.25"
LORA, FULL = "method.equal_parameters=true", ("method=full", "method.save=false")
ILA = ("estimator=file", "estimator.path={runs}/ila/record.json")  # of the adapter that "lora all" trains with seed 0
ARMS: dict[str, tuple[str, ...]] = {
    "lora all": (LORA, *ALL),
    "lora half ila": (LORA, HALF, *ILA),
    "lora half layerif": (LORA, HALF, "estimator=datainf"),
    "lora half avss": (LORA, HALF, "estimator=avss"),
    "lora half first": (LORA, HALF, *FIRST),
    "lora half last": (LORA, HALF, *LAST),
    "lora half random": (LORA, HALF, "estimator=random"),
    "lora quarter ila": (LORA, QUARTER, *ILA),
    "lora quarter layerif": (LORA, QUARTER, "estimator=datainf"),
    "lora quarter last": (LORA, QUARTER, *LAST),
    "full all": (*FULL, *ALL),
    "full half layerif": (*FULL, HALF, "estimator=datainf"),
    "full half last": (*FULL, HALF, *LAST),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    options, overrides = parser.parse_known_args()
    runs = options.outputs.resolve() / "sweeps" / NAME
    shared = [f"experiment={NAME}", f"outputs={options.outputs}", *overrides]
    layerif(*shared, "method=none", *ALL, "evaluation.before=true", folder=runs / "untouched")
    for seed in SEEDS:  # one seed is finished before the next, so that the runs so far can be compared at any time
        for arm, settings in ARMS.items():
            given = [setting.format(runs=runs) for setting in settings]
            layerif(*shared, *given, f"seed={seed}", folder=runs / folder_of(arm, seed))
            if (arm, seed) == ("lora all", 0):
                adapter = f"model.adapter={runs / folder_of(arm, seed) / 'adapter'}"
                layerif(*shared, "method=none", "estimator=ila", adapter, "probe.loss_on=output", folder=runs / "ila")
    results = Path(__file__).with_name("results.py")
    subprocess.run([sys.executable, results, runs], check=True)


def folder_of(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '_')}-{seed}"


def layerif(*arguments: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "layerif", *arguments, f"hydra.run.dir={folder}"], check=True)


if __name__ == "__main__":
    main()
