"""A model reads BOS once, at the start, where the tokenizer adds it or the chat template spells it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from layerif.data.batches import encode
from layerif.data.render import Example
from layerif.data.rows import example_of
from layerif.data.task import Splits
from layerif.data.tokens import token_ids
from layerif.evaluate import harness
from layerif.evaluate.generation import generation_accuracy
from layerif.evaluate.harness import lm_eval
from layerif.evaluate.options import option_accuracy
from layerif.evaluate.questions import questions_of
from layerif.models.loaded import Loaded
from layerif.probe.measurements import Measurements
from layerif.probe.settings import Probe
from layerif.probe.store import Unstored
from tests.evaluate.questions import EXAMPLES, PATTERN
from tests.tiny import tiny_model, tiny_tokenizer

TALK = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# By name: the template of the task, the tokenizer's chat template, and if a prompt begins with BOS.
ASKED: dict[str, tuple[Any, str | None, bool]] = {
    "plain": ("plain", None, True),
    "alpaca": ("alpaca", None, True),
    "chat with BOS": ("chat", "{{ bos_token }}" + TALK, True),
    "chat without BOS": ("chat", TALK, False),
}
EACH = pytest.mark.parametrize("asked", ASKED)


def given(asked):
    template, chat, begins = ASKED[asked]
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = chat
    return tokenizer, template, begins


def begins_once(ids, tokenizer, begins) -> bool:
    """Tells if ids hold BOS as often as they should, and at their start."""
    return list(ids).count(tokenizer.bos_token_id) == begins and (ids[0] == tokenizer.bos_token_id) == begins


def first_read(model: nn.Module) -> list[Any]:
    """Collects the token ids of every pass of a model."""
    read: list[Any] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].tolist()))  # type: ignore[operator]
    return read


@EACH
def test_options_and_generation_read_prompts_that_begin_with_bos_once(asked):
    tokenizer, template, begins = given(asked)
    for measure in (
        lambda model: option_accuracy(model, tokenizer, EXAMPLES, template=template),
        lambda model: generation_accuracy(
            model, tokenizer, EXAMPLES, template=template, pattern=PATTERN, max_new_tokens=2
        ),
    ):
        model = tiny_model()
        read = first_read(model)
        measure(model)
        assert len(read[0]) == len(EXAMPLES)  # the first pass reads the prompts, padded at their left with </s>
        for row in read[0]:
            ids = row[next(at for at, id in enumerate(row) if id != tokenizer.pad_token_id) :]
            assert begins_once(ids, tokenizer, begins)


@EACH
@pytest.mark.usefixtures("lm_eval_without_pip")
def test_lm_eval_reads_the_same_tokens_as_options(asked, monkeypatch):
    tokenizer, template, begins = given(asked)
    _, wrapped = harness._package()
    read, whole = [], wrapped._loglikelihood_tokens

    def collected(self, requests, **options):
        read.extend((tuple(prompt) + tuple(option)) for _, prompt, option in requests)
        return whole(self, requests, **options)

    monkeypatch.setattr(wrapped, "_loglikelihood_tokens", collected)
    found = lm_eval(tiny_model(), tokenizer, EXAMPLES, name="tiny", template=template)
    ours = option_accuracy(tiny_model(), tokenizer, EXAMPLES, template=template)
    assert found["lm_eval/layerif_tiny/acc"] == pytest.approx(ours.accuracy)
    asked_of_us = [
        (*question.prompt, *option)
        for question in questions_of(EXAMPLES, tokenizer, template, None)
        for option in question.options
    ]
    assert sorted(read) == sorted(asked_of_us)
    assert all(begins_once(ids, tokenizer, begins) for ids in read)


ROWS = {
    "text": "a text of some words",
    "prompt": {"prompt": "two plus two", "completion": " four"},
    "messages": {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four"}]},
}


@EACH
def test_rows_of_the_probe_and_of_fine_tuning_begin_with_bos_once(asked):
    tokenizer, template, begins = given(asked)
    kinds = ROWS if tokenizer.chat_template else {kind: row for kind, row in ROWS.items() if kind != "messages"}
    rows = [example_of(row, id=kind, where=kind) for kind, row in kinds.items()]
    probe = Probe(template=template, num_train=9, num_validation=9)
    splits = Splits(train=(*rows, *EXAMPLES[:2]), validation=tuple(EXAMPLES[2:5]), test=())
    measured = Measurements(
        model=Loaded(tiny_model()), tokenizer=tokenizer, splits=splits, probe=probe, store=Unstored()
    )
    samples = [sample for part in measured.samples() for sample in part]
    samples += encode([*rows, *EXAMPLES], tokenizer, template=template, max_length=None, eos=True)
    expected = [begins or kind == "text" for kind in kinds]  # a text has no template around it
    assert len(samples) == 2 * len(rows) + 5 + len(EXAMPLES)
    for sample, once in zip(samples, [*expected, *[begins] * 5, *expected, *[begins] * len(EXAMPLES)], strict=True):
        assert begins_once(sample.input_ids, tokenizer, once)


def test_a_row_that_spells_bos_itself_does_not_get_a_second_one():
    tokenizer = tiny_tokenizer(bos=True)
    spelt = Example("q", "<s>Question: what?\n", ("Answer: Paris.", "Answer: Rome."), ("Paris", "Rome"), 0)
    plain = Example("q", "Question: what?\n", *(spelt.options, spelt.labels, 0))
    asked = [questions_of([each], tokenizer, "plain", None)[0] for each in (spelt, plain)]
    assert asked[0] == asked[1]
    rows = [example_of({"prompt": f"{bos}two plus", "completion": " two"}, id="7", where="7") for bos in ("<s>", "")]
    first, second = encode(rows, tokenizer, template="plain", max_length=None, eos=False)
    assert first == second
    assert first.input_ids == token_ids(tokenizer, ["two plus two"])[0]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("alpaca", [(None, False, ["ours", "arc_easy"])]),
        ("chat with BOS", [(False, False, ["ours"]), (False, True, ["arc_easy"])]),
    ],
)
def test_a_chat_template_decides_about_bos_and_stands_around_prompts_once(asked, expected, monkeypatch):
    tokenizer, template, _ = given(asked)
    calls = []

    def evaluated(*, model, tasks, apply_chat_template, **_):
        names = ["ours" if isinstance(each, dict) else each for each in tasks]
        calls.append((model["add_bos_token"], apply_chat_template, names))
        return {"results": {name: {"acc,none": 0.5} for name in names}}

    monkeypatch.setattr(harness, "_package", lambda: (evaluated, dict))
    monkeypatch.setattr(harness, "_all_tasks", lambda: SimpleNamespace(all_tasks=["arc_easy"]))
    found = lm_eval(tiny_model(), tokenizer, EXAMPLES, name="tiny", template=template, tasks=["arc_easy"])
    assert calls == expected
    assert found == {"lm_eval/ours/acc": 0.5, "lm_eval/arc_easy/acc": 0.5}
