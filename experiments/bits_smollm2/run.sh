#!/bin/sh
# Runs the experiment on the embedded model. If it is stopped, the same command carries on; finished jobs are not run
# twice. Further arguments are settings for every job.
set -e
runs=outputs/sweeps/bits_smollm2
here=$(dirname "$0")
[ -f outputs/texts/factbook.txt ] || python "$here/../sparsity_smollm2/texts.py" # a text of another kind

layerif -m experiment=bits_smollm2 arm=uniform,ends_high seed=0 "$@" # they do not depend on the seed
layerif -m experiment=bits_smollm2 "$@"                              # scores and curves, five choices, four budgets
layerif method=none estimator=uniform task=city task.source.test=152 hydra.run.dir=$runs/dense evaluation.before=true \
    'evaluation.metrics=[loss,perplexity]' 'evaluation.text=[documentation,outputs/texts/factbook.txt]' \
    evaluation.first_window=24 evaluation.num_windows=12 # the model as it was

python "$here/results.py"
layerif-report $runs
