import math
import random
import re
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from layerif.data.batches import output_text, prompt_text
from layerif.data.render import Example, Template, answer_parser
from layerif.evaluate.evaluation import Evaluation
from layerif.evaluate.generation import GeneratedAnswer, GenerationAccuracy, generation_accuracy, parse_answer
from layerif.evaluate.harness import _configs, lm_eval, metrics_of
from layerif.evaluate.options import OptionAnswer, option_accuracy
from layerif.evaluate.perplexity import perplexity
from layerif.stats import wilson
from tests.tiny import FAMILIES, shipped_task, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PATTERN = r"Answer: (\w+)"
ALL_METRICS = ("options", "generation", "perplexity", "lm_eval")


def example(index: int) -> Example:
    """Two to four options of different lengths; prompts from short to past the tiny models' sliding window of 16."""
    labels = ("Paris", "Rome", "a much longer one", "x")[: 2 + index % 3]
    options = tuple(f"Answer: {label}." for label in labels)
    return Example(f"q{index}", f"Question: {'what' + ' of it' * (3 * index % 11)}?\n", options, labels, index % 2)


EXAMPLES = [example(index) for index in range(7)]


def reference(model, examples, template: Template, tokenizer=TOKENIZER) -> list[list[float]]:
    """ln p(option | prompt), one option at a time, without padding or cache."""
    values = []
    for item in examples:
        prompt = tokenizer(prompt_text(item, template)).input_ids
        values.append([])
        for option in item.options:
            ids = tokenizer(prompt_text(item, template) + output_text(option, template)).input_ids
            assert ids[: len(prompt)] == prompt
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            values[-1].append(sum(log_probs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))))
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_option_likelihoods_equal_one_option_at_a_time(family):
    # Not in double: eager attention masks with the lowest double and takes its softmax in single, so padding turns NaN.
    model = tiny_model(family)
    for template in ("plain", "alpaca"):
        expected = reference(model, EXAMPLES, template)
        for batch_size in (1, 3):
            found = option_accuracy(model, TOKENIZER, EXAMPLES, template=template, batch_size=batch_size)
            assert [answer.id for answer in found.answers] == [item.id for item in EXAMPLES]
            for answer, values in zip(found.answers, expected, strict=True):
                assert answer.log_likelihoods == pytest.approx(values, abs=2e-5)
                assert answer.choice == max(range(len(values)), key=values.__getitem__)


def test_option_likelihoods_with_sdpa_and_a_tokenizer_that_adds_bos():
    tokenizer, model = tiny_tokenizer(bos=True), tiny_model("llama", attn_implementation="sdpa")
    found = option_accuracy(model, tokenizer, EXAMPLES, template="plain", batch_size=4)
    for answer, values in zip(found.answers, reference(model, EXAMPLES, "plain", tokenizer), strict=True):
        assert answer.log_likelihoods == pytest.approx(values, abs=1e-4)


class Merging:
    """A tokenizer of single characters, except that a newline, a blank and a p are one token."""

    eos_token_id, pad_token_id = 1, 1

    def __call__(self, texts, **_):
        return {"input_ids": [[3 + ord(c) % 200 for c in text.replace("\n p", "~")] for text in texts]}


def test_a_token_across_the_end_of_the_prompt_counts_for_every_option():
    crossing = Example("0", "Q?\n", ("pa", "ra"), ("pa", "ra"), 0)
    answer = option_accuracy(tiny_model("llama"), Merging(), [crossing], template="plain").answers[0]  # type: ignore[arg-type]
    assert answer.num_tokens == (len(["\n p", "a"]), len(["\n", " ", "r", "a"]))


def test_choices_by_sum_and_per_token_can_differ_and_ties_go_to_the_first():
    answer = OptionAnswer("0", 1, (-4.0, -5.0), (2, 5))
    assert (answer.choice, answer.choice_per_token, answer.correct) == (0, 1, False)
    assert OptionAnswer("0", 0, (-1.0, -1.0), (1, 1)).choice == 0


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


def test_lm_eval_metrics_are_kept_whatever_their_filter():
    gsm8k = {"alias": "gsm8k", "sample_len": 9, "exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75}
    errors = {"exact_match_stderr,strict-match": 0.1, "acc_stderr,none": "N/A"}
    assert metrics_of({"gsm8k": {**gsm8k, **errors}, "rte": {"alias": "rte", "acc,none": 0.25}}) == {
        "lm_eval/gsm8k/exact_match,strict-match": 0.5,
        "lm_eval/gsm8k/exact_match,flexible-extract": 0.75,
        "lm_eval/rte/acc": 0.25,
    }


def test_lm_eval_names_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"'arc_easi', which lm-eval does not know \(did you mean 'arc_easy'"):
        lm_eval(tiny_model(), TOKENIZER, EXAMPLES, name="tiny", template="plain", tasks=["arc_easi"])
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'layerif\[lm-eval\]'"):
        lm_eval(tiny_model(), TOKENIZER, EXAMPLES, name="tiny", template="plain")


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_generation_is_greedy_whatever_the_batch(family):
    model = tiny_model(family)
    model.generation_config.do_sample = True  # a checkpoint's own habits must not matter
    model.generation_config.repetition_penalty = 1.5
    arguments: dict[str, Any] = {"template": "plain", "pattern": PATTERN, "max_new_tokens": 6}
    found = generation_accuracy(model, TOKENIZER, EXAMPLES, batch_size=3, **arguments)
    for item, answer in zip(EXAMPLES, found.answers, strict=True):
        ids = TOKENIZER(prompt_text(item, "plain")).input_ids
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != TOKENIZER.eos_token_id:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.text == TOKENIZER.decode(ids[start:], skip_special_tokens=True)
        assert answer.id == item.id


def test_the_unparsable_is_wrong_and_counted():
    answers = (
        GeneratedAnswer("0", "B", "Answer: The answer is B.", "B"),
        GeneratedAnswer("1", "B", "no idea", None),
        GeneratedAnswer("2", "B", "Answer: The answer is A.", "A"),
    )
    found = GenerationAccuracy(answers)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.num_unparsable == 1
    assert found.metrics()["generation_unparsable"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("openbookqa", "Answer: The answer is B. The answer is C.", "B"),
        ("openbookqa", "Answer: B", None),
        ("mrpc", "Answer: not equivalent.", "not equivalent"),
        ("cola", "Answer: acceptable", "acceptable"),
        ("capital", "Answer: Paris.", "Paris"),
        ("capital", "Answer: Washington D.C..\nMore", "Washington D.C."),
        ("capital", " Answer: Guinea-Bissau \n", "Guinea-Bissau"),
    ],
)
def test_the_shipped_patterns(task, text, expected):
    assert parse_answer(text, answer_parser(shipped_task(task).pattern)) == expected


@pytest.mark.parametrize("task", ["capital", "region", "currency", "demonym"])
def test_every_right_output_is_parsed_as_its_label(task):
    shipped = shipped_task(task)
    for item in shipped.load().test:
        assert parse_answer(item.output, answer_parser(shipped.pattern)) == item.labels[item.answer]


def test_a_pattern_needs_to_be_an_expression_with_a_group():
    with pytest.raises(ValueError, match="is no regular expression"):
        answer_parser("(")
    with pytest.raises(ValueError, match="has no group"):
        answer_parser("Answer")
    assert parse_answer("b", re.compile("(a)|b")) is None


def test_perplexity_equals_its_definition_window_by_window():
    model, ids = tiny_model("llama").double(), [3 + 7 * k % 200 for k in range(47)]
    losses = []
    for start in (0, 10, 20, 30):  # the last 7 tokens fill no window
        window = torch.tensor([ids[start : start + 10]])
        with torch.no_grad():
            log_probs = model(window).logits[0].log_softmax(-1)
        losses += [-log_probs[t - 1, window[0, t]].item() for t in range(1, 10)]
    expected = math.exp(sum(losses) / len(losses))
    for batch_size in (1, 3):
        assert perplexity(model, ids, window=10, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"window=48 is too long: the text has 47 tokens; use evaluation\.window<=47"):
        perplexity(model, ids, window=48)
    with pytest.raises(ValueError, match=r"the model reads at most 16 tokens; use evaluation\.window<=16"):
        perplexity(tiny_model("opt", max_position_embeddings=16), ids, window=20)


def test_a_loss_that_is_not_finite_has_no_perplexity():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"its mean token loss is [0-9.]+; weights"):
        perplexity(model, list(range(100)), window=20)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match="no finite perplexity: its mean token loss is nan"):
        perplexity(model, list(range(100)), window=20)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight").zero_()
    assert perplexity(model, list(range(100)), window=20) == pytest.approx(256, rel=1e-5)


def test_wilson_interval_matches_its_formula():
    for k, n in ((0, 10), (7, 75), (75, 75)):
        z, p = 1.959963984540054, k / n
        centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        expected = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
        assert wilson(k, n) == pytest.approx(expected, abs=1e-9)


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    model.get_submodule("model.layers.1").eval()
    modes = [module.training for module in model.modules()]
    option_accuracy(model, TOKENIZER, EXAMPLES, template="plain")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[5] = math.nan
    with pytest.raises(ValueError, match="log-likelihoods of its options"):
        option_accuracy(model, TOKENIZER, EXAMPLES, template="plain")
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_questions_that_cannot_be_scored_say_why():
    model = tiny_model("llama", max_position_embeddings=32)
    with pytest.raises(ValueError, match=r"question q6 takes \d+ tokens .* at most 32"):
        option_accuracy(model, TOKENIZER, [EXAMPLES[6]], template="alpaca")
    with pytest.raises(ValueError, match=r"question q0 takes \d+ tokens .* at most 32"):
        generation_accuracy(model, TOKENIZER, [EXAMPLES[0]], template="plain", pattern=PATTERN)
    with pytest.raises(ValueError, match="become the same tokens"):
        option_accuracy(model, TOKENIZER, [Example("q", "What?", ("a", "a"), ("a", "b"), 0)], template="plain")
    with pytest.raises(ValueError, match="at least one example"):
        option_accuracy(model, TOKENIZER, [], template="plain")
    with pytest.raises(ValueError, match="empty prompt"):
        option_accuracy(model, TOKENIZER, [Example("q", "", ("a", "b"), ("a", "b"), 0)], template="plain")


def test_an_evaluation_runs_what_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("layerif.data.text.documentation_text", lambda part: f"Words of {part}. " * 100)
    task = shipped_task("capital", "task.template=plain", "task.num_test=4")
    examples = task.load().test
    evaluation = Evaluation(metrics=ALL_METRICS, max_new_tokens=3, window=512)
    evaluation.check(TOKENIZER, examples, task, 512)
    model = tiny_model("llama", num_hidden_layers=1)
    result = evaluation.run(model, TOKENIZER, examples, task)
    assert {
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "accuracy_per_token",
        "generation_accuracy",
        "perplexity_512",
    } <= set(result.metrics)
    assert result.metrics["lm_eval/layerif_capital/acc"] == result.metrics["accuracy"]
    for answers in result.answers.values():
        assert [answer.id for answer in answers] == [item.id for item in examples]
    assert result.metrics == evaluation.run(model, TOKENIZER, examples, task).metrics
    assert set(Evaluation().run(model, TOKENIZER, examples, task).answers) == {"options"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ["option"]}, "holds 'option' .did you mean 'options'.*use any of options, generation, perplexity"),
        ({"batch_size": 0}, "evaluation.batch_size=0; use 1 or more"),
        ({"max_new_tokens": 0}, "evaluation.max_new_tokens=0; use 1 or more"),
        ({"window": 1}, "evaluation.window=1; use 2 or more"),
    ],
)
def test_a_wrong_evaluation_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**fields)


@pytest.mark.parametrize(
    ("fields", "examples", "max_positions", "message"),
    [
        ({"metrics": ["options"]}, [EXAMPLES[6]], 32, r"question q6 takes \d+ tokens .* at most 32"),
        ({"metrics": ["lm_eval"]}, [EXAMPLES[6]], 32, r"question q6 takes \d+ tokens .* at most 32"),
        ({"metrics": ["generation"]}, [EXAMPLES[0]], 100, r"question q0 takes \d+ tokens .* at most 100"),
        ({"metrics": ["options"]}, [Example("q", "What?", ("a", "a"), ("a", "b"), 0)], None, "become the same tokens"),
        ({"metrics": ["options"]}, [], None, "at least one example"),
        ({"metrics": ["perplexity"], "window": 10**6}, EXAMPLES, None, "the text has .* use evaluation.window<="),
        ({"metrics": ["perplexity"], "window": 64}, EXAMPLES, 32, "evaluation.window=64 .* at most 32"),
        ({"metrics": ["lm_eval"], "lm_eval_tasks": ["arc_easi"]}, EXAMPLES, None, "did you mean 'arc_easy'"),
    ],
)
def test_what_an_evaluation_would_refuse_is_known_without_a_model(fields, examples, max_positions, message):
    task = shipped_task("capital", "task.template=plain")
    with pytest.raises(ValueError, match=message):
        Evaluation(**fields).check(TOKENIZER, examples, task, max_positions)


@pytest.fixture(scope="module")
def known_tasks() -> Any:
    """lm-eval's own index, read once: it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


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
def test_tasks_of_lm_eval_on_rows_that_are_learned_are_refused(
    known_tasks, monkeypatch, tasks, overrides, score_task, message
):
    monkeypatch.setattr("layerif.evaluate.harness._package", lambda: (None, None, lambda: known_tasks))
    chosen, *changed = overrides
    task = shipped_task(chosen.removeprefix("task="), *changed)
    scored = shipped_task(score_task) if score_task else None
    evaluation = Evaluation(metrics=["lm_eval"], lm_eval_tasks=tasks)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        evaluation.check(TOKENIZER, EXAMPLES, task, None, score_task=scored)


def test_every_task_of_lm_eval_stands_for_some(known_tasks):
    assert all(any(True for _ in _configs(name, known_tasks.task_index)) for name in known_tasks.all_tasks)


def test_a_missing_lm_eval_is_known_without_a_model_and_only_where_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)  # as if it were not installed
    task = shipped_task("capital")
    Evaluation(metrics=("options", "generation", "perplexity")).check(TOKENIZER, EXAMPLES, task, None)
    with pytest.raises(ValueError, match=r"pip install 'layerif\[lm-eval\]'"):
        Evaluation(metrics=ALL_METRICS).check(TOKENIZER, EXAMPLES, task, None)
