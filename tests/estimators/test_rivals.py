"""The rivals equal their definitions, written out in loops and float64, and refuse what they cannot score."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from layerif.estimators._sample_sets import over_sets, shuffled_parts
from layerif.estimators.alpha import Alpha, alpha, distance, hill
from layerif.estimators.avss import Avss, avss
from layerif.estimators.avss_contrast import AvssContrast, avss_contrast
from layerif.estimators.block_influence import BlockInfluence
from layerif.estimators.cca import REGULARISERS, Cca, held_out_pwcca, pwcca
from layerif.estimators.cluster_information import ClusterInformation, clusters, mutual_information
from layerif.estimators.dlp import Dlp
from layerif.estimators.fisher_trace import FisherTrace
from layerif.estimators.grad_norm import GradNorm
from layerif.estimators.ila import Ila
from layerif.estimators.linear_probe import LinearProbe, probe_accuracy
from layerif.estimators.lsa import Lsa
from layerif.estimators.outlier import Outlier
from layerif.estimators.quadratic import Quadratic, quadratic_gain
from layerif.evidence import LayerActivations, LayerGates, LayerGrams, LayerRemovals, LayerSpectra, MatrixGram
from layerif.layers import LayerMap
from layerif.probe.gates import gated
from layerif.probe.spectra import Spectra

LAYERS = LayerMap(("b.0", "b.1"), (("b.0.q", "b.0.o"), ("b.1.q",)), (18, 12))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# alpha


def pareto(exponent: float, count: int) -> torch.Tensor:
    """Quantiles of the density ∝ λ^−exponent above 1, ascending."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (1 - places) ** (-1 / (exponent - 1))


def looped_hill(values: list[float], start: int) -> float:
    tail = values[start:]
    return 1 + len(tail) / (sum(math.log(v) for v in tail) - len(tail) * math.log(values[start]))


def looped_distance(values: list[float], start: int) -> float:
    tail, exponent = values[start:], looped_hill(values, start)
    return max(abs(1 - (value / tail[0]) ** (1 - exponent) - place / len(tail)) for place, value in enumerate(tail))


@pytest.mark.parametrize("start", [0, 7, 20, 37])
def test_hill_and_distance_are_their_loops(start):
    values = torch.linalg.svdvals(normal(40, 60, seed=1)).square().flip(0)
    assert hill(values, start) == pytest.approx(looped_hill(values.tolist(), start), rel=1e-12)
    assert distance(values, start) == pytest.approx(looped_distance(values.tolist(), start), rel=1e-9)


@pytest.mark.parametrize("shape", [(40, 60), (61, 25)])
def test_mid_starts_at_the_median_of_the_dense_spectrum(shape):
    weight = normal(*shape, seed=2)
    dense = sorted(np.linalg.eigvalsh((weight.T @ weight).numpy())[-min(shape) :])
    found = torch.linalg.svdvals(weight).square()
    assert alpha(found) == pytest.approx(looped_hill(dense, min(shape) // 2), rel=1e-9)


@pytest.mark.parametrize("fit", ["peak", "peak_upstream"])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 100.0])
def test_peak_takes_the_best_tail_near_the_mode(fit, unit):
    values = (torch.linalg.svdvals(normal(50, 60, seed=3)).square().flip(0) * unit).tolist()
    counts, edges = np.histogram(np.log10(values), bins=100)
    mode = 10 ** edges[counts.argmax()]
    least = math.log10(0.95 * mode) if fit == "peak_upstream" else 0.95 * mode
    near = [i for i, value in enumerate(values[:-1]) if least <= value <= 1.5 * mode]
    best = min(near, key=lambda i: looped_distance(values, i))
    assert alpha(torch.tensor(values, dtype=torch.float64), fit) == pytest.approx(looped_hill(values, best), rel=1e-9)


def test_the_upstream_slip_tries_starts_far_below_the_mode():
    spectrum = torch.linalg.svdvals(normal(50, 60, seed=10)).square()
    assert alpha(spectrum, "peak") != alpha(spectrum, "peak_upstream")


@pytest.mark.parametrize("exponent", [1.5, 2.5, 4.0])
def test_a_known_power_law_is_recovered(exponent):
    spectrum = pareto(exponent, 2000)
    # A matrix with exactly this spectrum, in random bases.
    left, right = (torch.linalg.qr(normal(200, 200, seed=seed))[0] for seed in (4, 5))
    of_matrix = torch.linalg.svdvals(left @ spectrum[::10].sqrt().diag() @ right).square()
    assert alpha(spectrum, "mid") == pytest.approx(exponent, rel=0.02)
    assert alpha(of_matrix, "mid") == pytest.approx(exponent, rel=0.1)
    assert alpha(spectrum, "peak") == pytest.approx(exponent, rel=0.05)


def test_no_unit_and_no_order_of_the_spectrum_matters():
    spectrum = torch.linalg.svdvals(normal(40, 60, seed=6)).square()
    for fit in ("mid", "peak"):
        expected = alpha(spectrum, fit)
        assert alpha(7 * spectrum, fit) == pytest.approx(expected, rel=1e-9)
        assert alpha(spectrum.flip(0), fit) == expected
        assert alpha(torch.cat([spectrum, torch.zeros(9)]), fit) == expected


def spectra_of(**eigenvalues: torch.Tensor) -> LayerSpectra:
    by_name = dict.fromkeys(LAYERS.matrices, pareto(2.0, 20))
    given = {name.replace("_", "."): value for name, value in eigenvalues.items()}
    return LayerSpectra(LAYERS, {**by_name, **given}, (0.25, 0.75), "f")


def test_a_blocks_alpha_is_the_mean_of_its_matrices():
    evidence = spectra_of(b_0_q=pareto(3.0, 20))
    scores = Alpha().score(evidence)
    assert scores.values == (pytest.approx((alpha(pareto(3.0, 20)) + alpha(pareto(2.0, 20))) / 2), alpha(pareto(2, 20)))
    assert scores.higher_means == "undertrained"
    assert Spectra().notes(evidence) == ("singular values took 0.5 s a block",)


@pytest.mark.parametrize(
    ("spectrum", "message"),
    [
        (torch.cat([pareto(2.0, 9), torch.zeros(30)]), r"b\.1\.q: .*at least 10 non-zero eigenvalues, got 9 of 39"),
        (torch.cat([pareto(2.0, 9), torch.full((30,), 1e-14)]), "got 9 of 39"),
        (torch.ones(20), r"b\.1\.q: .*no spread"),
        (torch.full((20,), float("nan")), r"b\.1\.q: .*not finite"),
    ],
)
def test_a_spectrum_without_an_exponent_is_refused_by_name(spectrum, message):
    with pytest.raises(ValueError, match=message):
        Alpha().score(spectra_of(b_1_q=spectrum))


# One forward pass


def activations(**changes: Any) -> LayerActivations:
    weights = {"b.0.q": normal(3, 4, seed=1), "b.0.o": normal(2, 3, seed=2), "b.1.q": normal(3, 4, seed=3)}
    seen = LayerActivations(
        layers=LAYERS,
        input_square_norms={name: normal(weight.shape[1], seed=9).square() for name, weight in weights.items()},
        weight=weights.__getitem__,
        cosines=torch.tensor([1.0, 0.25]),
        variances=torch.tensor([2.0, 6.0]),
        sparsities=torch.tensor([0.5, 0.25]),
        num_entries=99,
        epsilon=0.01,
        prompts=normal(2, 20, 5, seed=4),
        right=normal(2, 20, 5, seed=5),
        wrong=normal(2, 20, 5, seed=6),
        answers=tuple("ab" * 10),
        embedded={what: normal(20, 5, seed=seed) for what, seed in (("prompts", 7), ("right", 8), ("wrong", 9))},
        moments={"right": moments_of(normal(2, 20, 30, seed=10)), "wrong": moments_of(normal(2, 20, 30, seed=11))},
        fingerprint="f",
    )
    return replace(seen, **changes)


def moments_of(entries_LSE: torch.Tensor) -> torch.Tensor:
    near_LSE = (entries_LSE.abs() < 0.01).double()
    return torch.stack([of.sum(2) for of in (torch.ones_like(entries_LSE), entries_LSE, entries_LSE**2, near_LSE)], 2)


def metric_of(seen: LayerActivations, params: tuple[str, ...]) -> list[float]:
    return [
        abs(float(weight)) * math.sqrt(float(seen.input_square_norms[param][j]))
        for param in params
        for row in seen.weight(param)
        for j, weight in enumerate(row)
    ]


@pytest.mark.parametrize("multiple", [0.5, 1.5, 2.5, 50])
def test_owls_ratio_is_its_definition(multiple):
    seen = activations()
    expected = []
    for params in LAYERS.params:
        entries = metric_of(seen, params)
        mean = sum(entries) / len(entries)
        expected.append(100 * sum(entry > multiple * mean for entry in entries) / len(entries))
    scores = Outlier(multiple=multiple).score(seen)
    assert scores.values == pytest.approx(expected)
    assert scores.higher_means == "important"


def test_dlp_is_its_definition_and_sums_to_all_but_one():
    seen = activations()
    for centre, middle in (("mean", np.mean), ("median", lambda entries: np.sort(entries)[(len(entries) - 1) // 2])):
        centres = [float(middle(metric_of(seen, params))) for params in LAYERS.params]
        scores = Dlp(centre=centre).score(seen)  # type: ignore[arg-type]
        assert scores.values == pytest.approx([1 - c / sum(centres) for c in centres])
        assert sum(scores.values) == pytest.approx(len(LAYERS.names) - 1)
        assert scores.higher_means == "important"


def test_dlp_of_zero_activations_is_refused():
    zero = activations(input_square_norms={name: torch.zeros(4 - (name == "b.0.o")) for name in LAYERS.matrices})
    with pytest.raises(ValueError, match="Wanda metric of zero"):
        Dlp().score(zero)
    assert Outlier().score(zero).values == (0.0, 0.0)


def test_lsa_is_its_definition_and_refuses_a_model_without_error():
    errors = {"b.0.q": 3.0, "b.0.o": 4.0, "b.1.q": 1.0}
    scores = Lsa().score(LayerRemovals(LAYERS, errors, "f"))
    assert scores.values == pytest.approx((1 - 7 / 8, 1 - 1 / 8))
    assert (scores.higher_means, scores.source) == ("important", "lsa(proxy=0.5)")
    with pytest.raises(ValueError, match="have a squared output error of zero"):
        Lsa().score(LayerRemovals(LAYERS, dict.fromkeys(errors, 0.0), "f"))


def test_block_influence_of_an_identity_block_is_zero():
    scores = BlockInfluence().score(activations(cosines=torch.tensor([1 + 1e-9, 0.25])))
    assert scores.values == (0.0, 0.75)
    assert scores.higher_means == "important"


def test_avss_is_variance_over_sparsity_normalised_over_layers():
    scores = Avss().score(activations())
    ratios = [2.0 / ((0.5 * 99 + 1) / 100), 6.0 / ((0.25 * 99 + 1) / 100)]
    assert scores.values == pytest.approx([ratio / sum(ratios) for ratio in ratios])
    assert scores.higher_means == "important"


def test_avss_guards_division_by_zero():
    nothing_small = avss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), num_entries=1000)
    assert nothing_small.tolist() == pytest.approx([1 / 3, 2 / 3])
    nothing_varies = Avss().score(activations(variances=torch.zeros(2), sparsities=torch.zeros(2)))
    assert nothing_varies.values == (0.0, 0.0)


def test_avss_counts_below_its_own_bound_or_not_at_all():
    with pytest.raises(ValueError, match=r"below 0\.01, not below estimator\.epsilon=0\.5"):
        Avss(epsilon=0.5).score(activations())


def test_the_avss_contrast_is_avss_of_all_right_entries_less_that_of_all_wrong_ones():
    right, wrong = normal(2, 20, 30, seed=10), 3 * normal(2, 20, 30, seed=11)
    wrong[1, :, ::3] = 0.001
    expected = [0.0, 0.0]
    for sign, entries in ((1, right), (-1, wrong)):
        near = ((entries.abs() < 0.01).sum((1, 2)) + 1) / (20 * 30 + 1)
        ratios = (entries.flatten(1).var(dim=1, correction=0) / near).tolist()
        expected = [before + sign * ratio / sum(ratios) for before, ratio in zip(expected, ratios, strict=True)]
    found = avss_contrast(moments_of(right), moments_of(wrong))
    assert found.tolist() == pytest.approx(expected)
    assert float(found.sum()) == pytest.approx(0)
    scores = AvssContrast().score(activations(moments={"right": moments_of(right), "wrong": moments_of(wrong)}))
    assert scores.values == pytest.approx([value - min(expected) for value in expected])
    assert (scores.higher_means, scores.source) == ("important", "avss_contrast(epsilon=0.01)")


def test_equal_answers_have_no_contrast_and_a_sample_without_a_wrong_one_does_not_count():
    right, wrong = moments_of(normal(2, 20, 30, seed=10)), moments_of(normal(2, 20, 30, seed=11))
    assert avss_contrast(right, right).tolist() == [0, 0]
    assert AvssContrast().score(activations(moments={"right": right, "wrong": right})).values == (0, 0)
    partly, nothing = wrong.clone(), torch.zeros_like(wrong)
    partly[:, 7:] = 0
    assert torch.equal(avss_contrast(right, partly), avss_contrast(right[:, :7], wrong[:, :7]))
    with pytest.raises(ValueError, match=r"none of 20 samples has a right and a wrong answer"):
        avss_contrast(right, nothing)
    with pytest.raises(ValueError, match=r"below 0\.01, not below estimator\.epsilon=0\.5"):
        AvssContrast(epsilon=0.5).score(activations())


# Representations


def test_the_probe_reads_what_is_linear_and_nothing_from_noise():
    labels, samples = ["a", "b"] * 100, list(range(200))
    noise = normal(200, 3, seed=1)
    told = noise.clone()
    told[::2, 0] += 20
    assert probe_accuracy(told, labels, samples, folds=5) == 1
    assert 0.35 < probe_accuracy(noise, labels, samples, folds=5) < 0.65
    assert probe_accuracy(torch.ones(200, 3), labels, samples, folds=5) <= 0.5
    assert probe_accuracy(100 * told + 5, labels, samples, folds=5) == 1  # standardised


def test_rows_of_one_sample_are_never_on_both_sides():
    """A sample's two rows are alike and of opposite classes: whoever has seen one would answer the other wrongly."""
    rows = torch.eye(40, dtype=torch.float64).repeat(2, 1)
    labels = ["right"] * 40 + ["wrong"] * 40
    assert probe_accuracy(rows, labels, [*range(40), *range(40)], folds=5) == 0.5


def test_truth_pairs_the_right_output_with_a_wrong_one():
    right = normal(2, 20, 5, seed=5)
    right[1, :, 0] += 30
    scores = LinearProbe().score(activations(right=right))
    assert scores.values[1] == 1 > scores.values[0]
    answers = LinearProbe(classes="answer", folds=2).score(activations(prompts=right))
    assert answers.values[1] < 1
    assert (scores.higher_means, answers.source) == ("important", "linear_probe(classes=answer, folds=2)")


NAN = float("nan")


@pytest.mark.parametrize("estimator", [LinearProbe, Cca, ClusterInformation])
@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"classes": "answer"}, {"answers": ("a",) * 20}, r"classes=answer are of one class, 'a'"),
        ({}, {"wrong": torch.full((2, 20, 5), NAN)}, r"classes=truth are of one class, 'right'"),
        ({}, {"right": torch.full((2, 20, 5), NAN)}, r"20 of 40 rows.*cut at probe\.max_length"),
        (
            {},
            {"right": torch.full((2, 20, 5), NAN), "wrong": torch.full((2, 20, 5), NAN)},
            r"20 of 20 rows.*cut at probe\.max_length",
        ),
    ],
)
def test_nothing_to_tell_apart_is_refused(estimator, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        estimator(**settings).score(activations(**changes))


def test_a_class_smaller_than_the_folds_is_refused():
    with pytest.raises(ValueError, match=r"class 'b' has 3 of 20 rows, fewer than estimator\.folds=5"):
        LinearProbe(classes="answer").score(activations(answers=("a",) * 17 + ("b",) * 3))


def dense_pwcca(first: np.ndarray, second: np.ndarray) -> float:
    """Computes PWCCA of full-rank views from covariances."""
    x, y = first - first.mean(0), second - second.mean(0)
    whiten_x, whiten_y = (np.linalg.inv(np.linalg.cholesky(v.T @ v)).T for v in (x, y))
    left, correlations, _ = np.linalg.svd((x @ whiten_x).T @ (y @ whiten_y), full_matrices=False)
    weights = np.abs((x @ whiten_x @ left).T @ x).sum(1)
    return float((weights * correlations).sum() / weights.sum())


def test_cca_is_its_dense_definition_and_one_with_itself():
    first, second = normal(50, 4, seed=1), normal(50, 6, seed=2)
    second[:, :2] += first[:, :2]
    ours = pwcca(first, second)
    assert ours == pytest.approx(dense_pwcca(first.numpy(), second.numpy()), rel=1e-9)
    assert 0 < ours < 1
    assert pwcca(first, first) == pytest.approx(1)
    assert pwcca(first, torch.ones(50, 2)) == 0
    assert pwcca(torch.ones(50, 2), first) == 0


@pytest.mark.parametrize("seed", range(3))
def test_cca_knows_no_invertible_linear_map(seed):
    first, second, turn = normal(50, 4, seed=seed), normal(50, 6, seed=10 + seed), normal(6, 6, seed=20 + seed)
    second[:, :2] += first[:, :2]
    held_out = normal(30, 4, seed=30 + seed), normal(30, 6, seed=40 + seed)
    turned = held_out[0], held_out[1] @ turn - 2
    assert pwcca(first, first @ turn[:4, :4] + 7) == pytest.approx(1)
    assert pwcca(first, second @ turn - 2) == pytest.approx(pwcca(first, second))
    assert pwcca(first, second @ turn - 2, held_out=turned) == pytest.approx(pwcca(first, second, held_out=held_out))
    # Sizes and rotations, but no other maps, leave a regulariser as it is.
    rotated = 3 * second @ torch.linalg.qr(turn)[0] + 7
    assert pwcca(first, rotated, regulariser=0.1) == pytest.approx(pwcca(first, second, regulariser=0.1))


def test_a_regulariser_is_its_dense_definition():
    first, second, strength = normal(50, 4, seed=1), normal(50, 3, seed=2), 0.3
    second[:, :2] += first[:, :2]
    x, y = (v.numpy() - v.numpy().mean(0) for v in (first, second))
    roots = [np.linalg.eigh(v.T @ v + strength * np.trace(v.T @ v) / v.shape[1] * np.eye(v.shape[1])) for v in (x, y)]
    whiten_x, whiten_y = (basis / np.sqrt(spectrum) @ basis.T for spectrum, basis in roots)
    left, _, right = np.linalg.svd(whiten_x @ x.T @ y @ whiten_y, full_matrices=False)
    along_x, along_y = x @ whiten_x @ left, y @ whiten_y @ right.T
    correlations = [np.corrcoef(one, other)[0, 1] for one, other in zip(along_x.T, along_y.T, strict=True)]
    weights = np.abs((along_x / np.linalg.norm(along_x, axis=0)).T @ x).sum(1)
    expected = (weights * correlations).sum() / weights.sum()
    assert pwcca(first, second, regulariser=strength) == pytest.approx(expected)


def test_wide_views_correlate_on_their_own_rows_and_not_on_held_out_ones():
    first, second = normal(60, 80, seed=1), normal(60, 80, seed=2)
    parts = shuffled_parts(range(60), 5)
    assert pwcca(first, second) == pytest.approx(1)
    assert abs(held_out_pwcca(first, second, parts, REGULARISERS)) < 0.2
    told = torch.cat([first[:, :2], 0.01 * second], dim=1)
    assert held_out_pwcca(first[:, :2], told, parts, REGULARISERS) > 0.95


def test_the_rows_that_are_reported_choose_no_regulariser_and_no_direction():
    first, second = normal(50, 6, seed=1), normal(50, 6, seed=2)
    second[:, :3] += first[:, :3]
    parts, tried, expected = shuffled_parts(range(50), 5), (0.01, 1.0), []
    for reported in range(5):
        fitted = torch.cat([parts[(reported + step) % 5] for step in (2, 3, 4)])
        reports, chooses = ((first[rows], second[rows]) for rows in (parts[reported], parts[(reported + 1) % 5]))
        of_choice, of_report = (
            [pwcca(first[fitted], second[fitted], regulariser=each, held_out=rows) for each in tried]
            for rows in (chooses, reports)
        )
        expected.append(of_report[of_choice.index(max(of_choice))])
    assert held_out_pwcca(first, second, parts, tried) == pytest.approx(sum(expected) / 5)


def test_a_layer_correlates_with_itself_with_the_embedding_and_with_labels_it_holds():
    right, wrong = normal(2, 60, 5, seed=5), normal(2, 60, 5, seed=6)
    right[1, :, 0] += 50
    embedded = {"prompts": right[0], "right": right[0] @ normal(5, 5, seed=7), "wrong": wrong[0] @ normal(5, 5, seed=7)}
    seen = activations(right=right, wrong=wrong, embedded=embedded, answers=tuple("ab" * 30))
    itself = Cca(reference="b.1", regulariser=0.0).score(seen)
    assert itself.values[1] == pytest.approx(1)
    assert itself.intervals is not None
    assert itself.intervals[1] == pytest.approx((1, 1))
    assert itself.values[0] < 0.9
    first = Cca(reference="embedding", regulariser=0.0).score(seen)
    assert first.values[0] == pytest.approx(1)
    labels = Cca().score(seen)
    assert labels.values[1] > 0.99 > labels.values[0]
    assert labels.higher_means == "important"
    assert labels.source == "cca(reference=labels, classes=truth, sets=3, regulariser=held-out)"
    assert Cca(sets=1).score(seen).intervals is None


def test_an_interval_is_students_over_the_sets():
    values, intervals = over_sets([[0.2, 0.4, 0.6], [-0.5, -0.4, -0.3], [0.3, 0.3, 0.3]])
    assert values == pytest.approx([0.4, 0, 0.3])
    assert intervals is not None
    assert intervals[0] == pytest.approx((0.4 - 4.302653 * 0.2 / 3**0.5, 0.4 + 4.302653 * 0.2 / 3**0.5))
    assert intervals[1][1] < 0.0
    assert intervals[2] == (0.3, 0.3)


def test_sets_share_no_sample_and_keep_the_rows_of_a_sample_together():
    samples = [*range(23), *range(23)]
    parts = shuffled_parts(samples, 4)
    assert sorted(torch.cat(parts).tolist()) == list(range(46))
    assert [len(part) for part in parts] == [12, 12, 12, 10]
    for part in parts:
        assert {int(row) % 23 for row in part[part < 23]} == {int(row) % 23 for row in part[part >= 23]}


def test_references_and_sets_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"estimator\.sets=3 of 20 samples have 6 samples each, and 8 are needed"):
        Cca().score(activations())
    with pytest.raises(ValueError, match=r"class 'z' has one of 20 rows"):
        Cca(classes="answer").score(activations(answers=("a",) * 19 + ("z",)))
    with pytest.raises(ValueError, match=r"estimator\.reference='b\.3' is neither.*the blocks are b\.0 to b\.1"):
        Cca(reference="b.3").score(activations())
    with pytest.raises(ValueError, match=r"estimator\.regulariser=-1 is not allowed"):
        Cca(regulariser=-1)
    with pytest.raises(ValueError, match=r"estimator\.sets=3 of 20 samples have 6 samples each, and 8 are needed"):
        ClusterInformation().score(activations())


def test_labels_tell_their_entropy_of_themselves_and_nothing_of_independent_ones():
    labels = ["a"] * 20 + ["b"] * 10 + ["c"] * 10
    entropy = -sum(share * math.log(share) for share in (0.5, 0.25, 0.25))
    assert mutual_information(labels, labels) == pytest.approx(entropy)
    assert mutual_information(labels, [label.upper() for label in labels]) == pytest.approx(entropy)
    assert mutual_information(labels, range(40)) == pytest.approx(entropy)
    assert mutual_information(labels, ["same"] * 40) == 0
    assert mutual_information(["a", "a", "b", "b"], [0, 1, 0, 1]) == pytest.approx(0)
    other = ["x", "y"] * 20
    assert mutual_information(labels, other) == pytest.approx(mutual_information(other, labels))


def test_clusters_tell_what_a_block_holds():
    right, wrong = normal(2, 60, 5, seed=5), normal(2, 60, 5, seed=6)
    right[1] += 50
    seen = activations(right=right, wrong=wrong, answers=tuple("ab" * 30))
    scores = ClusterInformation().score(seen)
    assert scores.values[1] == pytest.approx(math.log(2))
    assert scores.values[0] < 0.3
    assert scores.intervals is not None
    assert scores.source == "cluster_information(classes=truth, clusters=8, sets=3)"
    assert clusters(7 * right[1] + 3, 4) == clusters(right[1], 4)


# A trained adapter, and gradients


def test_a_gate_interpolates_and_ila_scores_it():
    base, adapted = normal(3, seed=1), normal(3, seed=2)
    assert torch.equal(gated(base, adapted, torch.tensor(-1e9)), base)
    torch.testing.assert_close(gated(base, adapted, torch.tensor(0.0)), (base + adapted) / 2)
    scores = Ila().score(LayerGates(LAYERS, torch.tensor([0.0, 4.0]), "f"))
    assert scores.values == pytest.approx((0.5, 1 / (1 + math.exp(-4))))
    assert scores.higher_means == "important"


def test_gradient_sizes_are_those_of_the_explicit_gradients():
    gradients = {name: normal(6, size, seed=size) for name, size in (("b.0.q", 12), ("b.0.o", 6), ("b.1.q", 12))}
    grams = {name: MatrixGram(g @ g.T, g[:2] @ g.T, g[:2].norm(dim=1), g.shape[1]) for name, g in gradients.items()}
    evidence = LayerGrams(LAYERS, grams, "f")
    whole = [torch.cat([gradients[name] for name in params], dim=1) for params in LAYERS.params]
    mean_norms = [float(g.mean(0).norm()) for g in whole]
    traces = [float(g.square().sum(1).mean()) for g in whole]
    assert GradNorm().score(evidence).values == pytest.approx(mean_norms)
    assert FisherTrace().score(evidence).values == pytest.approx(traces)
    assert FisherTrace().score(evidence).higher_means == GradNorm().score(evidence).higher_means == "undertrained"
    per_entry = [float(g.mean(0).square().mean().sqrt()) for g in whole]
    assert GradNorm(normalisation="numel").score(evidence).values == pytest.approx(per_entry)
    assert FisherTrace(normalisation="numel").score(evidence).values == pytest.approx(
        [float(g.square().mean()) for g in whole]
    )


@pytest.mark.parametrize("cls", [GradNorm, FisherTrace, Quadratic])
def test_gradient_sizes_warn_of_zeros_and_refuse_what_is_not_finite(cls):
    zero = MatrixGram(torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(2), 12)
    grams = dict.fromkeys(LAYERS.matrices, zero)
    with pytest.warns(RuntimeWarning, match=r"in b\.0\.q.*3 of 3"):
        assert cls().score(LayerGrams(LAYERS, grams, "f")).values == (0, 0)
    broken = {**grams, "b.1.q": replace(zero, train_train=torch.full((3, 3), NAN))}
    with pytest.raises(ValueError, match=r"train_train of 'b\.1\.q' is not finite"):
        cls().score(LayerGrams(LAYERS, broken, "f"))


@pytest.mark.parametrize("num_params", [3, 12])
@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
def test_the_quadratic_gain_solves_the_damped_fisher(num_params, damping):
    train_NP = normal(6, num_params, seed=1) + 0.5
    fisher_PP, lam = train_NP.T @ train_NP / 6, damping * float(train_NP.square().mean())
    mean_P = train_NP.mean(0)
    dense = float(mean_P @ torch.linalg.solve(fisher_PP + lam * torch.eye(num_params, dtype=torch.float64), mean_P))
    found = quadratic_gain(train_NP @ train_NP.T, numel=num_params, damping=damping)
    assert found == pytest.approx(dense, rel=1e-9)
    assert 0 < found < 1


def test_the_quadratic_gain_is_twice_the_fall_that_the_damped_quadratic_model_promises():
    train_NP = normal(6, 4, seed=2) + 0.5
    hessian_PP = train_NP.T @ train_NP / 6 + 0.3 * float(train_NP.square().mean()) * torch.eye(4, dtype=torch.float64)
    mean_P = train_NP.mean(0)
    step_P = -torch.linalg.solve(hessian_PP, mean_P)
    fall = -float(mean_P @ step_P + step_P @ hessian_PP @ step_P / 2)
    assert quadratic_gain(train_NP @ train_NP.T, numel=4, damping=0.3) == pytest.approx(2 * fall, rel=1e-9)


def test_a_blocks_gain_is_the_sum_of_its_matrices_and_no_unit_of_gradients_matters():
    gradients = {name: normal(6, size, seed=size) for name, size in (("b.0.q", 12), ("b.0.o", 6), ("b.1.q", 13))}

    def grams(unit: float) -> LayerGrams:
        return LayerGrams(
            LAYERS,
            {n: MatrixGram(unit * g @ g.T, g[:2] @ g.T, g[:2].norm(dim=1), g.shape[1]) for n, g in gradients.items()},
            "f",
        )

    gain = {name: quadratic_gain(g @ g.T, numel=g.shape[1], damping=0.2) for name, g in gradients.items()}
    scores = Quadratic(damping=0.2).score(grams(1))
    assert scores.values == pytest.approx((gain["b.0.q"] + gain["b.0.o"], gain["b.1.q"]))
    assert scores.higher_means == "important"
    assert Quadratic(damping=0.2).score(grams(49)).values == pytest.approx(scores.values)
    g = gradients["b.1.q"]
    absolute = Quadratic(damping=0.2 * float(g.square().mean()), damping_rule="absolute").score(grams(1))
    assert absolute.values[1] == pytest.approx(scores.values[1])


def test_gains_that_tell_no_matrix_apart_are_told():
    gradients = {name: normal(6, 4000, seed=seed) for seed, name in enumerate(LAYERS.matrices)}
    grams = {n: MatrixGram(g @ g.T, g[:2] @ g.T, g[:2].norm(dim=1), g.shape[1]) for n, g in gradients.items()}
    with pytest.warns(RuntimeWarning, match=r"at least 0\.99\d+ in each of 3 matrices.*raise estimator\.damping"):
        alike = Quadratic().score(LayerGrams(LAYERS, grams, "f")).values
    assert alike == pytest.approx((2, 1), rel=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Quadratic(damping=1000).score(LayerGrams(LAYERS, grams, "f"))
