#!/bin/sh
# Runs the whole experiment. If it is stopped, the same command carries on; finished jobs are not run twice.
set -e
# Magnitude does not look at calibration text. Its epsilon is the paper's, which a uniform allocation does not need.
layerif -m experiment=pruning_smollm2 estimator=uniform method.calibration.seed=0 pruner=magnitude evaluation.before=true
layerif -m experiment=pruning_smollm2 estimator=datainf,reversed,random method.calibration.seed=0 pruner=magnitude \
    allocator.epsilon=0.3
layerif -m experiment=pruning_smollm2
for seed in 0 1 2; do # each seed has a random allocation of its own
    layerif -m experiment=pruning_smollm2 estimator=random estimator.seed=$seed method.calibration.seed=$seed
done
python "$(dirname "$0")/plot.py" outputs/sweeps/pruning_smollm2
