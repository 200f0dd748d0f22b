#!/bin/sh
# Runs the experiment on the embedded model. If it is stopped, the same command carries on; finished jobs are not run twice.
# Further arguments are settings for every job.
set -e
here=$(dirname "$0")
[ -d outputs/texts/factbook ] || python "$here/../sparsity_smollm2/texts.py"

sweep() { layerif -m experiment=rows_smollm2 seed=0,1,2 "$@"; }
# Questions: the untouched model, all rows, then 60 and 240 of them.
sweep seed=0 method=none evaluation.before=true "$@"
sweep selection=all "$@"
sweep selection=random,influence,ifd selection.budget=60,240 "$@"
sweep selection=influence selection.reversed=true selection.budget=60,240 "$@"
# The completions are measured once. A level of fewer than 60 rows is refused, and is not an arm.
sweep selection=mastery selection.level=0,1,2,3,4 selection.max_new_tokens=12 "$@" || true

# Texts: tokens and weights.
text() {
    layerif -m experiment=rows_smollm2 name=rows_smollm2_text seed=0,1,2 task=text task.path=outputs/texts/factbook \
        task.splits.validation=test task.splits.test=validation task.num_train=null task.num_test=null \
        data.loss_on=null data.max_length=128 data.batch_size=4 probe.loss_on=null "$@"
}
full="method=full method.save=false allocator=position allocator.keep=1.0"
text seed=0 method=none evaluation.before=true "$@"
text data.token_filter=none,low_perplexity,random,lowest "$@"
text $full method.protect=none,spider "$@"

python "$here/plot.py"
for which in "" _text; do layerif-report outputs/sweeps/rows_smollm2$which; done
