"""Angular distances over spans equal their definition, and the span of least distance goes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerif.allocate.blocks import Blocks
from layerif.allocate.spans import Spans
from layerif.estimators.angular import Angular
from layerif.models.blocks import blocks
from layerif.probe.spans import measure_spans
from layerif.pruning.calibration import Calibration
from tests.probe.test_skips import loss_text, samples
from tests.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.usefixtures("softmax_in_the_models_dtype")


def states_of(model: Any, ids_T: Tensor) -> Tensor:
    """The hidden states before each block and after the last one, by transformers ((L+1)×T×H)."""
    found, seen = blocks(model), []
    handles = [
        block.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(
                (args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)
            ),
            with_kwargs=True,
        )
        for block in found.values()
    ]
    with torch.no_grad():
        model(input_ids=ids_T[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack([seen[0][0][0], *(after[0] for _, after in seen)]).double()


def expected(model: Any) -> Tensor:
    total = torch.zeros(2, len(blocks(model)) + 1, len(blocks(model)) + 1, dtype=torch.float64)
    for index, ids_T in enumerate(samples()):
        states_LTH = states_of(model, ids_T)
        for l in range(len(states_LTH)):
            for k in range(len(states_LTH)):
                for one_H, other_H in zip(states_LTH[l], states_LTH[k], strict=True):
                    cosine = float(one_H @ other_H / one_H.norm() / other_H.norm())
                    total[index % 2, l, k] += math.acos(min(max(cosine, -1), 1)) / math.pi if l != k else 0
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_equal_the_definition_whatever_the_batches_and_the_padding(family):
    model = tiny_model(family).double()
    wanted = expected(model)
    for size, side in ((1, "left"), (3, "left"), (4, "right")):
        found = measure_spans(model, loss_text(size, side))
        torch.testing.assert_close(found["angles"], wanted, rtol=1e-6, atol=1e-6)
        assert found["num_tokens"].tolist() == [17 + 13, 4 + 6]


def test_the_span_of_least_distance_goes_and_the_last_one_among_equals():
    names = tuple(f"b.{number}" for number in range(5))
    places = torch.tensor([0.0, 0.3, 0.4, 0.5, 0.55, 0.95], dtype=torch.float64)
    distances = (places[:, None] - places[None]).abs()
    spans = Spans(names, torch.stack([distances * 3, distances]), (3, 1))
    torch.testing.assert_close(spans.distances, distances)
    assert spans.of_length(2) == pytest.approx([0.4, 0.2, 0.15, 0.45])
    assert Blocks(keep=3)(spans).values == (1, 1, 0, 0, 1)
    assert Blocks(keep=0.8)(spans).values == (1, 1, 1, 0, 1)
    summary = spans.summary(Blocks(keep=3)(spans).by_name())
    assert summary["distance"] == pytest.approx(0.15)
    assert summary["everywhere"] == pytest.approx([0.05, 0.15, 0.25, 0.55])
    equal = Spans(names, torch.zeros(2, 6, 6), (1, 0))
    assert Blocks(keep=3)(equal).values == (1, 1, 1, 0, 0)
    assert equal.halves is None
    first, second = spans.halves or (spans, spans)
    torch.testing.assert_close(first.distances, second.distances)
    with pytest.raises(ValueError, match=r"spans of 5 blocks must have distances of \(2, 6, 6\), got \(2, 5, 5\)"):
        Spans(names, torch.zeros(2, 5, 5), (1, 1))


def test_a_decision_by_spans_is_kept_in_the_store(decider, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat runs over the red hill " * 40)
    windows = Calibration(text=str(text), num_windows=4, window=16, batch_size=3)
    asked = replace(decider, estimator=Angular(calibration=windows), allocator=Blocks(keep=1))
    decision = asked()
    assert not decision.reused
    assert asked().reused
    assert sum(decision.allocation.values) == 1
    assert decision.allocation.values in ((1, 0, 0), (0, 0, 1))
    kept = decision.record().curves
    assert (kept["sense"], len(kept["everywhere"])) == ("distance", 2)
    assert kept["distance"] == kept["everywhere"][1]
    assert replace(asked, allocator=Blocks(keep=2))().reused


def test_a_state_that_is_not_finite_is_named():
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the output of block model\.layers\.1 is not finite; .*float32"):
        measure_spans(model, loss_text(1))
