"""The shares of tokens add up to the influence of their row, each that of its own part of the gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layerif.estimators._base import GramEstimator
from layerif.estimators.cosine import Cosine
from layerif.estimators.datainf import DataInf
from layerif.estimators.exact import Exact
from layerif.estimators.grad_dot import GradDot
from layerif.estimators.lissa import Lissa
from layerif.evidence import CrossGram, MatrixGram
from tests.attribution.test_rows import TEXTS, influence
from tests.tiny import tiny_model

ESTIMATORS: list[GramEstimator] = [DataInf(), Exact(), Lissa(), Lissa(num_steps=3), GradDot(), Cosine()]
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda each: each.source)


@every_estimator
@pytest.mark.parametrize("num_params", [4, 30])
def test_the_influence_of_further_gradients_is_linear_and_that_of_train_gradients_is_their_own(estimator, num_params):
    generator = torch.Generator().manual_seed(0)
    train_NP, val_MP, more_TP = (
        torch.randn(num, num_params, dtype=torch.float64, generator=generator) for num in (8, 3, 5)
    )
    gram = MatrixGram(train_NP @ train_NP.T, val_MP @ train_NP.T, val_MP.norm(dim=1), num_params)

    def of(other_TP: torch.Tensor) -> torch.Tensor:
        norms = train_NP.norm(dim=1)[: len(other_TP)]
        return estimator.influence_of(gram, CrossGram(train_NP @ other_TP.T, val_MP @ other_TP.T, norms))

    torch.testing.assert_close(of(train_NP), estimator.influence(gram), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(of(2 * more_TP + train_NP[:5]), 2 * of(more_TP) + of(train_NP[:5]))
    if isinstance(estimator, Exact):
        damped_PP = train_NP.T @ train_NP / 8
        damped_PP.diagonal().add_(0.1 * train_NP.square().mean())
        torch.testing.assert_close(of(more_TP), -val_MP @ torch.linalg.solve(damped_PP, more_TP.T))


@every_estimator
def test_zero_gradients_have_no_influence(estimator):
    zero = torch.zeros(3, 3, dtype=torch.float64)
    gram = MatrixGram(zero, zero[:2], zero[0, :2], 4)
    assert not estimator.influence_of(gram, CrossGram(zero, zero[:2], zero[0])).any()


@pytest.mark.usefixtures("softmax_in_the_models_dtype")
@pytest.mark.parametrize("granularity", ["matrix", "block"])
@every_estimator
def test_the_shares_of_tokens_add_up_to_the_influence(estimator, granularity):
    found = influence(
        tiny_model().double(), TEXTS[:6], TEXTS[12:], estimator=replace(estimator, granularity=granularity)
    )
    shares = found.token_shares("train 5", "validation 1")
    assert shares.influence == pytest.approx(float(found.total[1, 5]), rel=1e-6)
    assert "".join(shares.tokens) == TEXTS[5]
    assert len({*shares.shares}) > 2


def test_rounding_is_said(monkeypatch):
    found = influence(estimator="grad_dot")
    monkeypatch.setattr(GradDot, "influence_of", lambda self, gram, others: -2 * others.validation.double())
    with pytest.warns(RuntimeWarning, match=r"the shares of the tokens add up to .* this is rounding"):
        found.token_shares("train 0", "validation 0")
