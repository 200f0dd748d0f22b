"""Rows without options: their kinds, the tokens that count, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from layerif.data.batches import IGNORED, collate, encode
from layerif.data.rows import ChatExample, CompletionExample, TextExample, TokenExample, example_of
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "two plus two"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and one"},
    {"role": "assistant", "content": "five"},
]


def chatting(template) -> Any:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def row(given, **options):
    return example_of(given, id="7", where="row 7", **options)


def encoded(given, tokenizer: Any = TOKENIZER, *, template: Any = "plain", max_length=None, loss_on=None, eos=False):
    example = row(given)
    return encode([example], tokenizer, template=template, max_length=max_length, loss_on=loss_on, eos=eos)[0]


def counted(sample, tokenizer: Any = TOKENIZER):
    return tokenizer.decode([label for label in sample.labels if label != IGNORED], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("a text", TextExample),
        ({"text": "a text", "source": 3}, TextExample),
        ({"prompt": "p", "completion": "c", "id": 1}, CompletionExample),
        ({"prompt": TALK[:1], "completion": TALK[1:2]}, ChatExample),
        ({"messages": TALK}, ChatExample),
        ({"input_ids": [1, 2, 3]}, TokenExample),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}, TokenExample),
    ],
)
def test_a_kind_of_row_is_known_by_its_columns(given, kind):
    assert type(row(given)) is kind


def test_the_loss_counts_what_the_kind_of_row_says_and_loss_on_stands_over_it():
    text, prompt = {"text": "a long text"}, {"prompt": "two plus", "completion": " two"}
    assert counted(encoded(text)) == counted(encoded(text, loss_on="output")) == "a long text"
    assert counted(encoded(prompt)) == " two"
    assert counted(encoded(prompt, loss_on="all")) == "two plus two"
    assert counted(encoded(prompt, eos=True)) == " two"
    assert encoded(prompt, eos=True).labels[-1] == TOKENIZER.eos_token_id
    ids = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}
    assert encoded(ids, None).labels == (-100, 6, -100, 8)
    assert encoded(ids, None, loss_on="all").labels == (5, 6, 7, 8)


def test_a_conversation_counts_what_its_template_marks_and_everything_where_it_marks_nothing():
    marked, plain = chatting(MARKED), chatting(PLAIN)
    assert counted(encoded({"messages": TALK}, marked), marked) == "fourfive"
    assert counted(encoded({"messages": TALK}, marked, loss_on="all"), marked).startswith("<user>two")
    assert counted(encoded({"messages": TALK}, plain), plain).startswith("<user>two")
    assert counted(encoded({"messages": TALK}, plain, loss_on="output"), plain) == "five"
    assert counted(encoded({"prompt": TALK[:3], "completion": TALK[3:]}, plain), plain) == "five"
    cut = encoded({"messages": TALK}, marked, max_length=len(encoded({"messages": TALK[:2]}, marked)))
    assert counted(cut, marked) == "four"
    assert cut.is_truncated


def test_tokens_that_a_mask_hides_are_not_part_of_the_row():
    padded = {"input_ids": [1, 1, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 6, 7]}
    assert encoded(padded, None) == encoded({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, None)
    assert row({"input_ids": [5, 6, 1], "attention_mask": [1, 1, 0]}).question == row({"input_ids": [5, 6]}).question


@pytest.mark.parametrize("sign", ["-", "+"])
def test_a_mark_counts_whatever_blanks_its_tag_leaves(sign):
    marked = chatting(MARKED.replace("{% generation", f"{{%{sign} generation"))
    assert counted(encoded({"messages": TALK}, marked), marked) == "fourfive"


def test_of_several_templates_by_name_the_tokenizers_own_choice_is_used():
    named, alone = chatting({"default": MARKED, "tool_use": PLAIN}), chatting(MARKED)
    assert encoded({"messages": TALK}, named) == encoded({"messages": TALK}, alone)
    with pytest.raises(ValueError, match="the chat template cannot spell example 7"):
        encoded({"messages": TALK}, chatting({"tool_use": PLAIN}))


def test_a_completion_without_a_prompt_counts_as_a_whole_and_is_told_apart_by_itself():
    plain = chatting(PLAIN)
    without = {"prompt": [], "completion": TALK[:2]}
    assert counted(encoded(without, plain), plain).startswith("<user>two")
    assert row(without).question != row({"prompt": [], "completion": TALK[2:]}).question
    first, second = ({"prompt": "", "completion": text} for text in ("a text", "another"))
    assert counted(encoded(first)) == "a text"
    assert row(first).question != row(second).question


def test_the_chat_template_stands_around_a_prompt_and_the_tokenizer_adds_nothing_to_it():
    tokenizer = chatting(PLAIN)
    sample = encoded({"prompt": "two plus two", "completion": "four"}, tokenizer, template="chat")
    assert tokenizer.decode(sample.input_ids) == "<user>two plus two<assistant>four"
    assert counted(sample, tokenizer) == "four"
    assert (
        tokenizer.decode(encoded("a text", tokenizer, template="chat").input_ids, skip_special_tokens=True) == "a text"
    )
    mixed = [row("a text"), row({"prompt": "two plus two", "completion": "four"})]
    together = encode(mixed, tokenizer, template="chat", max_length=None, eos=False)
    assert list(together) == [
        encode([each], tokenizer, template="chat", max_length=None, eos=False)[0] for each in mixed
    ]


def test_a_batch_holds_the_labels_at_either_side_of_the_padding():
    samples = [
        encoded({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}, None),
        encoded({"input_ids": [3, 4]}, None),
    ]
    sides: Any = (
        ("right", [[-100, 6, -100, 8], [3, 4, -100, -100]]),
        ("left", [[-100, 6, -100, 8], [-100, -100, 3, 4]]),
    )
    for side, rows in sides:
        assert collate(samples, 0, side)["labels"].tolist() == rows


def test_rows_are_the_same_by_what_they_ask():
    assert row("A  Text").question == row({"text": "a text"}).question
    assert row({"prompt": "P", "completion": "a"}).question == row({"prompt": "p", "completion": "b"}).question
    assert (
        row({"messages": TALK}).question
        == row({"messages": [*TALK[:3], {"role": "assistant", "content": "6"}]}).question
    )
    assert row({"messages": TALK}).question == row({"prompt": TALK[:3], "completion": TALK[3:]}).question
    assert row({"messages": TALK[:2]}).question != row({"messages": TALK}).question
    assert row({"input_ids": [1, 2]}).question == row({"input_ids": [1, 2], "labels": [-100, 2]}).question


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "row 7 is a int; a row must be a text, or a mapping of columns"),
        ("  ", "row 7: the text is empty"),
        (
            {"text": None, "body": "x"},
            "row 7 cannot be learned from: it has text, body; a row needs text, or prompt and",
        ),
        ({"text": "a", "messages": TALK}, "row 7 has the columns of several kinds"),
        ({"text": 3}, "row 7: text must be a text, got 3"),
        ({"text": "\ud800"}, "row 7: text holds half a character"),
        ({"prompt": "p", "completion": ""}, "row 7: completion is empty"),
        ({"messages": []}, "row 7: messages must be a list of messages"),
        ({"messages": [{"content": "x"}]}, 'row 7: messages must hold messages like {"role": "user"'),
        ({"input_ids": []}, "row 7: input_ids must be a list of whole numbers"),
        ({"input_ids": [1, True]}, "row 7: input_ids must hold whole numbers, got True"),
        ({"input_ids": [1, -1]}, "row 7: input_ids holds -1"),
        ({"input_ids": [1, 2], "labels": [1]}, "row 7: labels has 1 entries for 2 input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "row 7: attention_mask has 1 entries for 2 input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "row 7: attention_mask hides every token"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "row 7: attention_mask holds 2; allowed: 1 for a token"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "row 7: label 1 is 3, and the token there is 2"),
    ],
)
def test_an_odd_row_is_refused_by_its_place(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        row(given)


@pytest.mark.parametrize(
    ("given", "tokenizer", "options", "said"),
    [
        ({"input_ids": [1]}, None, {}, "example 7 has no token to predict: it has one token"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, None, {}, "none of its 2 tokens counts in the loss"),
        ("a text", None, {}, "example 7 is a text, and there is no tokenizer"),
        ({"messages": TALK}, TOKENIZER, {}, "example 7 needs a chat template, and the tokenizer has none"),
        (
            {"messages": TALK},
            chatting("{{ messages[9].x.y }}"),
            {},
            "the chat template cannot spell example 7: UndefinedError",
        ),
        ({"messages": TALK[:1]}, chatting(MARKED), {}, "none of its"),
        (
            {"prompt": "a long prompt", "completion": "b"},
            TOKENIZER,
            {"max_length": 3},
            "no token of the output is left",
        ),
    ],
)
def test_an_example_without_tokens_to_learn_is_refused(given, tokenizer, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        encoded(given, tokenizer, **options)


def test_further_columns_change_nothing():
    plain, more = {"text": "a text"}, {"text": "a text", "meta": json.dumps([1])}
    assert encoded(plain) == encoded(more)
