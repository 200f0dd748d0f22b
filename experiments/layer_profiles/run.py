"""Score the four embedded tasks with every estimator, and draw what they say.

    python experiments/layer_profiles/run.py

Carries on where it was stopped. ILA weighs an adapter, so one plain LoRA a task is trained first. `--outputs FOLDER`
puts everything elsewhere; all other arguments are overrides of every run, for example `trainer=gpu`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from layerif.files import conf_folder

TASKS = ("capital", "currency", "demonym", "region")
# `uniform` is flat, `reversed` another one turned round, `ekfac` needs a package that does not come with this one, and
# `ila` an adapter. What has a setting to fill in, such as the checkpoints of `tracin`, is left out as well.
APART = ("uniform", "reversed", "ekfac", "ila")
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
    for task in TASKS:
        trained = sweep / f"adapter-{task}"
        lora = ["method=lora", "allocator=rank", "estimator=uniform"]
        layerif(*shared, f"task={task}", *lora, f"hydra.run.dir={trained}")
        # The gates weigh the adapter by the loss it was trained with.
        ila = ["estimator=ila", "probe.loss_on=${data.loss_on}", f"model.adapter={trained.resolve() / 'adapter'}"]
        layerif(*shared, f"task={task}", *ila, f"hydra.run.dir={sweep / f'ila-{task}'}")
    plot = Path(__file__).with_name("plot.py")
    subprocess.run([sys.executable, plot, sweep, plot.parent], check=True)


def layerif(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "layerif", *arguments], check=True)


if __name__ == "__main__":
    main()
