"""A query is answered from an index as if it had been measured with the train rows, in bounded memory."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerif.attribution.query import (
    check_unseen_query,
    fidelity_of_index,
    influence_by_index,
    of_query,
    read_query,
)
from layerif.data.rows import AnyExample, ChatExample, CompletionExample, TextExample
from layerif.estimators._base import GramEstimator
from layerif.estimators.cosine import Cosine
from layerif.estimators.datainf import DataInf
from layerif.estimators.exact import Exact
from layerif.estimators.grad_dot import GradDot
from layerif.estimators.lissa import Lissa
from layerif.evidence import LayerGradients
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.models.pretrained import LocalModel
from layerif.probe.gradients import check_index, is_exact, projected_gradients, projection_size, read_index
from layerif.probe.grams.request import Grams
from layerif.probe.measurements import Measurements
from tests.tiny import shipped_task, tiny_model, tiny_tokenizer

QUERY: tuple[AnyExample, ...] = (
    TextExample("query 0", "the cat sat on the mat"),
    CompletionExample("query 1", "Question: Which region?", " Answer: Europe."),
)


def gradients(measured: Measurements, size: int = 64, seed: int = 0) -> tuple[LayerGradients, LayerGradients]:
    index, query = (
        projected_gradients(measured, part, measured.model.load, size=size, seed=seed)[0]
        for part in ("train", "validation")
    )
    return index, query


@pytest.mark.parametrize("granularity", ["matrix", "block"])
def test_without_a_projection_a_query_is_answered_as_if_it_was_measured_with_the_rows(decider, granularity):
    measured = of_query(decider, QUERY)
    evidence, _ = Grams().take(measured, decider.model.load)
    index, query = gradients(measured)
    estimators: list[GramEstimator] = [DataInf(), Exact(), Lissa(), GradDot(), Cosine()]
    for estimator in (replace(each, granularity=granularity) for each in estimators):
        expected, found = estimator.by_layer(evidence), influence_by_index(estimator, index, query, block=3)
        assert list(found) == list(expected)
        for layer, influence_MN in found.items():
            scale = float(expected[layer].abs().max())
            torch.testing.assert_close(influence_MN, expected[layer], rtol=1e-3, atol=1e-3 * scale)


def random_gradients(num_train: int, num_query: int) -> tuple[LayerGradients, LayerGradients]:
    layers, generator = LayerMap(("b",), (("b.q",),), (12,)), torch.Generator().manual_seed(0)
    index, query = (torch.randn(num, 12, generator=generator) for num in (num_train, num_query))
    return tuple(LayerGradients(layers, {"b.q": each}, {"b.q": 12}, "") for each in (index, query))  # type: ignore[return-value]


@pytest.mark.parametrize("estimator", [GradDot(), Cosine(), DataInf()], ids=lambda each: each.source)
def test_an_estimator_that_does_not_need_k_has_none_made(estimator, monkeypatch):
    """The largest product has a block of columns for DataInf, and nothing of N×N for the others."""
    index, query = random_gradients(900, 3)
    largest: list[int] = []
    multiply, double = Tensor.__matmul__, Tensor.double
    monkeypatch.setattr(
        Tensor, "__matmul__", lambda first, second: largest.append((found := multiply(first, second)).numel()) or found
    )
    monkeypatch.setattr(Tensor, "double", lambda values: largest.append(values.numel()) or double(values))
    found = influence_by_index(estimator, index, query, block=50)
    assert found["b"].shape == (3, 900)
    assert max(largest) == 900 * (50 if isinstance(estimator, DataInf) else 12)  # 12 numbers of each gradient


def test_an_index_keeps_to_its_size():
    model = tiny_model()
    layers = layer_map(model)
    for gigabytes in (1e-6, 1e-4, 2e-3, 1.0):
        size = projection_size(model, layers, 50, gigabytes)
        numbers = sum(
            min(num_out, size) * min(num_in, size)
            for num_out, num_in in (model.get_parameter(param).shape for param in layers.matrices)
        )
        assert size == 1 or 50 * numbers * 4 <= gigabytes * 1e9
        assert is_exact(model, layers, size) == (gigabytes == 1.0)
    assert projection_size(model, layers, 50, 2e-3) > projection_size(model, layers, 50, 1e-4) > 1


def test_a_second_query_measures_itself_alone(decider, monkeypatch):
    measured = of_query(decider, QUERY)
    gradients(measured)
    seen: list[int] = []
    model = decider.model.load()
    model.register_forward_pre_hook(lambda module, given, named: seen.append(len(named["input_ids"])), with_kwargs=True)
    other = of_query(decider, (TextExample("query 0", "another text about a dog"),))
    for part in ("train", "validation"):
        projected_gradients(other, part, lambda: model, size=64, seed=0)
    assert sum(seen) == 1 + 1  # once to see which matrices read the same input
    assert not decider.store.taken[-1]["reused"]
    assert decider.store.taken[-2]["reused"]


def test_fidelity_is_the_agreement_with_exact_influences(decider):
    measured = of_query(decider, QUERY)
    load = decider.model.load
    whole = fidelity_of_index(measured, GradDot(), *gradients(measured), load)
    assert whole == {"train": 8, "validation": 2, "rows": pytest.approx(1)}
    coarse = fidelity_of_index(measured, GradDot(), *gradients(measured, size=2), load)
    assert coarse is not None
    assert -1 <= coarse["rows"] < 1


def test_an_index_of_another_model_or_of_other_rows_is_refused(decider, tmp_path):
    measured = of_query(decider, QUERY)
    index, _ = gradients(measured, size=5, seed=3)
    (file,) = decider.store.files(index.fingerprint)
    read, size, seed = read_index(file, measured)
    assert (size, seed) == (5, 3)
    assert all(torch.equal(read.gradients[param], each) for param, each in index.gradients.items())

    folder = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="is of another model; leave it out, and an index of this model"):
        check_index(file, replace(measured, model=LocalModel(path=str(folder))))
    with pytest.raises(ValueError, match="is of other train rows"):
        check_index(file, of_query(replace(decider, probe=replace(decider.probe, num_train=5)), QUERY))
    with pytest.raises(ValueError, match=r"is of another probe\.scope"):
        check_index(file, replace(measured, probe=replace(measured.probe, scope="mlp")))
    (grams,) = decider.store.files(Grams().take(measured, decider.model.load)[0].fingerprint)
    for wrong in (grams, tmp_path / "none.safetensors"):
        with pytest.raises(ValueError, match=r"is not an index: .* give a file that method=rows with"):
            check_index(wrong, measured)


def test_a_query_is_rows_of_a_file_or_one_text(task_folder, tmp_path):
    task: Any = shipped_task("jsonl", f"task.path={task_folder}")
    own = json.loads((task_folder / "validation.jsonl").read_text().splitlines()[0])
    file = tmp_path / "query.jsonl"
    rows = [{"text": "the cat"}, {"prompt": "the", "completion": " cat"}, own]
    file.write_text("\n".join(map(json.dumps, rows)))
    text, completion, question = read_query(file, task.reader())
    assert isinstance(text, TextExample)
    assert isinstance(completion, CompletionExample)
    assert replace(question, id="x") == replace(task.load().validation[0], id="x")
    file = tmp_path / "query.txt"
    file.write_text("one text\n")
    assert read_query(file, task.reader()) == (TextExample("query", "one text"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, r"cannot be read: No such file or directory; give the path of a \.jsonl file"),
        ("query.jsonl", "\n", "holds no row; give one JSON object per line"),
        ("query.jsonl", '{"text": ', r"query\.jsonl:1 is not valid JSON"),
        ("query.jsonl", '{"words": "the cat"}', r"query\.jsonl:1.*question"),
        ("query.txt", " ", r"query\.txt: the text is empty"),
    ],
)
def test_a_query_that_cannot_be_read_is_refused(task_folder, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_query(tmp_path / name, shipped_task("jsonl", f"task.path={task_folder}").reader())


def test_a_query_that_is_an_evaluated_row_is_refused(decider):
    test, tokenizer = decider.splits.test, copy.deepcopy(decider.tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    evaluated = test[3]
    for query in (
        evaluated,
        CompletionExample("query 0", evaluated.instruction.upper(), " Answer: A"),
        TextExample("query 0", f"{evaluated.instruction}  {evaluated.output}"),
        ChatExample("query 0", ({"role": "user", "content": evaluated.instruction},)),
    ):
        with pytest.raises(ValueError, match=rf"is the evaluated row {evaluated.id}; a row that is evaluated"):
            check_unseen_query([decider.splits.validation[0], query], test, "plain", tokenizer)
    check_unseen_query(decider.splits.validation, test, "plain", tokenizer)
