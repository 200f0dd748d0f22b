"""lm-eval gives the same accuracy, and is refused on rows that are learned or scored from."""

import copy
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerif.data.render import Example
from layerif.evaluate import harness
from layerif.evaluate.evaluation import METRICS, Evaluation
from layerif.evaluate.harness import ZERO_SHOT, _configs, check_tasks, harness_metrics, lm_eval
from layerif.evaluate.options import option_accuracy
from tests.evaluate.questions import EXAMPLES, TOKENIZER, example
from tests.tiny import shipped_task, tiny_model


@pytest.mark.usefixtures("lm_eval_without_pip")
def test_lm_eval_on_the_same_questions_gives_the_same_accuracy_and_the_same_choices():
    model, chosen = tiny_model("llama"), random.Random(0)
    examples = [example(index) for index in range(12)]
    for template in ("plain", "alpaca"):
        before = torch.get_rng_state()
        ours = option_accuracy(model, TOKENIZER, examples, template=template)
        theirs = lm_eval(model, TOKENIZER, examples, name="tiny", template=template)
        assert theirs["lm_eval/layerif_tiny/acc"] == pytest.approx(ours.accuracy)
        assert torch.equal(before, torch.get_rng_state())
        # With our choices as the right answers, lm-eval must find every one of them right.
        agreed = [
            Example(item.id, item.instruction, item.options, item.labels, answer.choice)
            for item, answer in zip(examples, ours.answers, strict=True)
        ]
        chosen.shuffle(agreed)
        assert lm_eval(model, TOKENIZER, agreed, name="tiny", template=template)["lm_eval/layerif_tiny/acc"] == 1.0


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", [(["layerif_tiny", "mrpc"], False, None)]),
        ("chat", [(["layerif_tiny"], False, False), (["mrpc"], True, False)]),
    ],
)
def test_the_chat_template_is_applied_once_to_our_questions_and_to_lm_evals_own_tasks(monkeypatch, template, expected):
    calls = []

    def evaluate(*, model, tasks, apply_chat_template, **options):
        named = [task if isinstance(task, str) else task["task"] for task in tasks]
        calls.append((named, apply_chat_template, model["add_bos_token"]))
        return {"results": {}}

    monkeypatch.setattr("layerif.evaluate.harness._package", lambda: (evaluate, dict))
    monkeypatch.setattr("layerif.evaluate.harness._all_tasks", lambda: SimpleNamespace(all_tasks=["mrpc"]))
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    lm_eval(tiny_model(), tokenizer, EXAMPLES, name="tiny", template=template, tasks=["mrpc"])
    assert calls == expected


def test_lm_eval_metrics_are_kept_whatever_their_filter():
    gsm8k = {"alias": "gsm8k", "sample_len": 9, "exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75}
    errors = {"exact_match_stderr,strict-match": 0.1, "acc_stderr,none": "N/A"}
    assert harness_metrics({"gsm8k": {**gsm8k, **errors}, "rte": {"alias": "rte", "acc,none": 0.25}}) == {
        "lm_eval/gsm8k/exact_match,strict-match": 0.5,
        "lm_eval/gsm8k/exact_match,flexible-extract": 0.75,
        "lm_eval/rte/acc": 0.25,
    }


FOLDERS = ("arc", "commonsense_qa", "glue", "hellaswag", "openbookqa", "super_glue", "winogrande")


@pytest.fixture(scope="module")
def known_tasks() -> Any:
    """The part of lm-eval's own index that is asked for here: the whole of it takes many seconds to read."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folders = [Path(str(lm_eval.__file__)).parent / "tasks" / name for name in FOLDERS]
    return TaskManager(include_path=[*folders], include_defaults=False)


@pytest.fixture
def with_known_tasks(monkeypatch, known_tasks):
    """Lets the metric find these tasks, and nothing that evaluates them."""
    monkeypatch.setattr("layerif.evaluate.harness._package", lambda: (None, None))
    monkeypatch.setattr("layerif.evaluate.harness._all_tasks", lambda: known_tasks)


@pytest.mark.usefixtures("with_known_tasks")
def test_a_task_that_lm_eval_does_not_know_is_refused_with_and_without_a_model():
    unknown = pytest.raises(ValueError, match=r"'arc_easi', which lm-eval does not know \(did you mean 'arc_easy'")
    with unknown:
        lm_eval(tiny_model(), TOKENIZER, EXAMPLES, name="tiny", template="plain", tasks=["arc_easi"])
    with unknown:
        evaluation = Evaluation(metrics=["lm_eval"], lm_eval_tasks=["arc_easi"])
        evaluation.check(TOKENIZER, EXAMPLES, shipped_task("capital"), None)


def test_lm_eval_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'layerif\[lm-eval\]', or leave"):
        lm_eval(tiny_model(), TOKENIZER, EXAMPLES, name="tiny", template="plain")


@pytest.mark.usefixtures("with_known_tasks")
@pytest.mark.parametrize(
    ("tasks", "overrides", "score_task", "message"),
    [
        # lm-eval's mrpc has no test split, and evaluates where ours takes validation rows.
        (["mrpc"], ["task=mrpc"], None, r"'mrpc' on split 'validation' of nyu-mll/glue/mrpc, .* \(null holds part of"),
        (["mrpc"], ["task=mrpc", "task.path=/a/copy"], None, "the validation rows of task mrpc are from there"),
        (["mrpc"], ["task=mrpc", 'task.splits.validation="validation[:50%]"'], None, "are from there"),
        (["arc_easy", "glue"], ["task=mrpc"], None, r"holds 'glue': lm-eval evaluates 'mrpc'.*leave 'glue' out"),
        (["mrpc"], ["task=capital"], "mrpc", "the validation rows of task mrpc are from there"),
        (
            ["openbookqa"],
            ["task=openbookqa", "task.splits.train=test", "task.splits.test=train"],
            None,
            "the train rows",
        ),
        (
            ["zero_shot"],
            ["task=openbookqa", "task.splits.validation=test", "task.splits.test=validation"],
            None,
            "from",
        ),
        (["mrpc"], ["task=mrpc", "task.splits.validation=null"], None, None),
        (["zero_shot", "commonsense_qa", "cola"], ["task=mrpc"], None, None),
        (["commonsense_qa"], ["task=commonsense_qa"], "openbookqa", None),  # it evaluates what is our test split, too
    ],
)
def test_tasks_of_lm_eval_on_rows_that_are_learned_are_refused(tasks, overrides, score_task, message):
    chosen, *changed = overrides
    task = shipped_task(chosen.removeprefix("task="), *changed)
    scored = shipped_task(score_task) if score_task else None
    evaluation = Evaluation(metrics=["lm_eval"], lm_eval_tasks=tasks)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        evaluation.check(TOKENIZER, EXAMPLES, task, None, score_task=scored)


@pytest.mark.slow
def test_every_task_of_lm_eval_stands_for_some_and_an_unknown_one_is_refused():
    known_tasks = harness._all_tasks()
    assert set(ZERO_SHOT) < set(known_tasks.all_tasks)
    with pytest.raises(ValueError, match=r"'arc_easi', which lm-eval does not know \(did you mean 'arc_easy'"):
        check_tasks(["arc_easi"])
    assert all(any(True for _ in _configs(name, known_tasks.task_index)) for name in known_tasks.all_tasks)
    assert harness._all_tasks() is harness._all_tasks()


def test_a_missing_lm_eval_is_known_without_a_model_and_only_where_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)  # as if it were not installed
    task = shipped_task("capital")
    Evaluation(metrics=("options", "generation", "perplexity")).check(TOKENIZER, EXAMPLES, task, None)
    with pytest.raises(ValueError, match=r"pip install 'layerif\[lm-eval\]', or leave"):
        Evaluation(metrics=tuple(METRICS)).check(TOKENIZER, EXAMPLES, task, None)
