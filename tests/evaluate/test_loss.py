"""The loss of a row is −ln p of what should be said, whichever way it is measured."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from layerif.data.batches import Encoded
from layerif.data.render import Example
from layerif.evaluate import loss, options
from layerif.evaluate.evaluation import METRICS, Evaluation
from layerif.evaluate.loss import frequency_losses, row_losses
from layerif.evaluate.options import OptionAnswer
from tests.evaluate.questions import EXAMPLES, TOKENIZER
from tests.evaluate.test_options import reference
from tests.tiny import shipped_task, tiny_model

ONE_OUTPUT = [Example(one.id, one.instruction, (one.output,), (one.labels[one.answer],), 0) for one in EXAMPLES]


def task():
    return shipped_task("capital", "task.template=plain")


def test_the_loss_of_a_row_counts_the_tokens_from_its_start_on_and_no_other():
    model, rng = tiny_model("llama"), np.random.default_rng(0)
    lengths = [(9, 0), (5, 3), (12, 11), (2, 0), (7, 1)]
    rows = [Encoded(tuple(rng.integers(3, 250, size).tolist()), start, loss_from=start) for size, start in lengths]
    for batch_size in (1, 3):
        for row, found in zip(rows, row_losses(model, rows, 1, batch_size=batch_size), strict=True):
            ids = torch.tensor([row.input_ids])
            with torch.no_grad():
                log_probs = model(ids).logits[0].log_softmax(-1)
            counted = range(max(row.loss_from, 1), len(row))
            expected = -sum(float(log_probs[t - 1, ids[0, t]]) for t in counted)
            assert (found.total, found.num_tokens) == (pytest.approx(expected, abs=1e-4), len(counted))
            assert found.mean == found.total / found.num_tokens


def test_of_multiple_choice_it_is_the_right_options_and_the_margin_its_lead():
    model = tiny_model("llama")
    found = Evaluation(metrics=["loss"]).run(model, TOKENIZER, EXAMPLES, task())
    for one, values in zip(EXAMPLES, reference(model, EXAMPLES, "plain"), strict=True):
        num_tokens = len(TOKENIZER(" " + one.output).input_ids)
        best_wrong = max(value for option, value in enumerate(values) if option != one.answer)
        assert found.losses["loss_sum"][one.id] == pytest.approx(-values[one.answer], abs=2e-5)
        assert found.losses["loss"][one.id] == pytest.approx(-values[one.answer] / num_tokens, abs=2e-5)
        assert found.losses["margin"][one.id] == pytest.approx(values[one.answer] - best_wrong, abs=4e-5)
    for name, rows in found.losses.items():
        low, high = stats.t.interval(0.95, len(rows) - 1, np.mean(list(rows.values())), stats.sem(list(rows.values())))
        bounds = [found.metrics[f"{name}{end}"] for end in ("", "_low", "_high")]
        assert bounds == pytest.approx([np.mean(list(rows.values())), low, high])


def test_a_row_with_one_output_has_the_loss_that_it_has_as_an_option():
    model, evaluation = tiny_model("llama"), Evaluation(metrics=["loss"])
    as_options = evaluation.run(model, TOKENIZER, EXAMPLES, task())
    alone = evaluation.run(model, TOKENIZER, ONE_OUTPUT, task())
    assert set(alone.losses) == {"loss", "loss_sum"}
    for name, rows in alone.losses.items():
        assert rows == pytest.approx(as_options.losses[name], abs=4e-5)
    assert alone.context_free == pytest.approx(as_options.context_free)


def test_a_right_answer_has_a_positive_margin():
    for values, answer in (((-4.0, -5.0, -1.0), 2), ((-4.0, -5.0, -1.0), 0), ((-1.0, -9.0), 0)):
        one = OptionAnswer("0", answer, values, (1,) * len(values))
        assert one.correct == (one.margin > 0)


@pytest.mark.parametrize(("examples", "metrics"), [(EXAMPLES, ("options", "loss")), (ONE_OUTPUT, ("loss",))])
def test_rows_with_options_are_measured_by_options_and_loss_and_others_by_loss(examples, metrics):
    assert Evaluation().metrics_on(examples) == metrics
    Evaluation().check(TOKENIZER, examples, task(), None)
    assert Evaluation(metrics=["perplexity", "options"]).metrics_on(examples) == ("options", "perplexity")


def test_options_and_loss_share_one_pass(monkeypatch):
    passes, measure = [], options.option_accuracy
    monkeypatch.setattr(options, "option_accuracy", lambda *of, **how: passes.append(1) or measure(*of, **how))
    models = [tiny_model("llama", num_hidden_layers=1, seed=seed) for seed in (0, 1)]
    found = [Evaluation().run(model, TOKENIZER, EXAMPLES[:3], task()).losses["loss"] for model in models]
    assert len(passes) == 2
    assert found[0] != found[1]


@pytest.mark.parametrize("examples", [EXAMPLES, ONE_OUTPUT])
def test_what_has_no_finite_loss_or_does_not_fit_is_refused_by_its_id(examples):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[5] = math.nan
    with pytest.raises(ValueError, match=r"(row|question) q\d: .* not finite; use a wider dtype"):
        Evaluation(metrics=["loss"]).run(model, TOKENIZER, examples, task())
    with pytest.raises(ValueError, match=r"question q6 takes \d+ tokens .* at most 32"):
        Evaluation(metrics=["loss"]).check(TOKENIZER, examples[6:], task(), 32)
    with pytest.raises(ValueError, match="at least one example"):
        Evaluation(metrics=["loss"]).check(TOKENIZER, [], task(), None)


def test_a_guess_by_frequencies_is_the_entropy_of_the_tokens():
    rows = [(1, 2, 2), (3,), (2, 1, 1, 1)]
    shares = np.array(list(Counter(token for row in rows for token in row).values())) / 8
    found = frequency_losses(rows)
    assert np.average(found, weights=[3, 1, 4]) == pytest.approx(-(shares * np.log(shares)).sum())
    assert found[1] == pytest.approx(math.log(8))
    assert METRICS["loss"] is loss
