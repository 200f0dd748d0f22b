"""An evaluation runs its metrics, and refuses beforehand what they would refuse."""

import pytest

from layerif.data.render import Example
from layerif.evaluate.evaluation import METRICS, Evaluation
from tests.evaluate.questions import EXAMPLES, TOKENIZER
from tests.tiny import shipped_task, tiny_model


@pytest.fixture(autouse=True)
def with_a_short_text(monkeypatch):
    monkeypatch.setattr("layerif.data.text.documentation_text", lambda part: f"Words of {part}. " * 100)


@pytest.mark.usefixtures("lm_eval_without_pip")
def test_an_evaluation_runs_what_it_is_asked_for():
    task = shipped_task("capital", "task.template=plain", "task.num_test=4")
    examples = task.load().test
    evaluation = Evaluation(metrics=tuple(METRICS), max_new_tokens=3, window=512)
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


def test_an_unknown_metric_is_refused_with_the_nearest():
    message = r"evaluation\.metrics='option' is not allowed; allowed: options, .* \(did you mean 'options'\?\)"
    with pytest.raises(ValueError, match=message):
        Evaluation(metrics=["option"])


@pytest.mark.parametrize(
    ("fields", "examples", "max_positions", "message"),
    [
        ({"metrics": ["options"]}, [EXAMPLES[6]], 32, r"question q6 takes \d+ tokens .* at most 32"),
        ({"metrics": ["lm_eval"]}, [EXAMPLES[6]], 32, r"question q6 takes \d+ tokens .* at most 32"),
        ({"metrics": ["generation"]}, [EXAMPLES[0]], 100, r"question q0 takes \d+ tokens .* at most 100"),
        ({"metrics": ["options"]}, [Example("q", "What?", ("a", "a"), ("a", "b"), 0)], None, "become the same tokens"),
        ({"metrics": ["options"]}, [Example("q", "What?", ("a",), ("a",), 0)], None, "question q has one option, 'a'"),
        ({"metrics": ["options"]}, [], None, "at least one example"),
        ({"metrics": ["perplexity"], "window": 10**6}, EXAMPLES, None, "the text has .* use evaluation.window<="),
        ({"metrics": ["perplexity"], "window": 64}, EXAMPLES, 32, "evaluation.window=64 .* at most 32"),
    ],
)
def test_what_an_evaluation_would_refuse_is_known_without_a_model(fields, examples, max_positions, message):
    task = shipped_task("capital", "task.template=plain")
    with pytest.raises(ValueError, match=message):
        Evaluation(**fields).check(TOKENIZER, examples, task, max_positions)
