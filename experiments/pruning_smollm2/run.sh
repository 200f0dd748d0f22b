#!/bin/sh
# The whole experiment. Stopped and started again it carries on: finished jobs are not run twice.
set -e
# Magnitude looks at no calibration text; the epsilon is the paper's for it, which a uniform allocation has no use for.
layerif -m experiment=pruning_smollm2 estimator=uniform method.calibration.seed=0 pruner=magnitude evaluation.before=true
layerif -m experiment=pruning_smollm2 estimator=datainf,reversed,random method.calibration.seed=0 pruner=magnitude \
    allocator.epsilon=0.3
layerif -m experiment=pruning_smollm2
for seed in 0 1 2; do # a random allocation of its own for each
    layerif -m experiment=pruning_smollm2 estimator=random estimator.seed=$seed method.calibration.seed=$seed
done
python "$(dirname "$0")/plot.py" outputs/sweeps/pruning_smollm2
