"""Generated answers are greedy, and the shipped patterns read them."""

import re
from typing import Any

import pytest
import torch

from layerif.data.batches import prompt_text
from layerif.data.render import answer_parser
from layerif.evaluate.generation import GeneratedAnswer, GenerationAccuracy, generation_accuracy, parse_answer
from tests.evaluate.questions import EXAMPLES, PATTERN, TOKENIZER
from tests.tiny import shipped_task, tiny_model


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_generation_is_greedy_whatever_the_batch(family):
    model = tiny_model(family)
    model.generation_config.do_sample = True  # a checkpoint's own habits must not matter
    model.generation_config.repetition_penalty = 1.5
    arguments: dict[str, Any] = {"template": "plain", "pattern": PATTERN, "max_new_tokens": 6}
    examples = EXAMPLES[:4]
    found = generation_accuracy(model, TOKENIZER, examples, batch_size=3, **arguments)
    for item, answer in zip(examples, found.answers, strict=True):
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
    with pytest.raises(ValueError, match="is not a regular expression"):
        answer_parser("(")
    with pytest.raises(ValueError, match="has no group"):
        answer_parser("Answer")
    assert parse_answer("b", re.compile("(a)|b")) is None
