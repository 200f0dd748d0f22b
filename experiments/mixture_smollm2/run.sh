#!/bin/sh
# Runs the experiment on the embedded model. If it is stopped, the same command carries on; finished jobs are not run twice.
# --full takes ten seeds, for a GPU. Further arguments are settings for every job, such as trainer=gpu.
set -e
cd "$(dirname "$0")/../.."
here=experiments/mixture_smollm2
arms="plain_lora uniform balanced layerif_all gain_curves gain_curves_init"
seeds=1,2
if [ "$1" = --full ]; then
    shift
    set -- trainer=gpu "$@"
    seeds=1,2,3,4,5,6,7,8,9
fi
sweep() { layerif -m experiment=mixture_smollm2 "$@" </dev/null; }

# Three rates of each arm with seed 0, then the other seeds at its best rate.
for arm in $arms; do
    sweep arm=$arm method.learning_rate=0.0003,0.001,0.003 seed=0 "$@"
    rate=$(python -m experiments.arms outputs/sweeps/mixture_smollm2 arm=$arm)
    sweep arm=$arm method.learning_rate=$rate seed=$seeds "$@"
done

python $here/plot.py
layerif-report outputs/sweeps/mixture_smollm2
