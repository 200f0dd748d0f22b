"""Windows lose and repeat no token, begin with BOS where the tokenizer adds one, and are chosen by the seed alone."""

from __future__ import annotations

import json
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from layerif.data.tokens import bos_of, token_ids
from layerif.data.windows import cut_windows, running_ids, windows_of
from layerif.pruning.calibration import Calibration
from tests.tiny import tiny_tokenizer

PLAIN, WITH_BOS = tiny_tokenizer(), tiny_tokenizer(bos=True)
TEXT = " ".join(f"word{number}" for number in range(400))
WORDS = token_ids(PLAIN, [TEXT])[0]
BOS = 0


def opening_with_two():
    """A tokenizer that puts two tokens before a text, as GLM's does, and `</s>` behind it."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1), ("<unk>", 2)]
    )
    return tokenizer


def windows(tokenizer, window, bos):
    ids, lead = running_ids(tokenizer, TEXT, bos)
    return cut_windows(ids, window, lead)


def test_the_tokens_before_a_text_are_those_that_the_tokenizer_adds():
    assert (bos_of(PLAIN), bos_of(WITH_BOS), bos_of(opening_with_two())) == ((), (BOS,), (0, 2))


@pytest.mark.parametrize(("tokenizer", "lead"), [(WITH_BOS, (0,)), (opening_with_two(), (0, 2))])
def test_every_window_begins_with_bos_once_and_the_text_is_read_whole(tokenizer, lead):
    found = windows(tokenizer, 30, "tokenizer")
    assert {len(one) for one in found} == {30}
    assert {one[: len(lead)] for one in found} == {lead}
    assert not any(BOS in one[1:] for one in found)
    read = tuple(chain.from_iterable(one[len(lead) :] for one in found))
    assert read == WORDS[: len(read)]
    assert 0 <= len(WORDS) - len(read) < 30 - len(lead)


def test_first_is_the_text_tokenised_once_and_none_has_no_bos():
    whole = (BOS, *WORDS)
    assert windows(WITH_BOS, 30, "first") == [whole[at : at + 30] for at in range(0, len(whole) - 29, 30)]
    assert windows(WITH_BOS, 30, "none") == windows(PLAIN, 30, "tokenizer")


@pytest.mark.parametrize("bos", ["tokenizer", "first", "none"])
def test_a_tokenizer_that_adds_no_bos_has_the_windows_and_the_choice_that_it_always_had(bos, tmp_path):
    assert windows(PLAIN, 30, bos) == [WORDS[at : at + 30] for at in range(0, len(WORDS) - 29, 30)]
    (tmp_path / "words.txt").write_text(TEXT)
    settings = Calibration(text=str(tmp_path / "words.txt"), num_windows=5, window=30, seed=3, bos=bos)
    assert len(WORDS) // 30 == NUM_WINDOWS
    chosen = torch.cat(settings.batches(PLAIN)).tolist()
    assert chosen == [list(WORDS[30 * index : 30 * index + 30]) for index in CHOSEN]


NUM_WINDOWS, CHOSEN = 63, (5, 9, 28, 41, 50)  # of the version before BOS was a setting


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(2, 9))
def test_rows_laid_end_to_end_keep_their_own_bos_and_get_no_second_one(ids, window):
    found = cut_windows(ids, window, (BOS,))
    assert all(len(one) == window and one[0] == BOS for one in found)
    start = 0
    for one in found:
        own = ids[start] == BOS
        assert list(one[0 if own else 1 :]) == ids[start : start + window - (not own)]
        start += window - (not own)
    left = ids[start:]
    assert len(left) < window - (left[:1] != [BOS])


def test_calibration_chooses_among_windows_with_bos(tmp_path):
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    chosen = Calibration(text=str(tmp_path / "words.jsonl"), num_windows=7, window=30).batches(WITH_BOS)
    rows = list(map(tuple, torch.cat(chosen).tolist()))
    assert len({*rows}) == 7
    assert {*rows} <= {*windows(WITH_BOS, 30, "tokenizer")}
    ids, lead = running_ids(WITH_BOS, TEXT, "tokenizer")
    assert rows == windows_of(ids, 7, 30, seed=0, what="the text", bos=lead)


def test_a_text_that_spells_bos_itself_has_one():
    for tokenizer in (PLAIN, WITH_BOS):
        assert token_ids(tokenizer, [f"<s>{TEXT}"]) == [(BOS, *WORDS)]
    assert token_ids(PLAIN, ["<s><s>a"]) == [(BOS, BOS, *token_ids(PLAIN, ["a"])[0])]


def test_a_window_without_a_place_for_text_and_an_unknown_word_are_refused():
    with pytest.raises(ValueError, match=r"a window of 2 tokens has no place .* the 2 .*; use a window of 3 or more"):
        windows(opening_with_two(), 2, "tokenizer")
    with pytest.raises(ValueError, match=r"method\.calibration\.bos='frist' is not allowed; .*did you mean 'first'"):
        Calibration(bos="frist")  # type: ignore[arg-type]
