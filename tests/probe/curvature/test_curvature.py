"""Influence under K-FAC, EK-FAC and Shampoo equals its dense definition in float64, and kronfluence's figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from layerif.data.batches import Encoded, Encodings, batches, collate
from layerif.decide import Decider
from layerif.estimators.ekfac import Ekfac
from layerif.estimators.kfac import Kfac
from layerif.estimators.shampoo import Shampoo
from layerif.evidence import DAMPINGS, LayerCurvature, MatrixCurvature, damping_weights
from layerif.layers import LayerMap
from layerif.models.blocks import bare, layer_map
from layerif.models.loss import per_sample_loss
from layerif.probe.curvature.bases import Spectrum
from layerif.probe.curvature.measure import measure_curvature
from tests.tiny import FAMILIES, VOCAB_SIZE, tiny_model

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "kronfluence.json").read_text())["influences"]
SPECTRA: tuple[Spectrum, ...] = ("kfac", "ekfac", "shampoo")


def samples(*lengths: int, seed: int = 0) -> Encodings:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return Encodings(Encoded(tuple(row), 3, loss_from=4 * (index % 2)) for index, row in enumerate(rows))


LENGTHS = 9, 12, 7, 12, 10, 8
TRAIN, VALIDATION = samples(*LENGTHS), samples(*LENGTHS[:3], seed=1)


def measured(model: Any, layers: LayerMap, *, batch_size: int = 2, **settings: Any) -> LayerCurvature:
    parts = (list(batches(part, batch_size, pad_id=1)) for part in (TRAIN, VALIDATION))
    return measure_curvature(model, layers, *parts, **{"queries": "each", **settings})


def dense(model: Any, param: str, dampings: Sequence[float]) -> dict[tuple[str, float], Tensor]:
    """I = −V (F + λ)⁻¹ Gᵀ with each approximation of F as a whole matrix, from factors taken sample by sample."""
    module, weight = bare(model).get_submodule(param.removesuffix(".weight")), bare(model).get_parameter(param)
    inputs, deltas, gradients = [], [], []
    for sample in (*TRAIN, *VALIDATION):

        def keep(module, args, output):
            inputs.append(args[0].detach().reshape(-1, weight.shape[1]))
            output.register_hook(lambda delta: deltas.append(delta.detach().reshape(-1, weight.shape[0])))

        handle = module.register_forward_hook(keep)
        gradients += torch.autograd.grad(per_sample_loss(model, collate([sample], 1)).sum(), weight)
        handle.remove()
    number = len(TRAIN)
    train_NOI, val_MOI = torch.stack(gradients[:number]), torch.stack(gradients[number:])
    train_NP, val_MP = train_NOI.flatten(1), val_MOI.flatten(1)
    input_RI, delta_RO = torch.cat(inputs[:number]), torch.cat(deltas[:number])
    trace = train_NP.square().sum() / number

    def scaled(fisher_PP: Tensor) -> Tensor:
        return fisher_PP * trace / fisher_PP.trace()

    a_II, b_OO = input_RI.T @ input_RI, delta_RO.T @ delta_RO
    basis_PP = torch.kron(torch.linalg.eigh(b_OO)[1], torch.linalg.eigh(a_II)[1])
    fisher = {
        "kfac": scaled(torch.kron(b_OO, a_II)),
        "ekfac": basis_PP @ (train_NP @ basis_PP).square().mean(dim=0).diag() @ basis_PP.T,
        "shampoo": scaled(
            torch.kron(
                root((train_NOI @ train_NOI.mT).sum(dim=0)),
                root((train_NOI.mT @ train_NOI).sum(dim=0)),
            )
        ),
    }
    found = {}
    for name, fisher_PP in fisher.items():
        spectrum_P, basis_PP = torch.linalg.eigh(fisher_PP)
        for damping in dampings:
            lam = damping * trace / train_NP.shape[1]
            solved_PN = basis_PP @ ((basis_PP.T @ train_NP.T) / (spectrum_P + lam)[:, None])
            found[name, damping] = -val_MP @ solved_PN
    return found


def root(square: Tensor) -> Tensor:
    spectrum, basis = torch.linalg.eigh(square)
    return basis @ spectrum.clamp(min=0).sqrt().diag() @ basis.T


def smallest(layers: LayerMap, model: Any) -> str:
    return min(layers.params[0], key=lambda param: bare(model).get_parameter(param).numel())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_dense_definition_at_every_damping(family):
    small = {"hidden_size": 16} | ({"head_dim": 4} if "head_dim" in FAMILIES[family] else {})
    model = tiny_model(family, num_hidden_layers=1, **small).double()
    layers = layer_map(model)
    found, param = measured(model, layers), smallest(layers, model)
    for (spectrum, damping), expected in dense(model, param, (0.1, 1.0, 0.037, 300.0)).items():
        influence_MN = found.matrices[param].influence(spectrum, damping)
        tolerance = 1e-7 if damping in (0.1, 1.0) else 1e-5  # those that are kept, and those in between
        assert float((influence_MN - expected).norm() / expected.norm()) < tolerance, (spectrum, damping)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_kronfluence_found_the_same(family):
    model = tiny_model(family, num_hidden_layers=1).double()
    found = measured(model, layer_map(model, scope="all"), spectra=("ekfac", "kfac"))
    for spectrum, by_damping in GOLDEN[family].items():
        for damping, by_matrix in by_damping.items():
            assert set(by_matrix) == set(found.matrices)
            for param, values in by_matrix.items():
                theirs = torch.tensor(values, dtype=torch.float64)
                ours = found.matrices[param].influence(spectrum, float(damping))
                if spectrum == "kfac":  # theirs has another scale, see the file
                    theirs = theirs * ours.norm() / theirs.norm()
                assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_neither_batches_nor_tiles_nor_passes_nor_files_change_it(tmp_path):
    model = tiny_model(num_hidden_layers=1).double()
    layers = layer_map(model, scope="all")
    one = measured(model, layers)
    others: tuple[dict[str, Any], ...] = (
        {"batch_size": 4},
        {"memory_gb": 5.5e-4},  # several passes, one output row at a time
        {"offload": "disk", "partial": tmp_path},
        {"spectra": ("shampoo", "kfac", "ekfac")},
    )
    for settings in others:
        other = measured(model, layers, **settings)
        for param, matrix in one.matrices.items():
            for spectrum in SPECTRA:
                expected = matrix.influence(spectrum, 0.1)
                found = other.matrices[param].influence(spectrum, 0.1)
                assert float((found - expected).norm() / expected.norm()) < 1e-7, settings


def test_too_little_memory_is_refused_with_what_would_do():
    model = tiny_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"are too few: .* raise probe\.memory_gb to at least"):
        measured(model, layer_map(model), memory_gb=1e-6)


def test_float32_suffices_and_halves_are_sums_over_queries():
    model = tiny_model(num_hidden_layers=1)
    layers = layer_map(model)
    single, halved = measured(model, layers), measured(model, layers, queries="halves")
    precise = measured(model.double(), layers)
    for param, matrix in precise.matrices.items():
        for spectrum in SPECTRA:
            each = matrix.influence(spectrum, 0.1)
            found = single.matrices[param].influence(spectrum, 0.1)
            assert float((found - each).norm() / each.norm()) < 1e-3
            sums = torch.stack([each[::2].sum(dim=0), each[1::2].sum(dim=0)])
            assert float((halved.matrices[param].influence(spectrum, 0.1) - sums).norm() / sums.norm()) < 1e-3


def test_the_weights_of_kept_dampings_give_every_fraction():
    eigenvalues = torch.cat([torch.zeros(1), 10.0 ** (24 * torch.rand(2000) - 12)]).double()[:, None]
    for damping in (1e-4, 3e-4, 0.05, 0.123, 1.7, 77.0, 1e4):
        fractions = (damping_weights(damping) / (eigenvalues + torch.tensor(DAMPINGS).double())).sum(dim=1)
        assert float((fractions * (eigenvalues[:, 0] + damping) - 1).abs().max()) < 2e-6
    assert damping_weights(0.1).count_nonzero() == 1
    for damping in (0.9e-4, 1.1e4):
        with pytest.raises(ValueError, match=r"use one from 0\.0001 to 10000"):
            damping_weights(damping)


def test_zero_gradients_count_as_zero_and_are_named():
    model = get_peft_model(tiny_model(num_hidden_layers=1), LoraConfig(r=2, target_modules=["q_proj"])).double()
    layers = layer_map(model, parameters="lora")
    found = measured(model, layers)
    with pytest.warns(RuntimeWarning, match=r"all gradients are zero.*lora_A.*1 of 2 matrices"):
        assert Ekfac().score(found).values[0] > 0
    of_a, of_b = (Ekfac().influences(found)[param] for param in layers.params[0])
    assert not of_a.any()  # while B is zero
    expected = dense(model, layers.params[0][1], [0.1])["ekfac", 0.1]
    torch.testing.assert_close(of_b, expected, rtol=1e-6, atol=1e-9)


def test_scores_sum_the_influence_of_a_blocks_matrices_at_either_damping():
    layers = LayerMap(("a", "b"), (("a.q", "a.k"), ("b.q",)), (2, 2))
    curvature = {"a.q": 2.0, "a.k": -1.0, "b.q": 3.0}
    lams = torch.tensor(DAMPINGS).double()[:, None, None]
    matrices = {
        param: MatrixCurvature({"ekfac": -value / (1 + lams).expand(-1, 3, 4)}, mean_square=2.0)
        for param, value in curvature.items()
    }
    found = LayerCurvature(layers, matrices, "f")
    assert Ekfac(damping=1.0).score(found).values == pytest.approx((6.0, 18.0))
    assert Ekfac(damping=2.0, damping_rule="absolute", normalisation="numel").score(found).values == pytest.approx(
        (3.0, 9.0)
    )
    with pytest.raises(ValueError, match=r"a\.q: the damping is 5e-06 times .*damping_rule=relative"):
        Ekfac(damping=1e-5, damping_rule="absolute").score(found)
    with pytest.raises(ValueError, match=r"estimator\.damping=1e-05 is out of the range .* 0\.0001 to 10000"):
        Shampoo(damping=1e-5)


def test_one_measurement_serves_both_estimators_and_every_damping(decider: Decider):
    first = replace(decider, estimator=Ekfac())()
    assert not first.reused
    assert first.scores is not None
    assert all(value > 0 for value in first.scores.values)
    assert first.reliability is not None
    for other in (Ekfac(aggregation="positive"), Ekfac(damping=3.0), Kfac()):
        again = replace(decider, estimator=other)()
        assert again.reused
        assert again.scores is not None
        assert again.scores.fingerprint == first.scores.fingerprint
        assert (again.scores.values == first.scores.values) == (other == Ekfac(aggregation="positive"))  # all help
    assert not replace(decider, estimator=Shampoo())().reused


def test_projected_gradients_have_no_curvature(decider: Decider):
    projected = replace(decider, estimator=Kfac(), probe=replace(decider.probe, projection=4))
    with pytest.raises(ValueError, match=r"probe\.projection=4 .*kfac and ekfac work on whole gradients"):
        projected.preview()
