"""Estimators equal their dense definitions in float64, and every one found in the folder obeys the same laws."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import itertools
import json
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

import layerif.estimators
from layerif.allocate.experts import Experts
from layerif.allocate.rank import Rank
from layerif.allocate.sparsity import Sparsity
from layerif.estimators import _base
from layerif.estimators._base import CurveEstimator, DampedEstimator, GramEstimator, eigenbasis
from layerif.estimators.avss import Avss
from layerif.estimators.cca import Cca
from layerif.estimators.cluster_information import ClusterInformation
from layerif.estimators.cosine import Cosine, cosine
from layerif.estimators.datainf import DataInf, datainf
from layerif.estimators.ends import Ends
from layerif.estimators.exact import Exact, exact
from layerif.estimators.file import SavedScores
from layerif.estimators.grad_dot import GradDot, grad_dot
from layerif.estimators.linear_probe import LinearProbe
from layerif.estimators.lissa import Lissa, lissa, step_bound
from layerif.estimators.random import Random
from layerif.estimators.reversed import Reversed
from layerif.estimators.tracin import TracIn, tracin
from layerif.estimators.uniform import Uniform
from layerif.evidence import (
    DAMPINGS,
    CheckpointGrams,
    LayerActivations,
    LayerCurvature,
    LayerExperts,
    LayerGates,
    LayerGrams,
    LayerMasks,
    LayerRemovals,
    LayerSpectra,
    MatrixCurvature,
    MatrixGram,
)
from layerif.layers import LayerMap
from layerif.probe.activations import Activations
from layerif.probe.checkpoints import CheckpointPasses
from layerif.probe.curvature.request import Curvature
from layerif.probe.expert_outputs import ExpertOutputs
from layerif.probe.gates import Gates
from layerif.probe.grams.request import Grams
from layerif.probe.nothing import Nothing
from layerif.probe.removal import Removal
from layerif.probe.request import Request
from layerif.probe.spectra import Spectra
from layerif.probe.update_masks import UpdateMasks
from layerif.scores import LayerScores, aggregate

FILES = sorted(
    file.stem for file in Path(str(layerif.estimators.__file__)).parent.glob("*.py") if not file.stem.startswith("_")
)
CONF = Path(__file__).parents[2] / "conf" / "estimator"

LAYERS = LayerMap(
    names=("block.0", "block.1"), params=(("block.0.q", "block.0.o"), ("block.1.q", "block.1.o")), numel=(50, 40)
)
SIZES = {"block.0.q": 30, "block.0.o": 20, "block.1.q": 30, "block.1.o": 10}
NUM_TRAIN, NUM_VAL = 6, 4


def classes_of(stem: str) -> list[type[Any]]:
    module = importlib.import_module(f"layerif.estimators.{stem}")
    return [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and hasattr(cls, "score")
    ]


def curve_estimators_of(stem: str) -> list[type[Any]]:
    """The classes of a file that give curves instead of scores; tests/probe/curves states their laws."""
    module = importlib.import_module(f"layerif.estimators.{stem}")
    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    return [each for each in own if issubclass(each, CurveEstimator)]


GRAM_ESTIMATORS = [cls for stem in FILES for cls in classes_of(stem) if issubclass(cls, GramEstimator)]
DAMPED_ESTIMATORS = [cls for cls in GRAM_ESTIMATORS if issubclass(cls, DampedEstimator)]
# The settings without a default. These two checkpoints, where both are the same, weigh as one.
REQUIRED: dict[type, dict[str, Any]] = {
    TracIn: {"checkpoints": ["a", "b"], "learning_rates": [0.75, 0.25]},
    SavedScores: {"path": "scores.json"},
    Reversed: {"of": DataInf()},
}


def make(cls: type[Any], **changes: Any) -> Any:
    return cls(**REQUIRED.get(cls, {}) | changes)


def score(estimator: GramEstimator, grams: LayerGrams) -> LayerScores:
    """Scores the evidence that the estimator needs: these Grams, or these Grams at every checkpoint."""
    return estimator.score(grams if estimator.needs == Grams() else CheckpointGrams((grams, grams)))


def random_gradients(num_params: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    train_NP = torch.randn(NUM_TRAIN, num_params, dtype=torch.float64, generator=generator)
    val_MP = torch.randn(NUM_VAL, num_params, dtype=torch.float64, generator=generator)
    return train_NP + 0.5, val_MP + 0.5  # a common direction, as the samples of one task have


def gram_of(train_NP: torch.Tensor, val_MP: torch.Tensor) -> MatrixGram:
    return MatrixGram(train_NP @ train_NP.T, val_MP @ train_NP.T, val_MP.norm(dim=1), train_NP.shape[1])


def layer_grams() -> LayerGrams:
    grams = {name: gram_of(*random_gradients(size, seed=i)) for i, (name, size) in enumerate(SIZES.items())}
    return LayerGrams(LAYERS, grams, "f1")


def changed(grams: LayerGrams, change) -> LayerGrams:
    return replace(grams, grams={name: change(gram) for name, gram in grams.grams.items()})


def fisher_and_lambda(train_NP: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    return train_NP.T @ train_NP / len(train_NP), damping * float(train_NP.square().mean())


# Dense definitions, from explicit gradients


@pytest.mark.parametrize("num_params", [3, 20])
@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
def test_exact_solves_the_damped_fisher(num_params, damping):
    train_NP, val_MP = random_gradients(num_params, seed=1)
    fisher_PP, lam = fisher_and_lambda(train_NP, damping)
    dense_MN = -val_MP @ torch.linalg.solve(fisher_PP + lam * torch.eye(num_params, dtype=torch.float64), train_NP.T)
    gram = gram_of(train_NP, val_MP)
    ours_MN = exact(gram.train_train, gram.val_train, numel=num_params, damping=damping)
    torch.testing.assert_close(ours_MN, dense_MN, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_params", [3, 20])
@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
def test_datainf_averages_the_inverses_of_each_sample(num_params, damping):
    train_NP, val_MP = random_gradients(num_params, seed=2)
    _, lam = fisher_and_lambda(train_NP, damping)
    inverses = [
        torch.linalg.inv(torch.outer(g, g) + lam * torch.eye(num_params, dtype=torch.float64)) for g in train_NP
    ]
    dense_MN = -val_MP @ torch.stack(inverses).mean(dim=0) @ train_NP.T
    gram = gram_of(train_NP, val_MP)
    ours_MN = datainf(gram.train_train, gram.val_train, numel=num_params, damping=damping)
    torch.testing.assert_close(ours_MN, dense_MN, rtol=1e-8, atol=1e-8)


def test_datainf_takes_a_batch_of_matrices_of_the_same_size():
    grams = [gram_of(*random_gradients(20, seed=seed)) for seed in (2, 3)]
    grams.append(gram_of(torch.zeros(NUM_TRAIN, 20).double(), random_gradients(20, seed=4)[1]))
    one_by_one = [datainf(gram.train_train, gram.val_train, numel=20, damping=0.1) for gram in grams]
    train_train, val_train = (
        torch.stack([getattr(gram, part) for gram in grams]) for part in ("train_train", "val_train")
    )
    at_once_BMN = datainf(train_train, val_train, numel=20, damping=0.1)
    torch.testing.assert_close(at_once_BMN, torch.stack(one_by_one), rtol=1e-12, atol=0)
    assert not at_once_BMN[-1].any()


def test_grad_dot_and_cosine_are_their_definitions():
    train_NP, val_MP = random_gradients(20, seed=3)
    gram = gram_of(train_NP, val_MP)
    torch.testing.assert_close(grad_dot(gram.val_train), -val_MP @ train_NP.T)
    similarity_MN = torch.nn.functional.cosine_similarity(val_MP[:, None], train_NP[None], dim=2)
    torch.testing.assert_close(cosine(gram.train_train, gram.val_train, gram.val_norms), -similarity_MN)


def test_one_sample_makes_datainf_exact():
    train_NP, val_MP = random_gradients(20, seed=4)
    gram = gram_of(train_NP[:1], val_MP)
    torch.testing.assert_close(
        datainf(gram.train_train, gram.val_train, numel=20, damping=0.1),
        exact(gram.train_train, gram.val_train, numel=20, damping=0.1),
    )


@pytest.mark.parametrize("cls", DAMPED_ESTIMATORS)
def test_large_damping_makes_all_proportional_to_grad_dot(cls):
    gram = gram_of(*random_gradients(20, seed=5))
    lam = 1e9 * float(gram.train_train.trace()) / (NUM_TRAIN * 20)
    influence_MN = cls(damping=1e9).influence(gram)
    torch.testing.assert_close(influence_MN * lam, grad_dot(gram.val_train), rtol=1e-6, atol=1e-6)


def test_a_list_of_dampings_is_exact_at_each_from_one_eigendecomposition(monkeypatch):
    gram = gram_of(*random_gradients(20, seed=6))
    dampings = [10.0, 1e-4, 0.1]
    expected = [exact(gram.train_train.clone(), gram.val_train, numel=20, damping=damping) for damping in dampings]
    decompose, calls = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix) or decompose(matrix))
    for damping, alone_MN in zip(dampings, expected, strict=True):
        assert torch.equal(exact(gram.train_train, gram.val_train, numel=20, damping=damping), alone_MN)
    assert len(calls) == 1
    assert not exact(0 * gram.train_train, 0 * gram.val_train, numel=20, damping=0.1).any()


@pytest.mark.parametrize("granularity", ["matrix", "block"])
def test_all_settings_of_one_measurement_share_its_eigendecompositions(monkeypatch, granularity):
    variants = [
        cls(damping=damping, aggregation=aggregation, granularity=granularity)
        for cls in (Exact, Lissa)
        for damping in (0.01, 0.1, 1.0)
        for aggregation in ("all", "positive")
    ]
    alone = [variant.score(layer_grams()) for variant in variants]
    decompose, calls = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix) or decompose(matrix))
    grams = layer_grams()
    assert [variant.score(grams) for variant in variants] == alone
    assert len(calls) == (len(SIZES) if granularity == "matrix" else len(LAYERS.names))


@pytest.mark.parametrize("cls", [cls for cls in GRAM_ESTIMATORS if cls.needs == Grams()])
def test_grams_are_solved_once_for_all_aggregations_and_normalisations(monkeypatch, cls):
    variants = [
        cls(aggregation=aggregation, normalisation=normalisation)
        for aggregation in ("all", "positive", "top25")
        for normalisation in ("none", "numel")
    ]
    alone = [variant.score(layer_grams()) for variant in variants]
    solve, calls = cls.influences, []
    monkeypatch.setattr(cls, "influences", lambda self, grams: calls.append(self) or solve(self, grams))
    grams = layer_grams()
    assert [variant.score(grams) for variant in (*variants, *variants)] == alone * 2
    assert len(calls) == 1
    others = [cls(granularity="block"), *([cls(damping=2.0)] if issubclass(cls, DampedEstimator) else [])]
    assert [other.score(grams) for other in others] == [other.score(layer_grams()) for other in others]
    assert len(calls) == 1 + 2 * len(others)


def test_what_is_remembered_warns_as_it_did():
    zero_q = gram_of(torch.zeros(NUM_TRAIN, 30).double(), torch.zeros(NUM_VAL, 30).double())
    grams = replace(layer_grams(), grams={**layer_grams().grams, "block.0.q": zero_q})
    for aggregation in ("all", "all", "positive"):
        with pytest.warns(RuntimeWarning) as given:
            Lissa(num_steps=2, aggregation=aggregation).score(grams)
        of_zeros, of_steps = (str(warning.message) for warning in given)
        assert "in block.0.q (1 of 4" in of_zeros
        assert "num_steps=2" in of_steps
        assert {warning.filename for warning in given} == {__file__}


def test_an_eigenbasis_is_forgotten_with_its_gram_and_when_that_is_changed():
    kept = len(_base._EIGENBASES)
    gram_NN = gram_of(*random_gradients(20, seed=6)).train_train
    before = eigenbasis(gram_NN)[0]
    assert eigenbasis(gram_NN)[0] is before
    gram_NN.mul_(4)
    torch.testing.assert_close(eigenbasis(gram_NN)[0], 4 * before)
    del gram_NN
    assert len(_base._EIGENBASES) == kept


def iterated_lissa(gram: MatrixGram, lam: float, step: float, num_steps: int) -> torch.Tensor:
    u_MN = gram.val_train
    for _ in range(num_steps):
        u_MN = gram.val_train + (1 - step * lam) * u_MN - step / len(gram.train_train) * u_MN @ gram.train_train
    return -step * u_MN


@settings(deadline=None, max_examples=30)
@given(
    num_params=st.sampled_from([3, 20]),
    damping=st.floats(1e-4, 10),
    num_steps=st.integers(1, 1000),
    share_of_bound=st.floats(1e-6, 0.999) | st.none(),
)
@example(num_params=3, damping=1e-4, num_steps=1, share_of_bound=0.999)
@example(num_params=20, damping=1e-4, num_steps=1000, share_of_bound=0.999)  # an even number: the last factor is odd
@example(num_params=20, damping=1e-4, num_steps=11, share_of_bound=0.999)
@example(num_params=3, damping=10.0, num_steps=1000, share_of_bound=1e-6)
def test_lissa_is_its_iteration(num_params, damping, num_steps, share_of_bound):
    train_NP, val_MP = random_gradients(num_params, seed=8)
    gram, (fisher_PP, lam) = gram_of(train_NP, val_MP), fisher_and_lambda(train_NP, damping)
    bound = 2 / (float(torch.linalg.eigvalsh(fisher_PP)[-1]) + lam)
    assert step_bound(gram.train_train, numel=num_params, damping=damping) == pytest.approx(bound)
    step = None if share_of_bound is None else share_of_bound * bound
    ours_MN = lissa(
        gram.train_train, gram.val_train, numel=num_params, damping=damping, num_steps=num_steps, step_size=step
    )
    steps_MN = iterated_lissa(gram, lam, bound / 2 if step is None else step, num_steps)
    torch.testing.assert_close(ours_MN, steps_MN, rtol=1e-9, atol=1e-9 * float(steps_MN.abs().max()))


@pytest.mark.parametrize("share_of_bound", [0.5, 0.99])
def test_lissa_converges_to_exact_and_its_residual_is_the_distance(share_of_bound):
    gram = gram_of(*random_gradients(20, seed=9))
    exact_MN = exact(gram.train_train, gram.val_train, numel=20, damping=0.1)
    step = share_of_bound * step_bound(gram.train_train, numel=20, damping=0.1)
    residuals = []
    for num_steps in (1, 10, 100, 1000, 100_000):
        influence_MN, residual = Lissa(damping=0.1, num_steps=num_steps, step_size=step).solve(gram)
        residuals.append(residual)
        distance = float((influence_MN - exact_MN).norm() / exact_MN.norm())
        assert residuals[-1] == pytest.approx(distance, rel=1e-6, abs=1e-12)
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] > 0.1
    assert residuals[-1] < 1e-9
    torch.testing.assert_close(influence_MN, exact_MN, rtol=1e-9, atol=1e-9)


def test_lissa_keeps_directions_far_below_the_largest():
    # αs = 1e-17 in the second: 1 − αs is 1 in float64, and a power of it would leave nothing.
    gram_NN = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    influence_MN = lissa(gram_NN, torch.tensor([[0.0, 1.0]]), numel=10**16, damping=0.1, num_steps=9)
    assert float(influence_MN[0, 1]) == pytest.approx(-10 * 2, rel=1e-9)  # T + 1 terms of α = 1/(1/N)


def test_a_diverging_step_is_refused_with_its_bound():
    grams = layer_grams()
    bounds = {name: step_bound(gram.train_train, numel=gram.numel, damping=0.1) for name, gram in grams.grams.items()}
    tightest = min(bounds, key=bounds.__getitem__)
    gram, bound = grams.grams[tightest], bounds[tightest]
    for step in (bound, 1.001 * bound, 1e9):
        with pytest.raises(ValueError, match=rf"step_size=.* diverge: it must be below {bound:.6g}"):
            lissa(gram.train_train, gram.val_train, numel=gram.numel, damping=0.1, num_steps=3, step_size=step)
    with pytest.raises(ValueError, match=rf"below {bound:.6g}.* of '{tightest}', the smallest of 4.*null"):
        Lissa(step_size=max(bounds.values())).score(grams)
    assert Lissa(step_size=0.9 * bound).score(grams).values == pytest.approx(Exact().score(grams).values, rel=1e-6)


@pytest.mark.parametrize("granularity", ["matrix", "block"])
def test_unconverged_lissa_warns_of_the_worst_matrix_and_converged_lissa_does_not(granularity):
    grams = layer_grams()
    estimator = Lissa(num_steps=2, granularity=granularity)
    residuals = {name: estimator.solve(gram)[1] for name, gram in estimator.solvable(grams).grams.items()}
    worst = max(residuals, key=residuals.__getitem__)
    assert residuals[worst] > 0.1
    with pytest.warns(
        RuntimeWarning, match=rf"num_steps=2.*by {residuals[worst]:.0%} in '{worst}'.*of {len(residuals)}"
    ):
        estimator.score(grams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lissa(granularity=granularity).score(grams)


def test_lissa_without_gradients_is_zero_and_has_nothing_left():
    gram_NN, gram_MN = torch.zeros(3, 3), torch.zeros(2, 3)
    assert not lissa(gram_NN, gram_MN, numel=5, damping=0.1, num_steps=10, step_size=1.0).any()
    for train_train in (gram_NN, torch.eye(3)):
        assert Lissa(num_steps=10).solve(MatrixGram(train_train, gram_MN, torch.zeros(2), 5))[1] == 0


def test_tracin_is_grad_dot_weighted_by_the_learning_rates():
    grams = [gram_of(*random_gradients(20, seed=seed)) for seed in (10, 11, 12)]
    rates = [0.3, 0.2, 0.1]
    expected_MN = sum(rate * grad_dot(gram.val_train) for rate, gram in zip(rates, grams, strict=True))
    torch.testing.assert_close(tracin([gram.val_train for gram in grams], rates), expected_MN)
    # the gradients of all checkpoints laid end to end, each times √η
    pairs = [random_gradients(20, seed=seed) for seed in (10, 11, 12)]
    train_NP, val_MP = (
        torch.cat([rate**0.5 * pair[part] for rate, pair in zip(rates, pairs, strict=True)], dim=1) for part in (0, 1)
    )
    torch.testing.assert_close(tracin([gram.val_train for gram in grams], rates), -val_MP @ train_NP.T)


def test_tracin_scores_the_sum_over_checkpoints():
    first, second = layer_grams(), changed(layer_grams(), lambda gram: replace(gram, val_train=2 * gram.val_train))
    estimator = TracIn(checkpoints=["a", "b"], learning_rates=[0.5, 0.1])
    scores = estimator.score(CheckpointGrams((first, second)))
    assert scores.values == pytest.approx([0.7 * value for value in GradDot().score(first).values])
    assert "learning_rates=[0.5, 0.1]" in scores.source


def test_zeros_at_one_checkpoint_are_no_warning():
    zero = changed(
        layer_grams(),
        lambda gram: MatrixGram(0 * gram.train_train, 0 * gram.val_train, 0 * gram.val_norms, gram.numel),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = make(TracIn).score(CheckpointGrams((zero, layer_grams())))
    assert min(scores.values) > 0


@pytest.mark.parametrize(
    ("checkpoints", "learning_rates", "message"),
    [
        ([], [], "gives 0 for 0"),
        (["a", "b"], [0.1], "gives 1 for 2 estimator.checkpoints"),
        (["a"], [0.0], "learning_rates=0.0 is not allowed"),
        (["a"], [float("nan")], "learning_rates=nan is not allowed"),
    ],
)
def test_checkpoints_and_learning_rates_must_match(checkpoints, learning_rates, message):
    with pytest.raises(ValueError, match=message):
        TracIn(checkpoints=checkpoints, learning_rates=learning_rates)
    with pytest.raises(ValueError, match=message):
        tracin([torch.ones(2, 3) for _ in checkpoints], learning_rates)


def test_tracin_refuses_other_samples_and_other_layers():
    with pytest.raises(ValueError, match=r"same samples.*\(2, 3\), \(2, 4\)"):
        tracin([torch.ones(2, 3), torch.ones(2, 4)], [0.1, 0.1])
    grams = layer_grams()
    other = replace(grams, layers=replace(LAYERS, names=("h.0", "h.1")))
    with pytest.raises(ValueError, match="checkpoint 2 of 2 has other layers"):
        CheckpointGrams((grams, other))
    with pytest.raises(ValueError, match="at least one"):
        CheckpointGrams(())
    with pytest.raises(ValueError, match="gives 2 for 1"):
        make(TracIn).score(CheckpointGrams((grams,)))


def test_damping_bounds_exact_influence_under_the_noise_of_a_float32_gram():
    # ‖I_j‖ <= ‖C_j‖/λ for every K >= 0; a noise eigenvalue just above −N·λ must not break the bound.
    noisy_NN = torch.diag(torch.tensor([1.0, -0.99e-8], dtype=torch.float64))
    gram_MN = torch.tensor([[1.0, 1e-4]])
    lam = 0.1 / (2 * 10**7)
    influence_MN = exact(noisy_NN, gram_MN, numel=10**7, damping=0.1)
    assert float(influence_MN.norm()) <= float(gram_MN.norm()) / lam
    assert float(influence_MN[0, 1]) == pytest.approx(-1e-4 / lam, rel=1e-6)


def test_helpful_is_negative():
    gradient = torch.ones(1, 5, dtype=torch.float64)
    for cls in GRAM_ESTIMATORS:
        assert float(make(cls).influence(gram_of(gradient, gradient))) < 0


@pytest.mark.parametrize(
    "wrong",
    [
        *({"damping": value} for value in (0.0, -0.1, float("nan"), float("inf"))),
        {"num_steps": 0},
        {"step_size": 0.0},
        {"step_size": float("nan")},
    ],
)
def test_pure_functions_refuse_what_their_estimators_refuse(wrong):
    for pure, cls in ((datainf, DataInf), (exact, Exact), (lissa, Lissa)):
        given = {"damping": 0.1, **({"num_steps": 10} if pure is lissa else {})}
        if wrong.keys() <= inspect.signature(pure).parameters.keys():
            (name,) = wrong
            for refused in (
                lambda cls=cls: cls(**wrong),
                lambda pure=pure, given=given: pure(torch.eye(2), torch.ones(1, 2), numel=3, **{**given, **wrong}),
            ):
                with pytest.raises(ValueError, match=rf"estimator\.{name}=\S+ is not allowed; allowed: "):
                    refused()


@pytest.mark.parametrize("cls", DAMPED_ESTIMATORS)
def test_absolute_damping_is_lambda_itself_and_relative_a_share_of_the_mean_square(cls):
    train_NP, val_MP = random_gradients(20, seed=13)
    gram, mean_square = gram_of(train_NP, val_MP), float(train_NP.square().mean())
    by_lambda = cls(damping=0.3 * mean_square, damping_rule="absolute").influence(gram)
    torch.testing.assert_close(by_lambda, cls(damping=0.3).influence(gram), rtol=1e-9, atol=1e-9)
    # Gradients c times as large have the same influence only under the relative rule.
    larger = gram_of(7 * train_NP, 7 * val_MP)
    torch.testing.assert_close(cls().influence(larger), cls().influence(gram))
    absolute = cls(damping_rule="absolute")
    assert not torch.allclose(absolute.influence(larger), absolute.influence(gram), rtol=1e-3)
    assert not absolute.influence(gram_of(0 * train_NP, val_MP)).any()


def test_a_sample_without_gradient_has_no_cosine():
    train_NP, val_MP = random_gradients(20, seed=7)
    train_NP[1], val_MP[2] = 0, 0
    gram = gram_of(train_NP, val_MP)
    influence_MN = cosine(gram.train_train, gram.val_train, gram.val_norms)
    assert bool(influence_MN.isfinite().all())
    assert not influence_MN[2].any()
    assert not influence_MN[:, 1].any()


# Laws of every estimator on Grams, found by its file


def test_the_folder_holds_the_estimators_of_the_paper():
    assert {DataInf, Exact, Lissa, GradDot, Cosine, TracIn} <= set(GRAM_ESTIMATORS)


@pytest.fixture(params=GRAM_ESTIMATORS, ids=lambda cls: cls.__name__)
def estimator_class(request) -> type[GramEstimator]:
    return request.param


@pytest.fixture(params=["all", "positive", "top25"])
def estimator(estimator_class, request) -> GramEstimator:
    return make(estimator_class, aggregation=request.param)


def test_scores_are_finite_and_carry_layers_and_fingerprint(estimator):
    scores = score(estimator, layer_grams())
    assert scores.layers == LAYERS.names
    assert all(value > 0 for value in scores.values)
    measured = "f1" if estimator.needs == Grams() else hashlib.sha256(b"f1 f1").hexdigest()
    assert (scores.higher_means, scores.fingerprint) == ("undertrained", measured)
    assert f"aggregation={estimator.aggregation}" in scores.source


def test_scores_do_not_depend_on_the_order_of_samples(estimator):
    train_order, val_order = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 3, 1, 0])
    shuffled = changed(
        layer_grams(),
        lambda gram: MatrixGram(
            gram.train_train[train_order][:, train_order],
            gram.val_train[val_order][:, train_order],
            gram.val_norms[val_order],
            gram.numel,
        ),
    )
    assert score(estimator, shuffled).values == pytest.approx(score(estimator, layer_grams()).values, rel=1e-9)


def test_zero_gradients_score_zero_and_warn_by_name(estimator):
    zero = changed(
        layer_grams(),
        lambda gram: MatrixGram(0 * gram.train_train, 0 * gram.val_train, 0 * gram.val_norms, gram.numel),
    )
    with pytest.warns(RuntimeWarning, match=r"block\.0\.q.*4 of 4"):
        assert score(estimator, zero).values == (0.0, 0.0)


def test_a_zero_matrix_adds_nothing_to_its_block(estimator_class):
    grams = layer_grams()
    zero_q = gram_of(torch.zeros(NUM_TRAIN, 30).double(), torch.zeros(NUM_VAL, 30).double())
    with pytest.warns(RuntimeWarning, match=r"in block\.0\.q \(1 of 4"):
        scores = score(make(estimator_class), replace(grams, grams={**grams.grams, "block.0.q": zero_q}))
    alone = abs(aggregate(make(estimator_class).influence(grams.grams["block.0.o"])))
    assert scores.values[0] == pytest.approx(alone, rel=1e-12)


def test_float32_grams_score_like_float64(estimator):
    single = changed(
        layer_grams(),
        lambda gram: MatrixGram(gram.train_train.float(), gram.val_train.float(), gram.val_norms.float(), gram.numel),
    )
    gram = single.grams["block.0.q"]
    assert estimator.influence(gram).dtype == torch.float64
    assert score(estimator, single).values == pytest.approx(score(estimator, layer_grams()).values, rel=1e-3)


@pytest.mark.parametrize("field", ["train_train", "val_train", "val_norms"])
def test_a_non_finite_gram_is_refused_by_name(estimator_class, field):
    grams = layer_grams()
    tensor = getattr(grams.grams["block.1.o"], field).clone()
    tensor.view(-1)[0] = float("nan")
    broken = replace(grams, grams={**grams.grams, "block.1.o": replace(grams.grams["block.1.o"], **{field: tensor})})
    with pytest.raises(ValueError, match=rf"{field} of 'block\.1\.o' is not finite"):
        score(make(estimator_class), broken)


def test_matrix_granularity_sums_influences_and_block_takes_one_gram(estimator_class):
    grams = layer_grams()
    q, o = grams.grams["block.0.q"], grams.grams["block.0.o"]
    by_matrix = make(estimator_class, aggregation="positive")
    by_block = make(estimator_class, aggregation="positive", granularity="block")
    of_sum = abs(aggregate(by_matrix.influence(q) + by_matrix.influence(o), "positive"))
    of_whole = abs(aggregate(by_matrix.influence(q + o), "positive"))
    assert score(by_matrix, grams).values[0] == pytest.approx(of_sum, rel=1e-12)
    assert score(by_block, grams).values[0] == pytest.approx(of_whole, rel=1e-12)
    # Only an estimator linear in the Gram cannot tell them apart.
    assert (of_sum == pytest.approx(of_whole, rel=1e-9)) == (estimator_class in (GradDot, TracIn))


def test_normalisation_divides_by_the_parameters_of_the_block(estimator_class):
    plain = score(make(estimator_class), layer_grams()).values
    per_parameter = score(make(estimator_class, normalisation="numel"), layer_grams()).values
    expected = [value / numel for value, numel in zip(plain, LAYERS.numel, strict=True)]
    assert per_parameter == pytest.approx(expected, rel=1e-12)


# Laws of every estimator whatever it needs, found by its file


DEEP = LayerMap(
    names=tuple(f"block.{l}" for l in range(8)),
    params=tuple((f"block.{l}.q", f"block.{l}.o") for l in range(8)),
    numel=(30 * 12,) * 8,
)
ESTIMATORS = [cls for stem in FILES for cls in classes_of(stem) if cls is not SavedScores]
NUM_SAMPLES, HIDDEN = 20, 6


def evidence(needs: Request, *, alike: bool = False, order: Sequence[int] = range(8)) -> Any:
    """Random evidence of each kind, every block drawn on its own or all alike, listed in any order."""
    names, params, numel = (tuple(part[l] for l in order) for part in (DEEP.names, DEEP.params, DEEP.numel))
    layers: Any = LayerMap(names, params, numel)  # type: ignore[arg-type]

    def draw(*shape: int, salt: int) -> dict[int, torch.Tensor]:
        generators = {l: torch.Generator().manual_seed(100 * salt + (0 if alike else l + 1)) for l in order}
        return {l: torch.rand(shape, dtype=torch.float64, generator=generators[l]) + 0.01 for l in order}

    def stacked(*shape: int, salt: int) -> torch.Tensor:
        return torch.stack(list(draw(*shape, salt=salt).values()))

    of_q, of_o = draw(12, 30, salt=1), draw(30, 12, salt=2)
    weights = {
        f"block.{l}.{name}": of[l] ** -2 for l in order for name, of in (("q", of_q), ("o", of_o))
    }  # heavy tails
    if isinstance(needs, Grams | CheckpointPasses):
        train, validation = draw(NUM_TRAIN, 40, salt=3), draw(NUM_VAL, 40, salt=4)
        grams = {
            f"block.{l}.{name}": gram_of(train[l][:, part], validation[l][:, part])
            for l in order
            for name, part in (("q", slice(0, 25)), ("o", slice(25, 40)))
        }
        found = LayerGrams(layers, grams, "f1")
        return CheckpointGrams((found, found)) if isinstance(needs, CheckpointPasses) else found
    if isinstance(needs, Spectra):
        spectra = {name: torch.linalg.svdvals(weight).square().flip(0) for name, weight in weights.items()}
        return LayerSpectra(layers, spectra, (0.1,) * 8, "f1")
    if isinstance(needs, Activations):
        norms = draw(42, salt=5)
        right, wrong = stacked(NUM_SAMPLES, HIDDEN, salt=9), stacked(NUM_SAMPLES, HIDDEN, salt=10)
        return LayerActivations(
            layers=layers,
            input_square_norms={f"block.{l}.q": norms[l][:30] for l in order}
            | {f"block.{l}.o": norms[l][30:] for l in order},
            weight=weights.__getitem__,
            cosines=stacked(salt=6) * 0.9,
            variances=stacked(salt=7),
            sparsities=stacked(salt=8) * 0.5,
            num_entries=1000,
            epsilon=Avss().epsilon,
            prompts=right,
            right=right,
            wrong=wrong,
            answers=tuple("abab" * (NUM_SAMPLES // 4)),
            embedded={"prompts": right[0], "right": right[0], "wrong": wrong[0]},
            moments={what: moments_of(stacked(NUM_SAMPLES, 30, salt=s)) for what, s in (("right", 12), ("wrong", 13))},
            fingerprint="f1",
        )
    if isinstance(needs, UpdateMasks):
        sums = {name: float(weight.rsqrt().sum()) for name, weight in weights.items()}
        return LayerMasks(layers, sums, "f1")
    if isinstance(needs, Removal):
        errors = {name: float(weight.square().sum()) for name, weight in weights.items()}
        return LayerRemovals(layers, errors, "f1")
    if isinstance(needs, Curvature):
        at_dampings = {l: -torch.stack([of_q[l] / (of_q[l] + damping) for damping in DAMPINGS]) for l in order}
        matrices = {
            f"block.{l}.{name}": MatrixCurvature(dict.fromkeys(needs.spectra, at_dampings[l]), 1.0)
            for name in "qo"
            for l in order
        }
        return LayerCurvature(layers, matrices, "f1")
    if isinstance(needs, ExpertOutputs):
        return LayerExperts(layers, stacked(salt=12).double().abs(), torch.full((len(names),), 5), 40, "f1")
    return LayerGates(layers, stacked(salt=11), "f1") if isinstance(needs, Gates) else layers


def moments_of(entries_LSE: torch.Tensor) -> torch.Tensor:
    """The moments of answers whose tokens have these entries (L×S×E): their number, sums, squares and near zeros."""
    near_LSE = (entries_LSE.abs() < Avss().epsilon).double()
    return torch.stack([of.sum(2) for of in (torch.ones_like(entries_LSE), entries_LSE, entries_LSE**2, near_LSE)], 2)


@pytest.fixture(params=ESTIMATORS, ids=lambda cls: cls.__name__)
def any_estimator(request) -> Any:
    settings = {
        LinearProbe: {"folds": 2},
        Cca: {"sets": 1, "regulariser": 0.1},
        ClusterInformation: {"clusters": 5, "sets": 2},
    }
    return make(request.param, **settings.get(request.param, {}))  # each fold takes long, and samples are few


def test_every_estimator_names_its_layers_direction_and_source(any_estimator):
    scores = any_estimator.score(evidence(any_estimator.needs))
    assert scores.layers == DEEP.names
    assert scores.higher_means in ("undertrained", "important")
    assert scores.source.startswith(type(any_estimator).__module__.rpartition(".")[2])
    assert scores == any_estimator.score(evidence(any_estimator.needs))
    assert isinstance(any_estimator, Uniform) or len(set(scores.values)) > 1


def test_every_estimator_is_usable_for_experts_rank_and_sparsity(any_estimator):
    scores = any_estimator.score(evidence(any_estimator.needs))
    assert sum(Experts(budget=40)(scores, DEEP).values) == 40
    assert sum(Rank(budget=64)(scores, DEEP).values) == 64
    for rule in ("scaled", "shifted"):
        allocation = Sparsity(target=0.5, smoothing=False, rule=rule)(scores, DEEP)
        assert sum(allocation.values) / 8 == pytest.approx(0.5, abs=1e-6)


def test_a_higher_score_never_gets_less_and_sparsity_follows_the_direction(any_estimator):
    scores = any_estimator.score(evidence(any_estimator.needs))
    sign = 1 if scores.higher_means == "undertrained" else -1
    experts, rank = (allocator(scores, DEEP).values for allocator in (Experts(budget=40), Rank(budget=64)))
    sparsity = Sparsity(target=0.5, smoothing=False)(scores, DEEP).values
    for l, k in itertools.permutations(range(8), 2):
        if scores.values[l] > scores.values[k]:
            assert experts[l] >= experts[k]
            assert rank[l] >= rank[k]
            assert sign * (sparsity[l] - sparsity[k]) >= 0


def test_turned_round_twice_is_as_before(any_estimator):
    found = evidence(any_estimator.needs)
    plain, once = any_estimator.score(found), Reversed(of=any_estimator).score(found)
    assert Reversed(of=Reversed(of=any_estimator)).score(found).values == pytest.approx(plain.values, rel=1e-9)
    assert [once.values[l] for l in _ranking(plain)[::-1]] == sorted(once.values)
    assert (once.layers, once.higher_means) == (plain.layers, plain.higher_means)


def test_blocks_alike_get_a_uniform_allocation(any_estimator):
    if any_estimator.score(evidence(any_estimator.needs)).source.startswith(("random", "ends")):
        pytest.skip("these scores are of the layers' names alone")
    scores = any_estimator.score(evidence(any_estimator.needs, alike=True))
    assert Experts(budget=40)(scores, DEEP).values == (5,) * 8
    assert Rank(budget=64)(scores, DEEP).values == (8,) * 8
    assert Sparsity(smoothing=False)(scores, DEEP).values == pytest.approx([0.5] * 8)


def test_the_order_of_blocks_does_not_matter(any_estimator):
    order = (3, 0, 7, 5, 1, 2, 6, 4)
    listed, shuffled = (any_estimator.score(evidence(any_estimator.needs, order=o)) for o in (range(8), order))
    assert shuffled.layers == tuple(f"block.{l}" for l in order)
    expected = listed.by_name()
    assert shuffled.by_name() == pytest.approx({name: expected[name] for name in shuffled.layers}, rel=1e-9)


# Files: every estimator has its configuration


def of_yaml(stem: str) -> DictConfig:
    """The YAML of one choice, in a root with the seed and with the choice that it nests in itself."""
    config: Any = OmegaConf.load(CONF / f"{stem}.yaml")
    for nested in config.pop("defaults", []):
        ((name, choice),) = nested.items()
        if not name.startswith("override "):  # the allocator that fits it, which is no part of it
            config[name.partition("@")[2]] = of_yaml(choice)
    pruner = OmegaConf.load(CONF.parent / "pruner" / "wanda.yaml")
    return OmegaConf.create({"estimator": config, "seed": 0, "pruner": pruner}).estimator


@pytest.mark.parametrize("stem", FILES)
def test_every_estimator_has_a_yaml_that_binds_with_every_field(stem):
    (cls,) = classes_of(stem) or curve_estimators_of(stem)
    config = of_yaml(stem)
    assert {str(key) for key in config} == {"_target_", *(field.name for field in fields(cls))}
    config.update({} if cls is Reversed else REQUIRED.get(cls, {}))  # a nested choice has its own YAML
    estimator = instantiate(config)
    assert type(estimator) is cls
    assert estimator == make(cls)
    assert isinstance(estimator.needs, Request)


def test_every_yaml_has_an_estimator():
    assert sorted(file.stem for file in CONF.glob("*.yaml")) == FILES


# Estimators that measure nothing


def test_uniform_scores_every_layer_the_same():
    scores = Uniform().score(LAYERS)
    assert scores.layers == LAYERS.names
    assert len(set(scores.values)) == 1


def test_random_scores_are_a_function_of_the_seed_and_the_name():
    scores = Random(seed=3).score(LAYERS)
    assert scores == Random(seed=3).score(LAYERS)
    assert scores.values != Random(seed=4).score(LAYERS).values
    turned = replace(LAYERS, names=LAYERS.names[::-1])
    assert Random(seed=3).score(turned).values == scores.values[::-1]
    assert len(set(scores.values)) == 2
    assert all(0 <= value < 1 for value in scores.values)


def test_ends_are_the_first_and_the_last_blocks_by_their_numbers():
    assert Ends(number=2).score(DEEP).values == (1, 1, 0, 0, 0, 0, 1, 1)
    assert Ends(number=3).score(replace(DEEP, names=DEEP.names[::-1])).values == (1, 1, 1, 0, 0, 1, 1, 1)
    assert Ends().score(DEEP).higher_means == "important"
    with pytest.raises(ValueError, match=r"number=4 at either end leaves none of 8 layers .* use estimator\.number<=3"):
        Ends(number=4).score(DEEP)
    with pytest.raises(ValueError, match=r"estimator\.number=0 is not allowed"):
        Ends(number=0)


# Scores upside down


def test_reversed_turns_the_order_round_and_twice_is_the_identity():
    grams = layer_grams()
    for of in (DataInf(), Exact(aggregation="top25"), Cosine()):
        plain, once = of.score(grams), Reversed(of=of).score(grams)
        twice = Reversed(of=Reversed(of=of)).score(grams)
        assert plain.values[0] != plain.values[1]
        assert once.values == pytest.approx(plain.values[::-1], rel=1e-12)  # of two layers
        assert twice.values == pytest.approx(plain.values, rel=1e-12)
        assert once.higher_means == plain.higher_means
        assert once.source == f"reversed({plain.source})"


@pytest.mark.parametrize("values", [[1, 1, 1], [0, 3, 3, 1e-300], [5, 0, 2, 9, 2], [1e-9, 1e9, 1.0]])
def test_reversed_keeps_ties_and_ends(values, tmp_path):
    layers = LayerMap(tuple(f"b.{i}" for i in range(len(values))), (("q",),) * len(values), (1,) * len(values))
    path = write(tmp_path, {"layers": list(layers.names), "values": values, "higher_means": "important"})
    once = Reversed(of=SavedScores(path=path)).score(layers).values
    assert (min(once), max(once)) == (min(values), max(values))
    for i, j in itertools.combinations(range(len(values)), 2):
        assert (once[i] - once[j]) * (values[i] - values[j]) <= 0
        assert values[i] != values[j] or once[i] == once[j]


def test_reversed_needs_what_the_wrapped_one_needs():
    checkpoints = make(TracIn)
    assert Reversed(of=Reversed(of=checkpoints)).needs == CheckpointPasses(("a", "b"))
    assert Reversed(of=SavedScores(path="scores.json")).needs.paths == ("scores.json",)
    assert Reversed(of=Uniform()).needs == Nothing()
    assert copy.deepcopy(Reversed(of=checkpoints)) == Reversed(of=checkpoints)


def write(folder: Path, content: object) -> str:
    file = folder / "saved.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_file_reads_scores_by_name_in_any_order(tmp_path):
    path = write(tmp_path, {"layers": ["block.1", "block.0"], "values": [1, 2.5], "higher_means": "important"})
    scores = SavedScores(path=path).score(LAYERS)
    assert scores.values == (2.5, 1)
    assert scores.higher_means == "important"
    assert path in scores.source


def test_file_reads_what_to_dict_wrote(tmp_path):
    scores = DataInf().score(layer_grams())
    read = SavedScores(path=write(tmp_path, scores.to_dict())).score(LAYERS)
    assert (read.layers, read.values, read.higher_means) == (scores.layers, scores.values, scores.higher_means)
    assert read.fingerprint == "f1"
    assert scores.source in read.source


def test_file_reads_the_record_of_a_run(tmp_path):
    scores = Exact().score(layer_grams())
    saved = {"layers": list(scores.layers), "values": list(scores.values), "higher_means": "undertrained"}
    today = {"version": 2, "config": {}, "fingerprint": "f1", "decision": {"source": scores.source, "scores": saved}}
    of_0_1_0 = {
        "config": {},
        "layers": saved["layers"],
        "scores": saved["values"],
        "higher_means": "undertrained",
        "source": scores.source,
        "fingerprint": "f1",
        "allocation": {"values": [1, 1]},
    }
    for record in (today, of_0_1_0):
        read = SavedScores(path=write(tmp_path, record)).score(LAYERS)
        assert (read.values, read.fingerprint) == (scores.values, "f1")
        assert scores.source in read.source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": ["block.0", "block.2"], "values": [1, 2], "higher_means": "important"}, r"block\.2.*did you mean"),
        ({"layers": ["block.0"], "values": [1], "higher_means": "important"}, r"lacks 1 of the model's 2 layers"),
        ({"layers": ["block.0", "block.1"], "values": [1], "higher_means": "important"}, "1 for 2 layers"),
        ({"layers": ["block.0", "block.1"], "values": [1, -2], "higher_means": "important"}, r">= 0.*block\.1"),
        ({"layers": ["block.0", "block.1"], "values": [1, 2], "higher_means": "better"}, r"higher_means in .*saved"),
        ({"layers": ["block.0", "block.1"], "values": [1, 2]}, "lacks higher_means"),
        ({"layers": "block.0", "values": [1], "higher_means": "important"}, "lists"),
        ([1, 2], "lacks layers, values, higher_means"),
        ({"version": 2, "config": {}, "decision": {"scores": None}}, "lacks layers, values, higher_means"),
        ({"version": 2, "config": {}, "decision": None}, "lacks layers, values, higher_means"),
    ],
)
def test_file_refuses_scores_of_another_model_or_shape(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        SavedScores(path=write(tmp_path, content)).score(LAYERS)


def _ranking(scores: LayerScores) -> list[int]:
    return sorted(range(len(scores.values)), key=lambda l: scores.values[l])


def test_scoring_real_gradients_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DataInf().score(layer_grams()).values[0] > 0
