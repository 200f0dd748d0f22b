#!/bin/sh
# The whole experiment. Stopped and started again it carries on: finished jobs are not run twice.
set -e
layerif -m experiment=pruning_smollm2 estimator=uniform method.calibration.seed=0 pruner=magnitude evaluation.before=true
layerif -m experiment=pruning_smollm2 estimator=datainf,reversed,random method.calibration.seed=0 pruner=magnitude
layerif -m experiment=pruning_smollm2
python "$(dirname "$0")/plot.py" outputs/sweeps/pruning_smollm2
