"""Scores the four embedded tasks with every estimator, and draws the profiles.

    python experiments/layer_profiles/run.py

The same command carries on where it was stopped. ILA weighs an adapter, so its arm follows the arm `checkpoint`, which
trains one plain LoRA for each task. `--outputs FOLDER` puts everything elsewhere; all other arguments are overrides of
every run, for example `trainer=gpu`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from layerif.files import conf_folder

TASKS = ("capital", "currency", "demonym", "region")
# `uniform` is flat, `ends` knows nothing but depth, estimators of curves give no scores, `reversed` turns another
# estimator round, `kfac`, `ekfac` and `shampoo` take passes of their own, and `ila` weighs an adapter (arm=ila).
# Estimators with a setting to fill in, such as `tracin`, are left out as well.
APART = (
    "uniform",
    "ends",
    "loss_curve",
    "measured_loss",
    "bits_curve",
    "skip_curve",
    "angular",
    "reversed",
    "kfac",
    "ekfac",
    "shampoo",
    "ila",
)
ESTIMATORS = [
    file.stem
    for file in sorted(conf_folder().glob("estimator/*.yaml"))
    if file.stem not in APART and "???" not in file.read_text()
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    options, overrides = parser.parse_known_args()
    sweep = options.outputs / "sweeps" / "layer_profiles"
    shared = ["experiment=layer_profiles", f"outputs={options.outputs}", *overrides]
    layerif("-m", *shared, f"task={','.join(TASKS)}", f"estimator={','.join(ESTIMATORS)}")
    layerif("-m", *shared, f"task={','.join(TASKS)}", "arm=checkpoint,ila")
    plot = Path(__file__).with_name("plot.py")
    subprocess.run([sys.executable, plot, sweep, plot.parent], check=True)


def layerif(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "layerif", *arguments], check=True)


if __name__ == "__main__":
    main()
