#!/bin/sh
# Runs the experiment on the embedded model, or with --full on models of 7B. If it is stopped, the same command carries on;
# finished jobs are not run twice. Further arguments are settings for every job, such as trainer=gpu.
set -e
here=$(dirname "$0")
if [ "$1" = --full ]; then
    shift
    layerif -m experiment=sparsity_7b "$@"
    layerif-report outputs/sweeps/sparsity_7b
    exit
fi
[ -f outputs/texts/plays.txt ] || python "$here/texts.py" # two texts of another kind, and rows of the calibration text

sweep() { layerif -m experiment=sparsity_smollm2 "$@"; }
# Wanda at 60 %: the main grid, then the other arms.
sweep "$@"
sweep seed=0,1 arm=reversed,random,owl,alphapruning,dlp,lsa,mdl,measured_loss,curves_block,layerif_of_text "$@"
sweep seed=0 arm=curves_and_mask_swaps,curves_refined,search_from_uniform "$@"

# Curves of tasks: is a task helped by its own, and what do they cost on the documentation?
tasks() { sweep name=sparsity_smollm2_tasks 'evaluation.text=[documentation]' seed=0,1,2 "$@"; }
tasks task=city arm=curves_of_city,curves_of_region,curves_mixed "$@"
tasks task=region arm=uniform,curves,curves_of_city,curves_of_region,curves_mixed "$@"

# Other sparsities and pruners, and fewer windows, on the documentation alone.
others() { sweep name=sparsity_smollm2_others 'evaluation.metrics=[perplexity]' 'evaluation.text=[documentation]' "$@"; }
arms=uniform,first_block_spared,layerif_all,curves
others seed=0,1,2 allocator.target=0.5,0.7 arm=$arms "$@"
others seed=0,1,2 pruner=sparsegpt allocator.target=0.6,0.7 arm=$arms,curves_of_wanda "$@"
line="arm=straight_line allocator.slope=0.0069" # the slope that the trials of the main grid took with every choice
others seed=0,1,2 allocator.target=0.5,0.7 $line "$@"
others seed=0,1,2 pruner=sparsegpt allocator.target=0.6,0.7 $line "$@"
others seed=0 pruner=magnitude arm=uniform,layerif_all,curves "$@"
others seed=0,1,2 pruner.m=4,8 allocator.target=0.5 arm=uniform,layerif_all,curves "$@"
others seed=0,1,2 method.calibration.num_windows=4,8 arm=uniform,curves "$@"

python "$here/plot.py"
for which in "" _tasks _others; do layerif-report outputs/sweeps/sparsity_smollm2$which; done
