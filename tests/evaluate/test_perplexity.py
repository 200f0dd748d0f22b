"""Perplexity equals its definition, window by window."""

import math
from collections import Counter

import pytest
import torch

from layerif.data.tokens import token_ids
from layerif.data.windows import cut_windows
from layerif.evaluate.evaluation import Evaluation
from layerif.evaluate.perplexity import perplexity
from tests.evaluate.questions import EXAMPLES
from tests.tiny import shipped_task, tiny_model, tiny_tokenizer


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


@pytest.mark.parametrize("bos", [(0,), (0, 2)])
def test_with_bos_every_token_of_the_text_is_predicted_once_and_bos_never(bos):
    model, ids = tiny_model("llama").double(), [3 + 7 * k % 200 for k in range(47)]
    places, losses = 10 - len(bos), []
    for start in range(0, 3 * places, places):
        window = torch.tensor([[*bos, *ids[start : start + places]]])
        with torch.no_grad():
            log_probs = model(window).logits[0].log_softmax(-1)
        losses += [-log_probs[t - 1, window[0, t]].item() for t in range(len(bos), 10)]
    assert len(losses) == 3 * places
    expected = math.exp(sum(losses) / len(losses))
    for given in (ids, [*bos, *ids]):  # a text that was tokenised as a whole begins with BOS already
        found = perplexity(model, given, window=10, which=slice(3), bos=bos, batch_size=2)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bos", ["tokenizer", "first", "none"])
def test_an_evaluation_measures_and_guesses_the_tokens_that_are_predicted(bos, tmp_path):
    file, tokenizer, model = tmp_path / "words.txt", tiny_tokenizer(bos=True), tiny_model("llama")
    file.write_text(" ".join(f"word{number}" for number in range(60)))
    settings = Evaluation(metrics=["perplexity"], text=str(file), window=20, num_windows=4, bos=bos)
    settings.check(tokenizer, EXAMPLES, shipped_task("capital"), 512)
    result = settings.run(model, tokenizer, EXAMPLES, shipped_task("capital"))
    words = token_ids(tokenizer, [file.read_text()], special=False)[0]
    windows = {
        "tokenizer": [(0, *words[at : at + 19]) for at in range(0, 4 * 19, 19)],
        "first": [(0, *words)[at : at + 20] for at in range(0, 80, 20)],
        "none": [words[at : at + 20] for at in range(0, 80, 20)],
    }[bos]
    flat = [id for one in windows for id in one]
    assert result.metrics["words/perplexity_20"] == pytest.approx(perplexity(model, flat, window=20), rel=1e-5)
    counts = Counter(id for one in windows for id in one[1:])
    guess = sum(count * math.log(counts.total() / count) for count in counts.values()) / counts.total()
    assert result.context_free["words/perplexity_20"] == pytest.approx(math.exp(guess))
    many = Evaluation(metrics=["perplexity"], text=str(file), window=20, num_windows=999, bos=bos)
    available = len(cut_windows((0, *words) if bos != "none" else words, 20, (0,) if bos == "tokenizer" else ()))
    with pytest.raises(ValueError, match=rf"which is {available} windows of 20 tokens; use at most {available}"):
        many.check(tokenizer, EXAMPLES, shipped_task("capital"), 512)


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
