"""The arithmetic of the trust report against theory and dense references, and the rules of its verdicts."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from layerif.data.batches import Encoded, Encodings
from layerif.data.rows import example_of
from layerif.diagnose import leave_out
from layerif.diagnose.agreement import agreement, panel, total_influence
from layerif.diagnose.conclusions import Verdict, above, conclusions
from layerif.diagnose.controls import bm25, hidden_cosine, pooled
from layerif.diagnose.convex import convex_check
from layerif.diagnose.gradients import common_share, gradient_health
from layerif.diagnose.leave_out import (
    beyond_random,
    lds,
    lds_estimates,
    left_out_sets,
    membership,
    most_helpful,
    noise,
    predicted_change,
    seed_agreement,
)
from layerif.diagnose.mislabel import auc_draws, curve, detection, flip, harm
from layerif.diagnose.report import plain
from layerif.diagnose.solver import residual, solver_residuals
from layerif.diagnose.stability import damping_profiles, halves, profile_correlations, stepped_up
from layerif.estimators._reliability import bootstrap_scores, rank_intervals, ranks
from layerif.estimators.datainf import DataInf
from layerif.estimators.exact import Exact
from layerif.estimators.grad_dot import GradDot
from layerif.estimators.lissa import Lissa
from layerif.evidence import LayerGrams, MatrixGram
from layerif.layers import LayerMap
from layerif.probe.grams.request import Grams
from layerif.stats import Estimate, percentile, spearman
from tests.estimators.test_estimators import GRAM_ESTIMATORS, LAYERS, gram_of, layer_grams
from tests.tiny import shipped_task, tiny_model

RNG = np.random.default_rng(0)


def random_grams(num_train: int = 12, num_val: int = 8, num_params: int = 30, *, seed: int = 0) -> LayerGrams:
    generator = torch.Generator().manual_seed(seed)
    grams = {}
    for place, name in enumerate(name for params in LAYERS.params for name in params):
        rows = torch.randn(num_train + num_val, num_params, dtype=torch.float64, generator=generator) + 0.3 * place
        grams[name] = gram_of(rows[:num_train], rows[num_train:])
    return LayerGrams(LAYERS, grams, "f")


# Leave-k-out


@pytest.mark.parametrize("seed", range(2))
def test_where_theory_is_exact_predicted_and_actual_change_agree(seed):
    found = convex_check(seed=seed)
    assert found.lds["true Hessian"] > 0.99
    assert found.lds["exact"] > 0.95
    # The sizes agree as well as the order: a lost 1/N or a wrong damping would show here.
    slope = np.polyfit(found.predicted["true Hessian"].ravel(), found.actual_SM.ravel(), 1)[0]
    assert slope == pytest.approx(1, abs=0.1)
    assert lds(-found.predicted["exact"], found.actual_SM) < -0.95


def test_the_predicted_change_is_minus_the_mean_share_of_what_left():
    influence_MN = torch.from_numpy(RNG.normal(size=(3, 5)))
    left_out_SN = membership([(0,), (1, 4)], 5)
    predicted_SM = predicted_change(influence_MN, left_out_SN)
    np.testing.assert_allclose(predicted_SM[0], -influence_MN[:, 0] / 5)
    np.testing.assert_allclose(predicted_SM[1], -(influence_MN[:, 1] + influence_MN[:, 4]) / 5)


def test_spearman_by_columns_is_that_of_each_column_with_ties():
    first, second = RNG.integers(4, size=(20, 6)), RNG.integers(4, size=(20, 6))
    expected = np.array([spearmanr(first[:, j], second[:, j])[0] for j in range(6)])
    np.testing.assert_allclose(spearman(first, second), expected)
    assert math.isnan(spearman(np.ones(5), np.arange(5.0)))


def test_lds_sees_order_alone_and_nothing_in_a_constant():
    actual_SM = RNG.normal(size=(9, 4))
    assert lds(np.exp(actual_SM) * 1e6, actual_SM) == pytest.approx(1)
    assert lds(-actual_SM, actual_SM) == pytest.approx(-1)
    assert math.isnan(lds(np.zeros_like(actual_SM), actual_SM))


def test_sets_are_distinct_of_one_size_and_the_first_of_more():
    sets = left_out_sets(10, 4, 30, seed=3)
    assert len(set(sets)) == 30
    assert all(len(set(rows)) == 4 and set(rows) <= set(range(10)) for rows in sets)
    assert left_out_sets(10, 4, 7, seed=3) == sets[:7]
    for size in (0, 10, 11):
        with pytest.raises(ValueError, match="is impossible: between 1 and 9 can be left out"):
            left_out_sets(10, size, 3, seed=0)
    with pytest.raises(ValueError, match="only 10"):
        left_out_sets(10, 1, 11, seed=0)


def test_lds_of_noise_is_not_above_zero_and_differences_are_paired(monkeypatch):
    monkeypatch.setattr(leave_out, "lds_draws", partial(leave_out.lds_draws, resamples=200))
    actual_SM = RNG.normal(size=(30, 12))
    noisy_SM = actual_SM + 0.3 * RNG.normal(size=actual_SM.shape)
    predicted = {"good": noisy_SM, "same": noisy_SM * 5, "random": RNG.normal(size=actual_SM.shape)}
    scores, beyond = lds_estimates(predicted, actual_SM, than=("same",), seed=0)
    assert scores["good"].low > 0.7
    assert scores["random"].low < 0 < scores["random"].high
    assert beyond["same"]["good"] == Estimate(0, 0, 0)
    assert beyond["same"]["random"].high < 0


def test_alike_seeds_agree_wholly_and_one_seed_has_none_to_agree_with():
    actual_SM = RNG.normal(size=(8, 3))
    assert seed_agreement(np.stack([actual_SM, 2 * actual_SM, actual_SM + 1])) == pytest.approx(1)
    assert math.isnan(seed_agreement(actual_SM[None]))
    over_sets, over_seeds = noise(np.stack([actual_SM, actual_SM]), np.array([[0.0, 0, 0], [2, 2, 2]]))
    assert over_sets == pytest.approx(actual_SM.std(axis=0, ddof=1).mean())
    assert over_seeds == pytest.approx(math.sqrt(2))


# Rows that resemble one another, and rows whose removal costs most


def test_bm25_is_its_formula_and_an_empty_query_finds_nothing():
    train = ["the cat sat", "Dog ran and ran", "the dog sat on the mat"]
    found_MN = bm25(train, ["dog ran", "zebra", ""])
    words, mean_length = [text.lower().split() for text in train], 13 / 3

    def score(query: list[str], row: list[str]) -> float:
        total = 0.0
        for word in query:
            rows_with, times = sum(word in each for each in words), row.count(word)
            if rows_with:
                idf = math.log(1 + (3 - rows_with + 0.5) / (rows_with + 0.5))  # Lucene's
                total += idf * times / (times + 1.5 * (1 - 0.75 + 0.75 * len(row) / mean_length))
        return total

    expected = [score(["dog", "ran"], row) for row in words]
    np.testing.assert_allclose(found_MN[0], expected, rtol=1e-5)
    assert not found_MN[1:].any()


def test_pooled_states_and_their_cosines_know_no_padding():
    model = tiny_model("llama")
    rows = Encodings(Encoded(tuple(range(3, 3 + length)), 1) for length in (9, 4, 6))
    apart, together = (pooled(model, rows, size, 1) for size in (1, 3))
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        states = model(torch.arange(3, 7)[None], output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(apart[1], states[0].double().mean(dim=0), rtol=1e-5, atol=1e-6)
    cosine_MN = hidden_cosine(apart, 3 * apart[:2])
    assert cosine_MN.shape == (2, 3)
    torch.testing.assert_close(cosine_MN[[0, 1], [0, 1]], torch.ones(2).double())


def test_the_most_helpful_rows_have_the_most_negative_influence_on_all():
    influence_MN = torch.tensor([[1.0, -2.0, 0.0, -5.0], [0.0, -2.0, 0.0, 3.0]])
    assert most_helpful(influence_MN, 2) == (1, 3)
    assert most_helpful(influence_MN, 1) == (1,)


def test_the_excess_over_random_sets_is_a_difference_of_means():
    random_SM = RNG.normal(size=(20, 10))
    same = beyond_random(random_SM.mean(axis=0), random_SM, seed=0)
    assert same.value == pytest.approx(0)
    assert same.low < 0 < same.high
    assert beyond_random(random_SM.mean(axis=0) + 5, random_SM, seed=0).low > 4


# Wrong answers


@pytest.fixture(scope="module")
def examples(task_folder):
    return shipped_task("jsonl", f"task.path={task_folder}").load().train


def test_flipping_changes_the_answers_of_the_flagged_rows_alone(examples):
    flipped, is_flipped_N = flip(examples, 0.25, seed=1)
    assert is_flipped_N.sum() == 5
    for before, after, changed in zip(examples, flipped, is_flipped_N, strict=True):
        assert (before.answer != after.answer) == changed
        assert replace(after, answer=before.answer) == before
        assert 0 <= after.answer < len(after.options)
    assert flip(examples, 0.25, seed=1)[0] == flipped
    assert flip(examples, 1e-9, seed=0)[1].sum() == 1


def test_nothing_to_flip_to_and_nothing_left_are_refused(examples):
    alone = [replace(example, options=example.options[:1], labels=example.labels[:1], answer=0) for example in examples]
    with pytest.raises(ValueError, match=f"example {examples[0].id} has no other answer"):
        flip(alone, 0.1, seed=0)
    with pytest.raises(ValueError, match="leaves no right answer"):
        flip(examples, 0.99, seed=0)


def test_detection_is_one_when_separated_and_half_at_random():
    is_flipped_N = np.arange(40) % 10 == 0
    perfect = detection(is_flipped_N + 0.1 * RNG.random(40), is_flipped_N)
    assert (perfect.found, perfect.auc) == (1, 1)
    worst = detection(-1.0 * is_flipped_N, is_flipped_N)
    assert (worst.found, worst.auc) == (0, 0)
    many = np.arange(20_000) % 10 == 0
    random = detection(RNG.random(20_000), many)
    assert random.auc == pytest.approx(0.5, abs=0.03)
    assert random.found == pytest.approx(0.1, abs=0.03)
    harm_N = RNG.random(40)
    assert curve(harm_N, is_flipped_N)[[0, -1]].tolist() == [0, 1]
    assert curve(harm_N, is_flipped_N)[4] == detection(harm_N, is_flipped_N).found


def test_auc_draws_scatter_about_the_auc_ties_included_and_are_paired():
    is_flipped_N = np.arange(60) % 5 == 0
    harm_N = RNG.integers(6, size=60) + is_flipped_N
    influence_MN = np.tile(harm_N, (4, 1))
    draws = auc_draws([influence_MN], [is_flipped_N], seed=0, resamples=2000)
    assert draws.mean() == pytest.approx(roc_auc_score(is_flipped_N, harm_N), abs=0.01)
    assert np.array_equal(draws, auc_draws([10.0 * influence_MN], [is_flipped_N], seed=0, resamples=2000))
    assert set(auc_draws([1.0 * np.tile(is_flipped_N, (4, 1))], [is_flipped_N], seed=0)) == {1.0}
    alone = np.arange(60) == 7  # about a third of the draws hold no flipped row, and have no AUC
    lonely = auc_draws([influence_MN], [alone], seed=0)
    assert 0.25 < np.isnan(lonely).mean() < 0.5


def test_trials_share_their_draws_so_that_a_trial_told_twice_says_no_more():
    is_flipped_N = np.arange(40) % 5 == 0
    influence_MN = RNG.normal(size=(6, 40)) + 0.3 * is_flipped_N
    once, twice = (auc_draws([influence_MN] * times, [is_flipped_N] * times, seed=0) for times in (1, 2))
    np.testing.assert_allclose(twice, once)
    summed_MN = np.tile(influence_MN.mean(axis=0), (6, 1))  # the same harm, whichever validation rows are drawn
    assert auc_draws([summed_MN], [is_flipped_N], seed=0).std() < once.std()


def test_harm_is_positive_where_up_weighting_raises_the_validation_loss():
    influence_MN = np.array([[1.0, -2.0], [3.0, -1.0]])
    assert harm(influence_MN).tolist() == [4, -3]


# Gradients


def test_dead_matrices_are_named_and_add_nothing():
    grams = random_grams()
    name = next(iter(grams.grams))
    sick = {**grams.grams, name: MatrixGram(torch.zeros(12, 12), torch.zeros(8, 12), torch.zeros(8), 30)}
    found = gradient_health(replace(grams, grams=sick))
    assert found.dead == [name]
    assert found.train_norms[name] == 0
    kept = {key: gram for key, gram in grams.grams.items() if key != name}
    assert found.common == gradient_health(replace(grams, grams=kept)).common


def test_norms_are_root_mean_squares_of_the_gradients():
    train_NP, val_MP = torch.randn(5, 7), torch.randn(3, 7)
    grams = LayerGrams(LAYERS, {"a": gram_of(train_NP, val_MP)}, "f")
    found = gradient_health(grams)
    assert found.train_norms["a"] == pytest.approx(float(train_NP.norm() / 5**0.5), rel=1e-5)
    assert found.val_norms["a"] == pytest.approx(float(val_MP.norm() / 3**0.5), rel=1e-5)
    size = train_NP.mean(dim=0).norm() / (train_NP.norm() / 5**0.5)
    assert found.length == pytest.approx(float(size), rel=1e-5)


def test_the_common_share_is_one_for_equal_gradients_and_nil_where_they_cancel():
    torch.manual_seed(0)
    equal_NP = torch.ones(6, 4)
    assert common_share(equal_NP @ equal_NP.T) == Estimate(1, 1, 1)
    random_NP = torch.randn(60, 400, dtype=torch.float64)
    independent = common_share(random_NP @ random_NP.T)
    assert independent.low < 0 < independent.high
    centred_NP = random_NP - random_NP.mean(dim=0)
    assert common_share(centred_NP @ centred_NP.T).value == pytest.approx(-1 / 59)
    covered = 0
    for _ in range(100):
        shifted_NP = torch.randn(60, 400, dtype=torch.float64) + 1  # ‖E g‖² = 400 of E‖g‖² = 800
        shifted = common_share(shifted_NP @ shifted_NP.T)
        covered += shifted.low < 0.5 < shifted.high
    assert 88 <= covered <= 99
    assert math.isnan(common_share(torch.eye(2)).value)


# Solvers


def test_exact_leaves_no_residual_and_no_influence_leaves_all():
    for gram in random_grams().grams.values():
        for damping in (1e-3, 0.1, 10.0):
            solved = Exact(damping=damping).influence(gram)
            assert residual(solved, gram, damping=damping) < 1e-12
            assert residual(0 * solved, gram, damping=damping) == pytest.approx(1)


def test_the_residual_is_that_of_the_dense_system():
    gram = next(iter(random_grams().grams.values()))
    lam = 0.1 * float(gram.train_train.trace()) / (12 * 30)
    system = gram.train_train / 12 + lam * torch.eye(12, dtype=torch.float64)
    influence_MN = DataInf(damping=0.1).influence(gram)
    expected = (influence_MN @ system + gram.val_train).norm() / gram.val_train.norm()
    assert residual(influence_MN, gram, damping=0.1) == pytest.approx(float(expected), rel=1e-10)


def test_each_estimators_distance_from_exact_and_lissas_step():
    grams = random_grams()
    exact, datainf, lissa = (solver_residuals(each, grams) for each in (Exact(), DataInf(), Lissa(num_steps=10**6)))
    assert max(each.off for each in exact) < 1e-12
    assert min(each.off for each in datainf) > 1e-3
    assert max(each.off for each in lissa) < 1e-9
    assert all(each.step is None for each in (*exact, *datainf))
    assert all(each.step is not None and each.step > 0 for each in lissa)
    assert [each.matrix for each in exact] == list(grams.grams)
    eigenvalues = torch.linalg.eigvalsh(next(iter(grams.grams.values())).train_train)
    lam = 0.1 * float(eigenvalues.sum()) / (12 * 30)
    assert exact[0].condition == pytest.approx(float(eigenvalues[-1]) / 12 / lam + 1, rel=1e-9)
    assert solver_residuals(Lissa(step_size=1e-6, num_steps=10**12), grams)[0].step == 1e-6


def test_what_float32_adds_to_the_damping_is_told():
    grams = random_grams(num_train=12, num_params=4)  # rank 4 of 12: eight eigenvalues are noise
    rounded = {
        name: replace(gram, train_train=gram.train_train.float(), val_train=gram.val_train.float())
        for name, gram in grams.grams.items()
    }
    found = solver_residuals(Exact(damping=1e-6), replace(grams, grams=rounded))
    assert max(each.rounding for each in found) > 0.01
    assert max(each.residual for each in found) < 1e-6
    assert max(each.rounding for each in solver_residuals(Exact(damping=1e-6), grams)) < 1e-6


# Ranks and agreement


def test_identical_draws_give_degenerate_intervals():
    scores = (3.0, 1.0, 2.0)
    found = rank_intervals(scores, np.tile(scores, (50, 1)))
    assert found == [Estimate(1, 1, 1), Estimate(3, 3, 3), Estimate(2, 2, 2)]
    assert ranks([1, 5, 5, 0]).tolist() == [3, 1.5, 1.5, 4]


def test_a_rank_interval_holds_what_the_draws_did():
    scores_BL = np.array([[2.0, 1.0], [1.0, 2.0]] * 50)
    assert rank_intervals([2.0, 1.0], scores_BL) == [Estimate(1, 1, 2), Estimate(2, 1, 2)]


def test_bootstrap_draws_are_seeded_and_scatter_about_the_scores():
    grams, estimator = random_grams(60, 40), GradDot()
    draws_BL = bootstrap_scores(estimator, grams, resamples=200, seed=0)
    assert np.array_equal(draws_BL, bootstrap_scores(estimator, grams, resamples=200, seed=0))
    whole = np.array(estimator.score(grams).values)
    assert np.all(np.abs(draws_BL.mean(axis=0) - whole) < 2 * draws_BL.std(axis=0))
    assert np.all(draws_BL.std(axis=0) > 0)


def layers_of(values_LMN: np.ndarray) -> LayerGrams:
    """Returns Grams with one matrix a layer, whose C are the given values."""
    names = tuple(f"l{place}" for place in range(len(values_LMN)))
    layers = LayerMap(names, tuple((name,) for name in names), (1,) * len(names))
    _, num_val, num_train = values_LMN.shape
    grams = {
        name: MatrixGram(torch.eye(num_train), torch.from_numpy(C_MN), torch.ones(num_val), 1)
        for name, C_MN in zip(names, values_LMN, strict=True)
    }
    return LayerGrams(layers, grams, "f")


def test_the_interval_of_the_halves_holds_what_fresh_samples_do():
    rng = np.random.default_rng(0)
    true_L = 50 + rng.normal(size=10)

    def fresh(num_train: int, num_val: int, times: int) -> np.ndarray:
        """Returns the scores that fresh samples give, as means over them: (L×times)."""
        noise_LT = rng.normal(size=(10, times)) / num_train**0.5 + rng.normal(size=(10, times)) / num_val**0.5
        return true_L[:, None] + 1.5 * noise_LT

    half, whole = (spearman(fresh(*size, 3000), fresh(*size, 3000)).mean() for size in ((8, 5), (16, 10)))
    held = []
    for seed in range(15):
        of_train, of_val = (1.5 * rng.normal(size=size) for size in ((10, 1, 16), (10, 10, 1)))
        _, found = halves(GradDot(), layers_of(true_L[:, None, None] + of_train + of_val), draws=2, seed=seed)
        stepped = stepped_up(found)
        held.append((found.low <= half <= found.high, stepped.low <= whole <= stepped.high))
    assert np.mean(held, axis=0).min() >= 0.8


def test_equal_samples_have_equal_halves_and_few_samples_have_some():
    same = layers_of(np.broadcast_to(np.arange(1.0, 6)[:, None, None], (5, 6, 9)).copy())
    assert halves(GradDot(), same, draws=3, seed=0)[1] == Estimate(1, 1, 1)
    few = layers_of(RNG.normal(size=(5, 4, 5)))
    splits, found = halves(GradDot(), few, draws=5, seed=0)
    assert -1 <= found.low <= found.value == pytest.approx(splits.mean())
    assert found.value <= found.high <= 1
    again, _ = halves(GradDot(), few, draws=5, seed=0)
    assert np.array_equal(splits, again)


def test_halves_are_stepped_up_to_the_whole_and_nothing_is_made_of_disagreement():
    assert stepped_up(Estimate(0.5, 0.0, 1.0)) == Estimate(2 / 3, 0.0, 1.0)
    assert stepped_up(Estimate(-0.1, -0.5, 0.25)) == Estimate(-0.1, -0.5, 0.4)
    assert math.isnan(stepped_up(Estimate(math.nan, math.nan, math.nan)).value)


def test_damping_profiles_hold_the_estimators_own():
    grams, estimator = layer_grams(), DataInf(damping=0.5)
    profiles = damping_profiles(estimator, grams)
    assert list(profiles) == ["damping 0.05", "damping 0.5", "damping 5"]
    assert profiles["damping 0.5"] == estimator.score(grams).values
    assert damping_profiles(GradDot(), grams) == {}
    (pair,) = profile_correlations({"a": (1, 2, 3, 4), "b": (1, 2, 4, 3)})
    assert (pair.spearman, pair.kendall) == (pytest.approx(0.8), pytest.approx(2 / 3))
    assert math.isnan(profile_correlations({"a": (1, 1), "b": (1, 2)})[0].spearman)


def test_the_panel_is_every_estimator_on_grams_with_the_users_settings_first():
    own = Exact(damping=3.0, aggregation="top25")
    found = panel(own)
    assert next(iter(found.items())) == ("exact", own)
    assert {type(each) for each in found.values()} == {cls for cls in GRAM_ESTIMATORS if cls.needs == Grams()}
    assert found["datainf"] == DataInf(damping=3.0, aggregation="top25")
    assert panel(GradDot())["datainf"] == DataInf()


def test_agreement_is_symmetric_and_compares_scores_as_the_estimators_give_them():
    grams = random_grams()
    names, matrix = agreement(panel(DataInf()), grams)
    assert len(names) == 3 * len(panel(DataInf()))
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(np.diag(matrix), 1)
    first, second = (
        DataInf(aggregation="top25").score(grams).values,
        GradDot(aggregation="positive").score(grams).values,
    )
    found = matrix[names.index("datainf top25"), names.index("grad_dot positive")]
    assert found == pytest.approx(spearmanr(first, second)[0])


@pytest.mark.parametrize("granularity", ["matrix", "block"])
def test_the_total_influence_is_the_sum_of_the_layers(granularity):
    grams, estimator = layer_grams(), DataInf(granularity=granularity)
    layers = estimator.by_layer(grams)
    assert list(layers) == list(LAYERS.names)
    torch.testing.assert_close(total_influence(estimator, grams), torch.stack(list(layers.values())).sum(dim=0))


# Words


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "supported"), (-0.1, 0.3, "not enough evidence"), (-0.3, -0.1, "not supported")],
)
def test_a_verdict_follows_the_interval(low, high, verdict):
    assert above(0, {"value": 0.0, "low": low, "high": high}) == verdict
    assert above(0, plain(percentile(math.nan, np.array([1.0])))) == "not enough evidence"


def interval(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


HIGH = interval(0.9, 0.85, 0.95)
REPORT = {
    "estimator": "datainf",
    "aggregation": "all",
    "layers": ["a", "b", "c", "d", "e", "f"],
    "instrument": {"lds": {"true Hessian": 0.999, "exact": 0.98}},
    "gradients": {"dead": [], "train_norms": {"a": 1.0}, "common": interval(0.0, -0.01, 0.005)},
    "solver": {
        "estimators": {
            "exact": {"residual_max": 1e-12, "condition_max": 10.0, "rounding_max": 0.0},
            "datainf": {"off_median": 0.01, "off_max": 0.05},
        }
    },
    "stability": {
        "samples": HIGH,
        "half": HIGH,
        "ranks": [interval(float(rank), rank, rank) for rank in range(1, 7)],
        "damping": [{"first": "damping 1", "second": "damping 10", "spearman": 0.95}],
        "seeds": [{"spearman": 0.85}, {"spearman": 0.95}],
    },
    "agreement": {"names": ["datainf all", "grad_dot all"], "spearman": [[1.0, 0.5], [0.5, 1.0]]},
    "leave_out": {
        "num_seeds": 3,
        "num_subsets": 9,
        "num_train": 8,
        "left_out": 4,
        "lds": {"datainf": HIGH, "grad_dot": HIGH},
        "lds_of_mean": {"datainf": HIGH},
        "beyond_grad_dot": {"datainf": HIGH},
        "beyond_bm25": {"datainf": HIGH},
        "removed": {"size": 4, "by": {"datainf": {"change": 0.1, "beyond_random": HIGH}}},
        "seed_agreement": 0.8,
        "sd_over_sets": 0.2,
        "sd_over_seeds": 0.1,
    },
    "mislabel": {
        "num_trials": 3,
        "num_train": 8,
        "num_flipped": 1,
        "random": {"found": 0.1},
        "estimators": {"datainf": {"auc": HIGH, "found": 0.5, "beyond_grad_dot": HIGH}, "grad_dot": {}},
    },
}
YES, NO, OPEN = "supported", "not supported", "not enough evidence"
SAMPLES, CHANCE = "other samples of the task", "single validation rows better than chance"


def changed(path: str, value: object) -> dict:
    """Returns REPORT with another value at a path of keys and places, such as `stability/ranks/0`."""
    report = deepcopy(REPORT)
    *ways, last = path.split("/")
    at: object = report
    for way in ways:
        at = at[int(way) if isinstance(at, list) else way]  # type: ignore[index]
    at[int(last) if isinstance(at, list) else last] = value  # type: ignore[index]
    return report


@pytest.mark.parametrize(
    ("claim", "path", "values"),
    [
        ("The instrument is right", "instrument/lds/exact", {0.96: YES, 0.94: NO}),
        ("The instrument is right", "instrument/lds/true Hessian", {0.995: YES, 0.98: NO}),
        ("none is dead", "gradients/dead", {(): YES, ("a",): NO}),
        ("stands at an optimum", "gradients/common", {(0.0, -0.01, 0.009): YES, (0.1, 0.02, 0.2): NO}),
        ("stands at an optimum", "gradients/common", {(0.1, -0.1, 0.3): OPEN, (None, None, None): OPEN}),
        ("solves the damped systems", "solver/estimators/exact/residual_max", {1e-7: YES, 1e-5: NO}),
        ("stands for the exact", "solver/estimators/datainf/off_max", {0.09: YES, 0.11: NO}),
        (SAMPLES, "stability/samples", {(0.9, 0.81, 1.0): YES, (0.5, 0.2, 0.79): NO, (0.9, 0.79, 1.0): OPEN}),
        ("is among the top third", "stability/ranks/0", {(1, 1, 2): YES, (1, 3, 4): NO, (1, 1, 3): OPEN}),
        ("is among the top third", "stability/ranks/0", {(0.5, None, None): OPEN}),
        ("depend on the damping", "stability/damping/0/spearman", {0.91: YES, 0.89: NO, None: OPEN}),
        ("Any two adapters of these seeds", "stability/seeds/0/spearman", {0.81: YES, 0.79: NO}),
        ("differently from plain", "agreement/spearman/0/1", {0.79: YES, 0.81: NO}),
        (CHANCE, "leave_out/lds/datainf", {(0.2, 0.1, 0.3): YES, (-0.2, -0.3, -0.1): NO, (0.1, -0.1, 0.3): OPEN}),
        ("mean validation loss", "leave_out/lds_of_mean/datainf", {(0.2, 0.1, 0.3): YES, (0.0, -0.3, 0.0): NO}),
        ("mean validation loss", "leave_out/lds_of_mean/datainf", {(0.2, -0.1, 0.3): OPEN}),
        ("than the seed does", "leave_out/sd_over_sets", {0.11: YES, 0.09: NO}),
        (
            "loss changes better than plain",
            "leave_out/beyond_grad_dot/datainf",
            {(0.2, 0.1, 0.3): YES, (0.0, -0.1, 0.0): NO},
        ),
        ("loss changes better than plain", "leave_out/beyond_grad_dot/datainf", {(0.2, -0.1, 0.3): OPEN}),
        ("compares words", "leave_out/beyond_bm25/datainf", {(0.2, 0.1, 0.3): YES, (0.0, -0.1, 0.0): NO}),
        ("costs more than", "leave_out/removed/by/datainf/beyond_random", {(1.0, 0.5, 2.0): YES, (0, -1, 1): OPEN}),
        ("tells wrong answers", "mislabel/estimators/datainf/auc", {(0.6, 0.51, 0.7): YES, (0.4, 0.3, 0.5): NO}),
        ("tells wrong answers", "mislabel/estimators/datainf/auc", {(0.6, 0.49, 0.7): OPEN}),
        ("answers better", "mislabel/estimators/datainf/beyond_grad_dot", {(0.2, 0.1, 0.3): YES, (0, -0.1, 0): NO}),
        ("answers better", "mislabel/estimators/datainf/beyond_grad_dot", {(0.2, -0.1, 0.3): OPEN}),
    ],
)
def test_every_rule_follows_its_figure_over_its_bar(claim: str, path: str, values: dict[Any, Verdict]):
    for value, verdict in values.items():
        is_interval = isinstance(value, tuple) and len(value) == 3
        report = changed(path, interval(*value) if is_interval else list(value) if isinstance(value, tuple) else value)
        (found,) = [each for each in conclusions(report) if claim in each.claim]
        assert found.verdict == verdict, (value, found)
        others = {each.claim for each in conclusions(report)} - {found.claim}
        assert all(each.verdict == YES for each in conclusions(report) if each.claim in others)


def test_a_claim_without_an_interval_speaks_of_what_was_measured_alone():
    found = conclusions(REPORT)
    assert len(found) == 18
    for each in found:
        has_interval = "interval" in each.because.replace("without an interval", "") or "bootstrap" in each.because
        assert has_interval or "these" in each.claim or each.claim.startswith("The instrument"), each
    assert not any("for sure" in each.because for each in found)


@pytest.mark.parametrize(
    "rows",
    [
        [f"a text of {number} words" for number in range(8)],
        [{"prompt": f"p {number}", "completion": f"c {number}"} for number in range(8)],
        [
            {"messages": [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": f"a {number}"}]}
            for number in range(8)
        ],
        [{"input_ids": [3, 4, 5 + number, 9], "labels": [-100, -100, 5 + number, 9]} for number in range(8)],
    ],
)
def test_rows_without_options_are_made_wrong_by_what_others_say_or_by_another_order(rows):
    examples = [example_of(row, id=str(number), where="row") for number, row in enumerate(rows)]
    flipped, is_flipped_N = flip(examples, 0.25, seed=0)
    assert is_flipped_N.sum() == 2
    for before, after, is_flipped in zip(examples, flipped, is_flipped_N, strict=True):
        assert (before != after) == is_flipped
    again, _ = flip(examples, 0.25, seed=0)
    assert again == flipped
