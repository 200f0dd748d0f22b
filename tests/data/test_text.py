"""Calibration and test text never meet, windows are chosen by the seed alone, and short texts are refused."""

from __future__ import annotations

import json

import pytest
import torch

from layerif.data.text import check_disjoint, documentation_text, text
from layerif.data.tokens import token_ids
from layerif.pruning.calibration import Calibration
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text(" ".join(f"word{number}" for number in range(400)))
    return str(file)


def test_windows_are_distinct_pieces_of_the_text_and_follow_the_seed(words):
    ids = token_ids(TOKENIZER, [text(words, "calibration")])[0]
    pieces = {ids[start : start + 30] for start in range(0, len(ids) - 29, 30)}
    chosen = torch.cat(Calibration(text=words, num_windows=7, window=30, batch_size=3).batches(TOKENIZER))
    assert chosen.shape == (7, 30)
    assert {tuple(row) for row in chosen.tolist()} <= pieces
    assert len({tuple(row) for row in chosen.tolist()}) == 7
    again = Calibration(text=words, num_windows=7, window=30, batch_size=7).batches(TOKENIZER)
    assert torch.equal(torch.cat(again), chosen)
    other = Calibration(text=words, num_windows=7, window=30, seed=1).batches(TOKENIZER)
    assert not torch.equal(torch.cat(other), chosen)


def test_the_embedded_calibration_text_is_not_what_perplexity_is_measured_on():
    assert text("documentation", "calibration") == documentation_text("calibration")
    parts = [set(text("documentation", part).split("\n\n")) for part in ("calibration", "test")]
    assert not parts[0] & parts[1]


def test_files_are_text_or_lines_of_json(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": word}) for word in ("one", "two")) + "\n")
    assert text(str(file), "test") == "one\n\ntwo"
    file.write_text('{"txt": "one"}\n')
    with pytest.raises(ValueError, match='one JSON object with a "text" per line'):
        text(str(file), "test")


def test_what_cannot_be_read_or_is_too_short_is_refused(words):
    with pytest.raises(ValueError, match=r"'wikitxt2' cannot be read.*did you mean 'wikitext2'"):
        text("wikitxt2", "test")
    with pytest.raises(ValueError, match=r"0 windows of 5000.* use a shorter method\.calibration\.window or a longer"):
        Calibration(text=words, num_windows=1, window=5000).batches(TOKENIZER)
    with pytest.raises(ValueError, match=r"num_windows=999 asks for more: use num_windows<=\d+"):
        Calibration(text=words, num_windows=999, window=30).batches(TOKENIZER)
    with pytest.raises(
        ValueError,
        match=r"window=256 is too long: the model reads at most 128 tokens; use method\.calibration\.window<=128",
    ):
        Calibration(text=words).batches(TOKENIZER, 128)


def test_one_file_cannot_be_both_texts(words):
    check_disjoint("documentation", "documentation")
    check_disjoint(words, "documentation")
    with pytest.raises(ValueError, match="are the same file"):
        check_disjoint(words, words)


def test_the_hub_out_of_reach_says_to_give_a_file():
    with pytest.raises(ValueError, match="Without the hub give the path"):
        text("wikitext2", "test")
