"""The metric `lm_eval`: the same questions, and its own tasks, in the package lm-eval, which is optional."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerif.checks import did_you_mean
from layerif.data.batches import output_text, prompt_text
from layerif.data.render import Example, Template
from layerif.data.source import HubDataset
from layerif.data.task import AnyTask
from layerif.evaluate.questions import Measured, QuestionSet, questions_of, with_options
from layerif.models.blocks import context_length
from layerif.models.contexts import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerif.evaluate.evaluation import Evaluation

ZERO_SHOT = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def check(settings: Evaluation, questions: QuestionSet, max_positions: int | None) -> None:
    """Refuses what `options` refuses, a missing lm-eval, and tasks on rows that are learned or scored from."""
    questions_of(questions.examples, questions.tokenizer, questions.task.template, max_positions)
    learned = [task for task in (questions.task, questions.score_task) if task is not None]
    check_tasks(settings.lm_eval_tasks, learned)


def run(settings: Evaluation, questions: QuestionSet, model: nn.Module) -> Measured:
    """Measures the accuracy of the same questions in lm-eval, and its own tasks."""
    found = lm_eval(
        model,
        questions.tokenizer,
        with_options(questions.examples),
        name=questions.task.name,
        template=questions.task.template,
        tasks=settings.lm_eval_tasks,
        batch_size=settings.batch_size,
    )
    return Measured(found)


def lm_eval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    name: str,
    template: Template,
    tasks: Sequence[str] = (),
    batch_size: int = 16,
) -> dict[str, float]:
    """Runs lm-eval on the model in memory: the examples as a local multiple-choice task, then lm-eval's own tasks.

    lm-eval moves blanks at the end of a prompt into the options, so its log-likelihoods may differ from those of
    `option_accuracy` by a constant per question; the choices are the same. A prompt begins with BOS where it does in
    `option_accuracy`: a chat template alone decides about its prompts. lm-eval's own tasks get the chat template, too.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        examples: the questions of the local task.
        name: the name of the local task, which becomes `layerif_<name>`.
        template: the text around each instruction.
        tasks: further tasks by their names in lm-eval; `zero_shot` stands for all of ZERO_SHOT and adds their means.
        batch_size: the number of questions that the model reads at once.

    Returns:
        The metrics, named as by `harness_metrics`.

    Raises:
        ValueError: as `option_accuracy` (lm-eval itself would cut long questions), or lm-eval is not installed, does
            not know a task, or cannot read its data.
    """
    questions_of(examples, tokenizer, template, context_length(model))
    simple_evaluate, wrapped_model = _package()
    others = _spelt_out(tasks)
    # By default lm-eval seeds the whole process, and with it the training that may follow.
    unseeded: dict[str, Any] = dict.fromkeys(
        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    )
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, evaluating(model), torch.inference_mode():
        manager = _all_tasks() if others else _no_tasks()
        _refuse_unknown(others, manager.all_tasks)
        local = _local_task(Path(folder), f"layerif_{name}", examples, template, tokenizer)
        # A chat template spells BOS itself; to other prompts the tokenizer adds it by itself (None), or does not. Our
        # prompts are in the template already, so lm-eval applies it to its own tasks alone.
        is_chat = template == "chat"
        calls = [([local], False), (others, True)] if is_chat else [([local, *others], False)]
        try:
            for chosen, is_applied in calls:
                if not chosen:
                    continue
                found: Any = simple_evaluate(
                    model=wrapped_model(
                        pretrained=model,
                        tokenizer=tokenizer,
                        batch_size=batch_size,
                        add_bos_token=False if is_chat else None,
                    ),
                    tasks=chosen,
                    task_manager=manager,
                    apply_chat_template=is_applied,
                    bootstrap_iters=0,
                    log_samples=False,
                    **unseeded,
                )
                results |= found["results"]
        except OSError as error:
            raise ValueError(
                f"lm-eval cannot read the data of {others} ({error}); it fetches them from the hub: "
                "connect, fill its cache beforehand, or set evaluation.lm_eval_tasks=[]"
            ) from error
    metrics = harness_metrics(results)
    return metrics | zero_shot_means(metrics) if "zero_shot" in tasks else metrics


def harness_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Names lm-eval's results `lm_eval/<task>/<metric>` and leaves its standard errors out.

    The filter of the answers follows where there is one: `lm_eval/gsm8k/exact_match,strict-match`.
    """
    return {
        f"lm_eval/{task}/{metric.removesuffix(',none')}": float(value)
        for task, values in results.items()
        for metric, value in values.items()
        if "," in metric and "stderr" not in metric and isinstance(value, int | float)
    }


def zero_shot_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """Averages acc over the seven zero-shot tasks, and acc_norm (acc where a task has no acc_norm)."""
    acc = [metrics[f"lm_eval/{task}/acc"] for task in ZERO_SHOT]
    normed = [metrics.get(f"lm_eval/{task}/acc_norm", plain) for task, plain in zip(ZERO_SHOT, acc, strict=True)]
    return {
        "lm_eval/zero_shot_mean/acc": math.fsum(acc) / len(acc),
        "lm_eval/zero_shot_mean/acc_norm_or_acc": math.fsum(normed) / len(normed),
    }


def check_tasks(tasks: Sequence[str], learned: Sequence[AnyTask] = ()) -> None:
    """Refuses tasks that lm-eval does not know, or evaluates on rows that are learned or scored from.

    Splits are compared by the names that lm-eval's YAML and `source` give them, and nothing is fetched. Rows that two
    datasets share are not found, nor are those of a task that is written in Python.

    Args:
        tasks: names of lm-eval's tasks, tags or groups.
        learned: the tasks whose train and validation rows are learned or scored from.

    Raises:
        ValueError: names the task and the split, or says that lm-eval is not installed.
    """
    _package()
    if not tasks:
        return
    index = _all_tasks().task_index
    for name in _spelt_out(tasks):
        _refuse_unknown([name], list(index))
        for config in _configs(name, index):
            _refuse_learned(name, config, learned)


def _spelt_out(tasks: Sequence[str]) -> list[str]:
    return [task for given in tasks for task in (ZERO_SHOT if given == "zero_shot" else (given,))]


def _package() -> tuple[Any, Any]:
    """Imports lm-eval's simple_evaluate and HFLM."""
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(
            f"evaluation.metrics=[lm_eval] needs the package lm_eval ({error}); run: pip install 'layerif[lm-eval]', "
            "or leave lm_eval out"
        ) from error
    return simple_evaluate, HFLM


@cache
def _all_tasks() -> Any:
    """Reads the thousands of YAMLs of lm-eval's own tasks, which takes many seconds, once in a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _no_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def _refuse_unknown(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            raise ValueError(
                f"evaluation.lm_eval_tasks holds {task!r}, which lm-eval does not know{did_you_mean(task, known)}; "
                "`lm-eval ls tasks` lists them"
            )


def _configs(wanted: str | Mapping[str, Any], index: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields the YAML of every task that a task, tag or group of lm-eval, or a member of a group, stands for."""
    given = {"task": wanted} if isinstance(wanted, str) else {"task": "", **wanted}
    entry = index.get(given.get("group") or given["task"])
    config = {**given, **(entry.cfg or {"task": sorted(entry.tags)} if entry else {})}
    if isinstance(config["task"], str):
        yield config
    else:
        for member in config["task"]:
            yield from _configs(member, index)


def _refuse_learned(name: str, config: Mapping[str, Any], learned: Sequence[AnyTask]) -> None:
    evaluated = config.get("test_split") or config.get("validation_split")
    for task in learned:
        if not (evaluated and isinstance(task.source, HubDataset) and _is_from(task.source, config)):
            continue
        for part in ("train", "validation"):
            split = task.splits[part]
            if split and _whole(split) & _whole(evaluated):
                raise ValueError(
                    f"evaluation.lm_eval_tasks holds {name!r}: lm-eval evaluates {config['task']!r} on split "
                    f"{evaluated!r} of {task.source}, and the {part} rows of task {task.name} are from there (split "
                    f"{split!r}): scores and weights would see what they are judged by; leave {name!r} out, or name "
                    f"another split in task.splits.{part}"
                    + (" (null holds part of train out)" if part == "validation" else "")
                )


def _is_from(source: HubDataset, config: Mapping[str, Any]) -> bool:
    """Tells if both name one dataset, on any host; a dataset with a single configuration need not name it."""
    ours, theirs = (str(path).rpartition("/")[2].casefold() for path in (source.name, config.get("dataset_path")))
    configs = {source.config, config.get("dataset_name")} - {None}
    return ours == theirs and len(configs) < 2


def _whole(splits: str) -> set[str]:
    """Returns the splits behind the notation of `datasets`: `train` and `validation` for `train[:10%]+validation`."""
    return {split.partition("[")[0].strip() for split in splits.split("+")}


def _local_task(
    folder: Path, name: str, examples: Sequence[Example], template: Template, tokenizer: Any
) -> dict[str, Any]:
    """Writes the rows of a task of lm-eval, and returns its configuration."""
    rows = folder / f"{name}.jsonl"
    with rows.open("w", encoding="utf-8") as lines:
        for example in examples:
            row = {
                "prompt": prompt_text(example, template, tokenizer),
                "choices": [output_text(option, template) for option in example.options],
                "answer": example.answer,
            }
            lines.write(json.dumps(row) + "\n")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
