"""Estimators equal their dense definitions in float64, and every one found in the folder obeys the same laws."""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import layerif.estimators
from layerif.estimators.cosine import Cosine, cosine
from layerif.estimators.datainf import DataInf, datainf
from layerif.estimators.exact import Exact, exact
from layerif.estimators.file import File
from layerif.estimators.grad_dot import GradDot, grad_dot
from layerif.estimators.gram import GramEstimator
from layerif.estimators.uniform import Uniform
from layerif.layers import LayerGrams, LayerMap, MatrixGram
from layerif.scores import aggregate

FILES = sorted(
    file.stem
    for file in Path(str(layerif.estimators.__file__)).parent.glob("*.py")
    if file.stem not in ("__init__", "gram")
)
CONF = Path(__file__).parents[1] / "conf" / "estimator"

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


GRAM_ESTIMATORS = [cls for stem in FILES for cls in classes_of(stem) if issubclass(cls, GramEstimator)]


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


def test_large_damping_makes_all_proportional_to_grad_dot():
    gram = gram_of(*random_gradients(20, seed=5))
    lam = 1e9 * float(gram.train_train.trace()) / (NUM_TRAIN * 20)
    for estimator in (datainf, exact):
        influence_MN = estimator(gram.train_train, gram.val_train, numel=20, damping=1e9)
        torch.testing.assert_close(influence_MN * lam, grad_dot(gram.val_train), rtol=1e-6, atol=1e-6)


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
        assert float(cls().influence(gram_of(gradient, gradient))) < 0


@pytest.mark.parametrize("damping", [0.0, -0.1, float("nan"), float("inf")])
def test_damping_must_be_positive(damping):
    for refused in (
        lambda: DataInf(damping=damping),
        lambda: Exact(damping=damping),
        lambda: datainf(torch.eye(2), torch.ones(1, 2), numel=3, damping=damping),
        lambda: exact(torch.eye(2), torch.ones(1, 2), numel=3, damping=damping),
    ):
        with pytest.raises(ValueError, match=r"damping.*> 0"):
            refused()


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
    assert {DataInf, Exact, GradDot, Cosine} <= set(GRAM_ESTIMATORS)


@pytest.fixture(params=GRAM_ESTIMATORS, ids=lambda cls: cls.__name__)
def estimator_class(request) -> type[GramEstimator]:
    return request.param


@pytest.fixture(params=["all", "positive", "top25"])
def estimator(estimator_class, request) -> GramEstimator:
    return estimator_class(aggregation=request.param)


def test_scores_are_finite_and_carry_layers_and_fingerprint(estimator):
    scores = estimator.score(layer_grams())
    assert estimator.needs == "grams"
    assert scores.layers == LAYERS.names
    assert all(value > 0 for value in scores.values)
    assert (scores.higher_means, scores.fingerprint) == ("undertrained", "f1")
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
    assert estimator.score(shuffled).values == pytest.approx(estimator.score(layer_grams()).values, rel=1e-9)


def test_zero_gradients_score_zero_and_warn_by_name(estimator):
    zero = changed(
        layer_grams(),
        lambda gram: MatrixGram(0 * gram.train_train, 0 * gram.val_train, 0 * gram.val_norms, gram.numel),
    )
    with pytest.warns(RuntimeWarning, match=r"block\.0\.q.*4 of 4"):
        assert estimator.score(zero).values == (0.0, 0.0)


def test_a_zero_matrix_adds_nothing_to_its_block(estimator_class):
    grams = layer_grams()
    zero_q = gram_of(torch.zeros(NUM_TRAIN, 30).double(), torch.zeros(NUM_VAL, 30).double())
    with pytest.warns(RuntimeWarning, match=r"in block\.0\.q \(1 of 4"):
        scores = estimator_class().score(replace(grams, grams={**grams.grams, "block.0.q": zero_q}))
    alone = abs(aggregate(estimator_class().influence(grams.grams["block.0.o"])))
    assert scores.values[0] == pytest.approx(alone, rel=1e-12)


def test_float32_grams_score_like_float64(estimator):
    single = changed(
        layer_grams(),
        lambda gram: MatrixGram(gram.train_train.float(), gram.val_train.float(), gram.val_norms.float(), gram.numel),
    )
    gram = single.grams["block.0.q"]
    assert estimator.influence(gram).dtype == torch.float64
    assert estimator.score(single).values == pytest.approx(estimator.score(layer_grams()).values, rel=1e-3)


@pytest.mark.parametrize("field", ["train_train", "val_train", "val_norms"])
def test_a_non_finite_gram_is_refused_by_name(estimator_class, field):
    grams = layer_grams()
    tensor = getattr(grams.grams["block.1.o"], field).clone()
    tensor.view(-1)[0] = float("nan")
    broken = replace(grams, grams={**grams.grams, "block.1.o": replace(grams.grams["block.1.o"], **{field: tensor})})
    with pytest.raises(ValueError, match=rf"{field} of 'block\.1\.o' is not finite"):
        estimator_class().score(broken)


def test_matrix_granularity_sums_influences_and_block_takes_one_gram(estimator_class):
    grams = layer_grams()
    q, o = grams.grams["block.0.q"], grams.grams["block.0.o"]
    by_matrix = estimator_class(aggregation="positive")
    by_block = estimator_class(aggregation="positive", granularity="block")
    of_sum = abs(aggregate(by_matrix.influence(q) + by_matrix.influence(o), "positive"))
    of_whole = abs(aggregate(by_matrix.influence(q + o), "positive"))
    assert by_matrix.score(grams).values[0] == pytest.approx(of_sum, rel=1e-12)
    assert by_block.score(grams).values[0] == pytest.approx(of_whole, rel=1e-12)
    # Only an estimator linear in the Gram cannot tell them apart.
    assert (of_sum == pytest.approx(of_whole, rel=1e-9)) == (estimator_class is GradDot)


def test_normalisation_divides_by_the_parameters_of_the_block(estimator_class):
    plain = estimator_class().score(layer_grams()).values
    per_parameter = estimator_class(normalisation="numel").score(layer_grams()).values
    expected = [value / numel for value, numel in zip(plain, LAYERS.numel, strict=True)]
    assert per_parameter == pytest.approx(expected, rel=1e-12)


def test_an_unknown_setting_is_refused_with_the_nearest(estimator_class):
    with pytest.raises(ValueError, match=r"estimator\.granularity.*did you mean 'matrix'"):
        estimator_class(granularity="matrices")


# Files: every estimator has its configuration


@pytest.mark.parametrize("stem", FILES)
def test_every_estimator_has_a_yaml_that_binds_with_every_field(stem, tmp_path):
    (cls,) = classes_of(stem)
    config = OmegaConf.load(CONF / f"{stem}.yaml")
    keys = [str(key) for key in config]
    assert keys == ["_target_", *(field.name for field in fields(cls))]
    if stem == "file":
        config.path = str(tmp_path / "scores.json")
    estimator = instantiate(config)
    assert type(estimator) is cls
    assert estimator == (cls(path=config.path) if stem == "file" else cls())
    assert cls.needs in ("grams", "nothing", "weights", "activations", "training")


def test_every_yaml_has_an_estimator():
    assert sorted(file.stem for file in CONF.glob("*.yaml")) == FILES


# Estimators that measure nothing


def test_uniform_scores_every_layer_the_same():
    scores = Uniform().score(LAYERS)
    assert scores.layers == LAYERS.names
    assert len(set(scores.values)) == 1


def write(folder: Path, content: object) -> str:
    file = folder / "saved.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_file_reads_scores_by_name_in_any_order(tmp_path):
    path = write(tmp_path, {"layers": ["block.1", "block.0"], "values": [1, 2.5], "higher_means": "important"})
    scores = File(path=path).score(LAYERS)
    assert scores.values == (2.5, 1)
    assert scores.higher_means == "important"
    assert path in scores.source


def test_file_reads_what_to_dict_wrote(tmp_path):
    scores = DataInf().score(layer_grams())
    read = File(path=write(tmp_path, scores.to_dict())).score(LAYERS)
    assert (read.layers, read.values, read.higher_means) == (scores.layers, scores.values, scores.higher_means)
    assert read.fingerprint == "f1"
    assert scores.source in read.source


def test_file_reads_the_record_of_a_run(tmp_path):
    scores = Exact().score(layer_grams())
    record = {
        "name": "run",
        "layers": list(scores.layers),
        "scores": list(scores.values),
        "higher_means": "undertrained",
        "source": scores.source,
        "fingerprint": "f1",
        "allocation": {"values": [1, 1]},
    }
    read = File(path=write(tmp_path, record)).score(LAYERS)
    assert (read.values, read.fingerprint) == (scores.values, "f1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": ["block.0", "block.2"], "values": [1, 2], "higher_means": "important"}, r"block\.2.*did you mean"),
        ({"layers": ["block.0"], "values": [1], "higher_means": "important"}, r"lacks 1 of the model's 2 layers"),
        ({"layers": ["block.0", "block.1"], "values": [1], "higher_means": "important"}, "1 for 2 layers"),
        ({"layers": ["block.0", "block.1"], "values": [1, -2], "higher_means": "important"}, r">= 0.*block\.1"),
        ({"layers": ["block.0", "block.1"], "values": [1, 2], "higher_means": "better"}, "undertrained, important"),
        ({"layers": ["block.0", "block.1"], "values": [1, 2]}, "lacks higher_means"),
        ({"layers": "block.0", "values": [1], "higher_means": "important"}, "lists"),
        ([1, 2], "lacks layers, values, higher_means"),
    ],
)
def test_file_refuses_scores_of_another_model_or_shape(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        File(path=write(tmp_path, content)).score(LAYERS)


def test_scoring_real_gradients_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DataInf().score(layer_grams()).values[0] > 0
