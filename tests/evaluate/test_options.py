"""The likelihoods of options equal those of one option at a time, for every architecture and batch size."""

import math

import pytest
import torch

from layerif.data.batches import output_text, prompt_text
from layerif.data.render import Example, Template
from layerif.evaluate.generation import generation_accuracy
from layerif.evaluate.options import OptionAnswer, option_accuracy
from layerif.stats import wilson
from tests.evaluate.questions import EXAMPLES, PATTERN, TOKENIZER
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer


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


@pytest.mark.parametrize(("family", "template"), [*((family, "plain") for family in FAMILIES), ("llama", "alpaca")])
def test_option_likelihoods_equal_one_option_at_a_time(family, template):
    # Not in double: eager attention masks with the lowest double and takes its softmax in single, so padding turns NaN.
    model, examples = tiny_model(family), EXAMPLES[:4]
    expected = reference(model, examples, template)
    for batch_size in (1, 3):
        found = option_accuracy(model, TOKENIZER, examples, template=template, batch_size=batch_size)
        assert [answer.id for answer in found.answers] == [item.id for item in examples]
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
    with pytest.raises(ValueError, match="become the same tokens; word them differently"):
        option_accuracy(model, TOKENIZER, [Example("q", "What?", ("a", "a"), ("a", "b"), 0)], template="plain")
    with pytest.raises(ValueError, match="at least one example"):
        option_accuracy(model, TOKENIZER, [], template="plain")
    with pytest.raises(ValueError, match="empty prompt"):
        option_accuracy(model, TOKENIZER, [Example("q", "", ("a", "b"), ("a", "b"), 0)], template="plain")
