from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerif.data.batches import (
    IGNORED,
    Encoded,
    batches,
    collate,
    encode,
    num_shared,
    output_text,
    padding_id,
    prompt_text,
    token_ids,
)
from layerif.data.render import Example
from layerif.data.rows import example_of
from layerif.evaluate.loss import encoded_rows
from layerif.evaluate.questions import QuestionSet
from layerif.models.loss import per_sample_loss
from tests.tiny import shipped_task, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def example(index: int = 0) -> Example:
    return Example(
        str(index), "Question: What?" + " and so on" * index + "\n", ("Answer: A.", "Answer: B."), ("A", "B"), 1
    )


EXAMPLES = [example(index) for index in (2, 0, 4, 1, 3)]

samples = st.lists(
    st.integers(2, 9).flatmap(
        lambda n: st.builds(Encoded, st.tuples(*[st.integers(3, 99)] * n), st.just(1), st.integers(0, 1))
    ),
    min_size=1,
    max_size=7,
)


def test_the_templates_are_the_papers():
    plain = prompt_text(example(), "plain") + output_text("Answer: B.", "plain")
    assert plain == "Question: What?\n Answer: B."
    alpaca = prompt_text(example(), "alpaca") + output_text("Answer: B.", "alpaca")
    assert alpaca == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nQuestion: What?\n\n\n### Response:\nAnswer: B."
    )


def test_braces_in_a_question_are_left_alone():
    odd = Example("0", "What is {instruction} or {0}?", ("x",), ("x",), 0)
    assert "### Instruction:\nWhat is {instruction} or {0}?\n" in prompt_text(odd, "alpaca")


@pytest.mark.parametrize("template", ["plain", "alpaca"])
@pytest.mark.parametrize("bos", [False, True])
def test_encoding_is_the_whole_text_and_knows_where_the_prompt_ends(template, bos):
    tokenizer = tiny_tokenizer(bos=bos)
    for sample, item in zip(
        encode(EXAMPLES, tokenizer, template=template, max_length=None, eos=True), EXAMPLES, strict=True
    ):
        assert sample.input_ids[-1] == tokenizer.eos_token_id
        assert (sample.input_ids[0] == tokenizer.bos_token_id) is bos
        prompt, rest = list(sample.input_ids[: sample.prompt_length]), list(sample.input_ids[sample.prompt_length : -1])
        assert tokenizer.decode(prompt, skip_special_tokens=True) == prompt_text(item, template)
        assert tokenizer.decode(rest) == output_text(item.output, template)


def test_loss_counts_everything_or_the_output_only():
    whole, output = (
        collate(encode(EXAMPLES, TOKENIZER, template="plain", max_length=None, eos=True, loss_on=on), 1)["labels"]
        for on in ("all", "output")
    )
    lengths = [
        len(ids) + 1 for ids in token_ids(TOKENIZER, [prompt_text(e, "plain") + " Answer: B." for e in EXAMPLES])
    ]
    assert (whole != IGNORED).sum(1).tolist() == lengths
    assert (output != IGNORED).sum(1).tolist() == [len(TOKENIZER(" Answer: B.").input_ids) + 1] * len(EXAMPLES)


def test_truncation_cuts_the_end_and_is_counted():
    whole = encode(EXAMPLES, TOKENIZER, template="plain", max_length=None, eos=True)
    limit = sorted(map(len, whole))[2]
    cut = encode(EXAMPLES, TOKENIZER, template="plain", max_length=limit, eos=True)
    assert whole.num_truncated == 0
    assert cut.num_truncated == sum(len(sample) > limit for sample in whole) == 2
    assert [sample.input_ids for sample in cut] == [sample.input_ids[:limit] for sample in whole]


def test_truncation_that_leaves_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match=r"example 4: its prompt of \d+ tokens fills max_length=20.*use max_length>="):
        encode([example(4)], TOKENIZER, template="plain", max_length=20, eos=True, loss_on="output")
    with pytest.raises(ValueError, match="max_length=1 leaves no token"):
        encode(EXAMPLES, TOKENIZER, template="plain", max_length=1, eos=True)


@pytest.fixture
def tokenised(monkeypatch):
    """Gathers the number of characters of every text that a tokenizer is given."""
    found, whole = [], TOKENIZER.__class__.__call__

    def counted(self, texts, **options):
        found.extend(map(len, [texts] if isinstance(texts, str) else texts))
        return whole(self, texts, **options)

    monkeypatch.setattr(TOKENIZER.__class__, "__call__", counted)
    return found


def test_a_text_of_many_megabytes_is_tokenised_as_far_as_it_is_used(tokenised):
    text = "Which of these? " * 700_000
    expected = token_ids(TOKENIZER, [text[:10_000]])[0][:65]
    tokenised.clear()
    short, long = token_ids(TOKENIZER, ["Which?", text], at_most=64)
    assert long == expected
    assert short == token_ids(TOKENIZER, ["Which?"])[0]
    assert sum(tokenised) < 10_000


TEXT = "Which of these? " * 70_000
TALK = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": TEXT}]}
SPOKEN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "row",
    [TEXT, {"prompt": "Which?", "completion": TEXT}, {"prompt": TEXT, "completion": TEXT}, TALK],
    ids=["text", "completion", "prompt", "chat"],
)
def test_a_row_of_a_megabyte_is_refused_by_the_metric_loss_without_reading_it_all(tokenised, monkeypatch, row):
    monkeypatch.setattr(TOKENIZER, "chat_template", SPOKEN)
    questions = QuestionSet([example_of(row, id="7", where="row 7")], shipped_task("capital"), TOKENIZER)
    with pytest.raises(ValueError, match="7 takes more than 64 tokens with its answer, the model reads at most 64"):
        encoded_rows(questions, 64)
    assert sum(tokenised) < 10_000


@pytest.mark.parametrize("loss_on", [None, "output"])
def test_a_conversation_of_a_megabyte_is_tokenised_as_far_as_it_is_used(tokenised, monkeypatch, loss_on):
    monkeypatch.setattr(TOKENIZER, "chat_template", SPOKEN)
    options: Any = {"template": "plain", "eos": False, "loss_on": loss_on}
    (sample,) = encode([example_of(TALK, id="7", where="row 7")], TOKENIZER, max_length=64, **options)
    assert sum(tokenised) < 10_000
    (whole,) = encode([example_of(TALK, id="7", where="row 7")], TOKENIZER, max_length=None, **options)
    assert sample.input_ids == whole.input_ids[:64]
    assert (sample.prompt_length, sample.loss_from) == (whole.prompt_length, whole.loss_from)
    assert sample.is_truncated
    spelt: Any = TOKENIZER.apply_chat_template(TALK["messages"], tokenize=True, return_dict=True)
    assert whole.input_ids == tuple(spelt["input_ids"])


def test_a_tokenizer_that_appends_its_end_token_gives_one_end_only():
    class Appending:
        eos_token_id = 1

        def __call__(self, texts, **_):
            return {"input_ids": [[5, 6, 1] for _ in texts]}

    assert token_ids(Appending(), ["a", "b"]) == [(5, 6), (5, 6)]  # type: ignore[arg-type]


few = settings(max_examples=30, deadline=None)


@few
@given(samples, st.sampled_from(["left", "right"]))
def test_collate_keeps_every_token_in_its_mask_and_nothing_else(encodings, side):
    pad = encodings[0].input_ids[0]  # a padding token that is also a word must make no difference
    batch = collate(encodings, pad, side)
    for row, sample in enumerate(encodings):
        mask = batch["attention_mask"][row].bool()
        assert tuple(batch["input_ids"][row][mask].tolist()) == sample.input_ids
        assert (batch["input_ids"][row][~mask] == pad).all()
        assert mask[-1 if side == "left" else 0]
        assert (mask[1:] != mask[:-1]).sum() <= 1
        assert (batch["labels"][row] != IGNORED).sum() == len(sample) - sample.loss_from
        assert (batch["labels"][row][~mask] == IGNORED).all()


@few
@given(samples, st.integers(1, 4))
def test_batches_hold_every_sample_once_and_say_which(encodings, batch_size):
    seen, lengths = [], []
    for indices, batch in batches(encodings, batch_size, 1):
        assert len(indices) <= batch_size
        for index, ids, mask in zip(indices, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            assert tuple(ids[mask].tolist()) == encodings[index].input_ids
            lengths.append(len(encodings[index]))
        seen += indices
    assert sorted(seen) == list(range(len(encodings)))
    assert lengths == sorted(lengths, reverse=True)


def test_a_samples_loss_depends_on_neither_side_nor_company():
    model = tiny_model("llama", attn_implementation="sdpa").double()
    encodings = encode(EXAMPLES, TOKENIZER, template="plain", max_length=None, eos=True)
    alone = torch.cat([per_sample_loss(model, collate([sample], 1)) for sample in encodings])
    for side in ("left", "right"):
        losses = torch.zeros_like(alone)
        for indices, batch in batches(encodings, 3, padding_id(TOKENIZER), side):
            losses[indices] = per_sample_loss(model, batch)
        torch.testing.assert_close(losses, alone, rtol=0, atol=1e-12)


def test_num_shared_counts_from_the_start():
    assert [num_shared(*pair) for pair in (("abc", "abd"), ("ab", "abc"), ("", "a"), ("x", "y"))] == [2, 2, 0, 0]  # type: ignore[arg-type]


def test_a_tokenizer_without_padding_pads_with_its_end_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token"):
        padding_id(tokenizer)
    with pytest.raises(ValueError, match=r"no end-of-text token to append; give its tokenizer_config\.json"):
        encode(EXAMPLES, tokenizer, template="plain", max_length=None, eos=True)
