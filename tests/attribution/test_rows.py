"""Row influence equals its dense definition, adds up to what scores are made of, and keeps its tables."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import layerif
from layerif.attribution.page import rows_page
from layerif.attribution.rows import RowInfluence, ShownRow, over_layers
from layerif.attribution.tokens import TokenShares
from layerif.data.batches import collate, encode
from layerif.data.rows import TextExample
from layerif.estimators._base import by_block
from layerif.estimators.datainf import DataInf
from layerif.estimators.tracin import TracIn
from layerif.evidence import CheckpointGrams
from layerif.models.loss import per_sample_loss
from layerif.probe.grams.request import Grams
from layerif.scores import aggregate
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [
    f"the {noun} runs over the {colour} hill{' and rests' * (number % 3)}"
    for number, (noun, colour) in enumerate(
        (noun, colour) for noun in ["cat", "dog", "cow", "hen", "pig"] for colour in ["red", "blue", "old"]
    )
]
TRAIN, VALIDATION = TEXTS[:10], TEXTS[10:]


def influence(model: Any = None, train=TRAIN, validation=VALIDATION, **options: Any) -> RowInfluence:
    model = tiny_model() if model is None else model
    return layerif.rows(model, TOKENIZER, train, validation, progress=False, **options)


def gradients_of(model: Any, texts: list[str], params: list[str]) -> dict[str, torch.Tensor]:
    """Takes the gradient of every text by itself (S×P), in the ordinary way."""
    weights = dict(model.named_parameters())
    found: dict[str, list[torch.Tensor]] = {param: [] for param in params}
    for text in texts:
        sample = encode([TextExample("x", text)], TOKENIZER, template="plain", max_length=None, eos=False)
        loss = per_sample_loss(model, collate(sample, 1)).sum()
        for param, gradient in zip(params, torch.autograd.grad(loss, [weights[p] for p in params]), strict=True):
            found[param].append(gradient.flatten())
    return {param: torch.stack(each) for param, each in found.items()}


@pytest.mark.usefixtures("softmax_in_the_models_dtype")
def test_the_influence_of_rows_is_its_dense_definition():
    model = tiny_model(num_hidden_layers=2, hidden_size=16, head_dim=4).double()
    found = influence(model, estimator="exact")
    params = [name for name, _ in model.named_parameters() if "self_attn" in name]
    train, validation = (gradients_of(model, texts, params) for texts in (TRAIN, VALIDATION))
    for layer, ours_MN in found.influences.items():
        dense_MN = torch.zeros_like(ours_MN)
        for param in (name for name in params if name.startswith(f"{layer}.")):
            train_NP, val_MP = train[param], validation[param]
            damped_PP = train_NP.T @ train_NP / len(train_NP)
            damped_PP.diagonal().add_(0.1 * train_NP.square().mean())
            dense_MN -= val_MP @ torch.linalg.solve(damped_PP, train_NP.T)
        torch.testing.assert_close(ours_MN, dense_MN, rtol=1e-6, atol=1e-6 * float(dense_MN.abs().max()))
    torch.testing.assert_close(found.total, reduce(add, found.influences.values()))


@pytest.mark.parametrize(
    ("estimator", "rel"),
    [("datainf", 1e-9), ("grad_dot", 1e-9), ("kfac", 1e-3), ("ekfac", 1e-3), ("shampoo", 1e-3)],
)
def test_sums_over_rows_are_what_scores_aggregate(estimator, rel):
    found, profile = influence(estimator=estimator), layerif.score(
        tiny_model(), TOKENIZER, TRAIN, VALIDATION, estimator=estimator, progress=False
    )  # fmt: skip
    for layer, score in profile.scores.by_name().items():
        assert abs(aggregate(found.influences[layer])) == pytest.approx(score, rel=rel)
        mean = sum(row[layer] for row in found.table())
        assert abs(mean * len(VALIDATION)) == pytest.approx(score, rel=rel)


def test_order_and_batch_size_change_nothing():
    found, chosen = influence(), [3, 1, 4, 0, 9, 2, 6, 5, 8, 7]
    other = influence(train=[TRAIN[index] for index in chosen], batch_size=3)
    torch.testing.assert_close(
        other.total, found.total[:, chosen], rtol=1e-4, atol=1e-4 * float(found.total.abs().max())
    )
    first, second = (each.most_helpful(3) for each in (found, other))
    assert [row["text"] for row in first] == [row["text"] for row in second]


def test_every_estimator_of_influence_tells_it_by_layer(decider):
    evidence, _ = Grams().take(decider, decider.model.load)
    of_grams = DataInf().by_layer(evidence)
    assert list(of_grams) == list(evidence.layers.names)
    checkpoints = TracIn(checkpoints=["a", "b"], learning_rates=[0.5, 0.5])
    traced = checkpoints.by_layer(CheckpointGrams((evidence, evidence)))
    by_matrix = {name: -gram.val_train.double() for name, gram in evidence.grams.items()}
    expected = by_block(by_matrix, evidence.layers)
    for layer, influence_MN in traced.items():
        torch.testing.assert_close(influence_MN, expected[layer])


def rows_of(*influences: list[list[float]], how: Any = "sum", flipped: tuple[str, ...] = ()) -> RowInfluence:
    tensors = [torch.tensor(each, dtype=torch.float64) for each in influences]
    num_validation, num_train = tensors[0].shape
    return RowInfluence(
        influences={f"block.{number}": each for number, each in enumerate(tensors)},
        train=tuple(ShownRow(f"t{number}", f"text <b>{number}</b>") for number in range(num_train)),
        validation=tuple(ShownRow(f"v{number}", f"asked {number}") for number in range(num_validation)),
        source="grad_dot()",
        over_layers=how,
        flipped=frozenset(flipped),
    )


LAYERS = [[[-9.0, 1, 2, 3]], [[3.0, -1, 2, 1]], [[2.0, -1, 0, 3]]]


def test_layers_are_summed_ranked_or_let_vote():
    by_layer = rows_of(*LAYERS).influences
    assert over_layers(by_layer, "sum").tolist() == [[-4, -1, 4, 7]]
    assert over_layers(by_layer, "mean_rank").tolist() == [[pytest.approx(8 / 3), pytest.approx(4 / 3), 8 / 3, 10 / 3]]
    assert over_layers(by_layer, "vote").tolist() == [[-1, -2, 0, 0]]
    with pytest.raises(ValueError, match=r"over_layers='votes' is not allowed; .* \(did you mean 'vote'\?\)"):
        over_layers(by_layer, "votes")  # type: ignore[arg-type]


@pytest.mark.parametrize(("how", "order"), [("sum", "0123"), ("mean_rank", "1023"), ("vote", "1023")])
def test_the_order_of_rows_is_that_of_the_layers_together(how, order):
    found = rows_of(*LAYERS, how=how)
    assert [row["row"] for row in found.most_helpful(9)] == [f"t{number}" for number in order]
    assert [row["row"] for row in found.most_harmful(2)] == [f"t{number}" for number in order[:1:-1]]


def test_tables_hold_the_mean_and_each_validation_row(tmp_path):
    found = rows_of([[1.0, -2, 0], [3.0, 0, -1]], [[1.0, 1, 1], [1.0, 1, 1]], flipped=("t0",))
    assert [row["influence"] for row in found.table()] == [3, 0, 0.5]
    assert [row["influence"] for row in found.table("v1")] == [4, 1, 0]
    assert [row["block.0"] for row in found.table("v1")] == [3, 0, -1]
    assert [row["row"] for row in found.most_harmful(1, "v0")] == ["t0"]
    found.save(tmp_path / "rows")
    rows, pairs = (pd.read_parquet(tmp_path / "rows" / f"{name}.parquet") for name in ("rows", "pairs"))
    pd.testing.assert_frame_equal(rows, found.frame())
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "rows" / "pairs.csv"), pairs, check_dtype=False)
    assert rows["flipped"].tolist() == [True, False, False]
    assert pairs.query("validation == 'v1' and train == 't2'")["influence"].tolist() == [0]
    assert np.isclose(pairs["influence"].mean(), rows["influence"].mean())


def test_the_page_escapes_texts_and_shows_every_list():
    found = rows_of([[1.0, -2, 0], [3.0, 0, -1]], flipped=("t0",))
    shares = TokenShares("t0", "v1", ("<i>", " hill"), (2.0, 1.0))
    page = rows_page(found, lines=["an AUC"], shares=shares)
    assert "text &lt;b&gt;0&lt;/b&gt;" in page
    assert "&lt;i&gt;" in page
    assert "<b>0" not in page
    assert page.count("made wrong") == 2 + 2 * 2  # both lists, over all and of two validation rows
    for said in (
        "an AUC",
        "Most helpful",
        "Most harmful",
        "Tokens of t0, on v1",
        "asked 1",
        "1 of 3 train rows are harmful",
    ):
        assert said in page


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="the estimator Uniform tells no influence of single rows; use datainf"):
        influence(estimator="uniform")
    with pytest.raises(ValueError, match=r"5 of 5 validation rows ask the same as train rows"):
        influence(validation=TRAIN[:5])
    found = influence()
    with pytest.raises(ValueError, match=r"there is no train row 'train 77' among the 10 that are measured \("):
        found.token_shares("train 77", "validation 0")
    with pytest.raises(ValueError, match="splits over its tokens only on the Grams of one model"):
        replace(found, tokens=None).token_shares("train 0", "validation 0")
