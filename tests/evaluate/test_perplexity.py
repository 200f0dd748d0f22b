"""Perplexity equals its definition, window by window."""

import math

import pytest
import torch

from layerif.evaluate.perplexity import perplexity
from tests.tiny import tiny_model


def test_perplexity_equals_its_definition_window_by_window():
    model, ids = tiny_model("llama").double(), [3 + 7 * k % 200 for k in range(47)]
    losses = []
    for start in (0, 10, 20, 30):  # the last 7 tokens fill no window
        window = torch.tensor([ids[start : start + 10]])
        with torch.no_grad():
            log_probs = model(window).logits[0].log_softmax(-1)
        losses += [-log_probs[t - 1, window[0, t]].item() for t in range(1, 10)]
    expected = math.exp(sum(losses) / len(losses))
    for batch_size in (1, 3):
        assert perplexity(model, ids, window=10, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"window=48 is too long: the text has 47 tokens; use evaluation\.window<=47"):
        perplexity(model, ids, window=48)
    with pytest.raises(ValueError, match=r"the model reads at most 16 tokens; use evaluation\.window<=16"):
        perplexity(tiny_model("opt", max_position_embeddings=16), ids, window=20)


def test_a_loss_that_is_not_finite_has_no_perplexity():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"its mean token loss is [0-9.]+; weights"):
        perplexity(model, list(range(100)), window=20)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match="no finite perplexity: its mean token loss is nan"):
        perplexity(model, list(range(100)), window=20)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight").zero_()
    assert perplexity(model, list(range(100)), window=20) == pytest.approx(256, rel=1e-5)
