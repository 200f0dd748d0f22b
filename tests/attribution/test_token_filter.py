"""Token filters leave exactly the tokens that they say; the controls leave out as many of each row."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerif.attribution.token_filter import filtered, kept_tokens, num_counted
from layerif.data.batches import Encoded, Encodings
from layerif.data.rows import IGNORED
from layerif.probe.token_losses import losses_of_tokens
from tests.tiny import tiny_model

LOSSES = [0.1, 2.0, 0.9, 0.92, 5.0, 0.0]  # ln 2.5 = 0.916


@pytest.mark.parametrize(
    ("rule", "kept"),
    [("none", "111111"), ("low_perplexity", "101001"), ("lowest", "010110")],
)
def test_the_stated_tokens_stay(rule, kept):
    found = kept_tokens(LOSSES, rule, tau=2.5, random=Random(0))
    assert "".join("01"[each] for each in found) == kept


@settings(deadline=None, max_examples=50)
@given(losses=st.lists(st.floats(0, 800), min_size=1, max_size=12), tau=st.floats(1.01, 100), seed=st.integers(0, 99))
def test_the_controls_leave_out_as_many(losses, tau, seed):
    low = kept_tokens(losses, "low_perplexity", tau=tau, random=Random(seed))
    assert low == [math.exp(min(loss, 700)) <= tau for loss in losses]
    for rule in ("random", "lowest"):
        assert sum(kept_tokens(losses, rule, tau=tau, random=Random(seed))) == sum(low)
    least = kept_tokens(losses, "lowest", tau=tau, random=Random(seed))
    left_out, left = ([loss for loss, stays in zip(losses, least, strict=True) if stays == which] for which in (0, 1))
    assert max(left_out, default=0) <= min(left, default=math.inf)


def test_prompts_and_first_tokens_never_count_and_rows_without_a_token_are_left_out():
    rows = [
        Encoded((5, 6, 7, 8, 9), 2, loss_from=2),  # the loss counts 7, 8 and 9
        Encoded((5, 6, 7), 0),  # it counts 6 and 7; nothing predicts the first token
        Encoded((5, 6), 0),
        Encoded((3, 4, 5, 6), 0, counted=(True, False, True, True)),
        Encoded((5, 6, 7, 8), 3),  # it counts the prompt, too, which no filter learns
    ]
    values = ([0.0, 0.1, 3.0, 0.2], [0.0, 9.0], [9.0], [0.0, 0.0, 2.0], [0.1] * 3)
    losses = [torch.tensor(each).double() for each in values]
    found = filtered(rows, losses, "low_perplexity", tau=2.5, seed=0)
    off = IGNORED
    kept = [(off, off, 7, off, 9), (off, 6, off), (off, off, 5, off), (off, off, off, 8)]
    assert [sample.labels for sample in found] == kept
    assert (num_counted(rows), num_counted(found)) == (11, 5)
    assert [sample.input_ids for sample in found] == [row.input_ids for row in (*rows[:2], *rows[3:])]
    for rule in ("random", "lowest"):
        assert num_counted(filtered(rows, losses, rule, tau=2.5, seed=0)) == 5


def test_the_drawn_tokens_of_a_row_do_not_depend_on_the_others():
    rows = [Encoded(tuple(range(start, start + 9)), 0) for start in (3, 20, 40)]
    losses = [torch.tensor([0.0, 3.0] * 4).double()] * 3
    found = {row.input_ids: row.labels for row in filtered(rows, losses, "random", tau=2.5, seed=1)}
    again = {row.input_ids: row.labels for row in filtered(rows[::-1], losses, "random", tau=2.5, seed=1)}
    assert found == again
    assert again != {row.input_ids: row.labels for row in filtered(rows, losses, "random", tau=2.5, seed=2)}


def test_a_filter_that_leaves_nothing_is_refused():
    rows, losses = [Encoded((5, 6), 0)], [torch.tensor([9.0])]
    with pytest.raises(
        ValueError, match=r"^data\.token_filter=low_perplexity leaves no token of 1 rows to learn: .*; ra"
    ):
        filtered(rows, losses, "low_perplexity", tau=2.5, seed=0)


@pytest.mark.usefixtures("softmax_in_the_models_dtype")
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_the_losses_are_those_of_a_loop_over_single_rows(family):
    model = tiny_model(family).double()
    samples = Encodings(Encoded(tuple(range(3, 3 + length)), 1) for length in (9, 2, 20, 5, 7))
    found = losses_of_tokens(model, samples, 1, batch_size=3)
    for sample, losses_T in zip(samples, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0]
        targets = torch.tensor(sample.input_ids[1:])[:, None]
        expected_T = -logits[:-1].log_softmax(-1).gather(1, targets)[:, 0]
        torch.testing.assert_close(losses_T, expected_T, rtol=1e-9, atol=1e-9)


def test_a_loss_that_is_not_finite_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(math.inf)
    with pytest.raises(ValueError, match=r"^the loss of sample 0 is not finite; look at that row, or load the model"):
        losses_of_tokens(model, [Encoded((3, 4, 5), 0)], 1)
