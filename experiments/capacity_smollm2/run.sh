#!/bin/sh
# Runs the experiment on the embedded model. If it is stopped, the same command carries on; finished jobs are not run twice.
# --full takes all tasks, arms and ten seeds, for a GPU. Further arguments are settings for every job, such as trainer=gpu.
set -e
cd "$(dirname "$0")/../.."
here=experiments/capacity_smollm2
arms=uniform,eva,adalora,fisher_trace,layerif_all,gain_curves,gain_curves_init,reversed
more_seeds=1,2
if [ "$1" = --full ]; then
    shift
    set -- trainer=gpu "$@"
    arms=$arms,uniform_init,lora_ga,alphalora,layerif_positive,layerif_top25,mdl_rank,random
    more_seeds=1,2,3,4,5,6,7,8,9
    all=--all
fi
texts=outputs/texts/documentation_rows
[ -f $texts/test.jsonl ] || python $here/texts.py $texts

settings_of() { # of a task, by its name in the tables
    case $1 in
    documentation) echo task=text task.name=documentation task.path=$texts data.loss_on=null data.batch_size=8 trainer.max_epochs=1 ;;
    city_large) echo task=city_large task.num_train=600 task.num_test=300 trainer.max_epochs=1 ;;
    *) echo "task=$1" ;;
    esac
}
sweep() { layerif -m experiment=capacity_smollm2 "$@" </dev/null; }
best() { # of a sweep, among the runs that meet the conditions
    found=$1
    shift
    python -m experiments.arms "outputs/sweeps/$found" "$@"
}

# Part 0: where does capacity bind? Three rates with seed 0, then the other seeds at the best of them.
for task in city mixed documentation city_large; do
    for rank in 1 8 64; do
        case $rank in 1) rates=0.001,0.003,0.01 ;; 8) rates=0.0003,0.001,0.003 ;; 64) rates=0.0001,0.0003,0.001 ;; esac
        budget=$((30 * rank))
        ranks() { sweep name=capacity_smollm2_ranks $(settings_of $task) arm=uniform allocator.budget=$budget "$@"; }
        ranks method.learning_rate=$rates seed=0 "$@"
        rate=$(best capacity_smollm2_ranks arm=uniform task.name=$task allocator.budget=$budget)
        ranks method.learning_rate=$rate seed=$more_seeds "$@"
    done
done

# The comparison, where it binds most: three rates of each arm with seed 0, then the other seeds at its best rate.
mkdir -p outputs/sweeps
python $here/plot.py --settings $all >outputs/sweeps/capacity_smollm2_settings.txt # empty where capacity binds nowhere
while read -r task rank seeds; do
    shapes=""
    [ "$all" ] && [ "$rank" = 8 ] && shapes=,mola_rising_rank,mola_falling_rank
    for arm in $(echo $arms$shapes | tr , ' '); do
        case $arm in
        gain_*) budget=allocator.budget=$((305280 * rank)) ;; # in parameters: 30 blocks of 10,176 for each rank
        *) budget=allocator.budget=$((30 * rank)) ;;
        esac
        compare() { sweep $(settings_of $task) arm=$arm $budget "$@"; }
        compare method.learning_rate=0.0003,0.001,0.003 seed=0 "$@"
        rate=$(best capacity_smollm2 arm=$arm task.name=$task)
        compare method.learning_rate=$rate seed=$seeds "$@"
    done
    # The control: gain curves of another task, at the rate of the task's own.
    rate=$(best capacity_smollm2 arm=gain_curves task.name=$task)
    sweep $(settings_of $task) arm=gain_curves_of_capital allocator.budget=$((305280 * rank)) \
        method.learning_rate=$rate seed=0,1,2 "$@"
done <outputs/sweeps/capacity_smollm2_settings.txt

python $here/plot.py
for which in _ranks ""; do [ ! -d outputs/sweeps/capacity_smollm2$which ] || layerif-report outputs/sweeps/capacity_smollm2$which; done
