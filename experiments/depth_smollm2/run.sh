#!/bin/sh
# Runs the experiment on the embedded model. If it is stopped, the same command carries on; finished jobs are not run
# twice. Further arguments are settings for every job.
set -e
runs=outputs/sweeps/depth_smollm2
sweep() { layerif -m experiment=depth_smollm2 "$@"; }

sweep "$@" # nine arms, each without 10, 20 and 30 % of the blocks
sweep arm=random seed=1,2 "$@"
sweep allocator.keep=0.8 arm=skip_curve_first,skip_curve_both "$@"
sweep allocator.keep=0.75 arm=avss,spaced_blocks "$@"
sweep task=region allocator.keep=0.8 arm=last_blocks,spaced_blocks,avss,layerif_all,skip_curve,angular_span "$@"

before= # each greedy search carries on after the last step of the one before
for keep in 0.9 0.8 0.7; do
    run=$runs/greedy-$keep
    mkdir -p "$run"
    [ -z "$before" ] || [ -f "$run/greedy.json" ] || cp "$before/greedy.json" "$run"
    layerif experiment=depth_smollm2 hydra.mode=RUN hydra.run.dir="$run" arm=greedy allocator.keep=$keep "$@"
    before=$run
done

for task in city region; do # the dense model
    layerif method=none estimator=uniform task=$task hydra.run.dir="$runs/dense-$task" evaluation.before=true \
        'evaluation.metrics=[options,loss]' evaluation.first_window=24 evaluation.num_windows=24
done

python "$(dirname "$0")/results.py"
layerif-report $runs
