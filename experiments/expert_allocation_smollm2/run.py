"""Fine-tunes the same LoRA-MoE under ten allocations of the same number of experts, and compares them by question.

    python experiments/expert_allocation_smollm2/run.py            # one task, three seeds: about an hour on two cores
    python experiments/expert_allocation_smollm2/run.py --full     # four tasks, ten seeds, on a GPU

If it is stopped, the same command carries on. `--outputs FOLDER` puts everything elsewhere. All other arguments are
overrides of every run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# All have 150 experts over 30 blocks, or are plain LoRA of the same size. MoLA's shape 5555 is the uniform allocation.
ARMS: tuple[tuple[str, ...], ...] = (
    ("estimator=uniform",),
    ("allocator=shape", "allocator.shape=2468", "allocator.budget=150"),
    ("allocator=shape", "allocator.shape=8642", "allocator.budget=150"),
    ("estimator=alpha", "allocator.shift=none"),  # AlphaLoRA's rule
    ("estimator=datainf",),
    ("estimator=datainf", "estimator.aggregation=positive"),
    ("estimator=datainf", "estimator.aggregation=top25"),
    ("estimator=reversed",),
    ("estimator=random",),
    ("estimator=uniform", "method=lora_equal"),
)
NAME = "expert_allocation_smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="four tasks and ten seeds on a GPU")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    options, overrides = parser.parse_known_args()
    name = f"{NAME}_full" if options.full else NAME
    tasks, seeds = ("capital,currency,demonym,region", range(10)) if options.full else ("region", range(3))
    shared = [f"experiment={NAME}", f"name={name}", f"task={tasks}", f"outputs={options.outputs}"]
    shared += ["trainer=gpu"] * options.full + overrides
    layerif(*shared, "estimator=uniform", "method=none", "evaluation.before=true")  # the untouched model
    for seed in seeds:  # one seed is finished before the next, so that the runs so far can be compared at any time
        for arm in ARMS:
            layerif(*shared, *arm, f"seed={seed}")
    plot = Path(__file__).with_name("plot.py")
    subprocess.run([sys.executable, plot, options.outputs / "sweeps" / name, plot.parent], check=True)


def layerif(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "layerif", "-m", *arguments], check=True)


if __name__ == "__main__":
    main()
