"""EK-FAC equals its dense definition in float64 and leaves the model as it was.

Most of it needs kronfluence, which is no part of the test environment: `make test-ekfac` runs it in one of its own.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr

from layerif.data.batches import Encoded, Encodings, batches, collate
from layerif.decide import Decider
from layerif.estimators.ekfac import Ekfac
from layerif.estimators.exact import Exact
from layerif.estimators.uniform import Uniform
from layerif.evidence import LayerInfluences
from layerif.layers import LayerMap
from layerif.models.blocks import bare, layer_map
from layerif.models.loss import per_sample_loss
from layerif.probe import ekfac
from layerif.probe.grams.measure import measure
from tests.tiny import VOCAB_SIZE, tiny_model

needs_kronfluence = pytest.mark.skipif(
    find_spec("kronfluence") is None,
    reason="kronfluence is not installed; `make test-ekfac` runs this in an environment of its own",
)
LENGTHS = 9, 12, 7, 12, 10, 8


def samples(*lengths: int, seed: int = 0) -> Encodings:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return Encodings(Encoded(tuple(row), 3, loss_from=4 * (index % 2)) for index, row in enumerate(rows))


@pytest.fixture
def decider(decider: Decider) -> Decider:
    return replace(decider, estimator=Ekfac())


TRAIN, VALIDATION = samples(*LENGTHS), samples(*LENGTHS[:3], seed=1)


def measured(model, layers: LayerMap, **settings) -> dict[str, torch.Tensor]:
    settings = {"pad_id": 1, "batch_size": 2, "damping": 0.1, **settings}
    return dict(ekfac.measure_ekfac(model, layers, TRAIN, VALIDATION, **settings).influences)


def dense(model, param: str, damping: float, relative: bool) -> torch.Tensor:
    """The definition, from factors and gradients taken sample by sample."""
    module, weight = bare(model).get_submodule(param.removesuffix(".weight")), bare(model).get_parameter(param)
    inputs, deltas, gradients = [], [], {}
    for part, encodings in (("train", TRAIN), ("validation", VALIDATION)):
        for sample in encodings:

            def keep(module, args, output):
                inputs.append(args[0].detach()[0])
                output.register_hook(lambda delta: deltas.append(delta.detach()[0]))

            handle = module.register_forward_hook(keep)
            (gradient,) = torch.autograd.grad(per_sample_loss(model, collate([sample], 1)).sum(), weight)
            handle.remove()
            gradients.setdefault(part, []).append(gradient)
    input_RI, delta_RO = (torch.cat(rows[: len(TRAIN)]) for rows in (inputs, deltas))
    basis_II, basis_OO = (torch.linalg.eigh(rows.T @ rows)[1] for rows in (input_RI, delta_RO))
    turned = {part: basis_OO.T @ torch.stack(rows) @ basis_II for part, rows in gradients.items()}
    spectrum_OI = turned["train"].square().mean(dim=0)
    lam = damping * float(spectrum_OI.mean()) if relative else damping
    return -(turned["validation"] / (spectrum_OI + lam)).flatten(1) @ turned["train"].flatten(1).T


@needs_kronfluence
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize(("damping", "relative"), [(0.1, True), (3.0, True), (1e-3, False)])
def test_it_is_the_dense_definition(family, damping, relative):
    model = tiny_model(family, num_hidden_layers=1).double()
    layers = layer_map(model, scope="all")
    found = measured(model, layers, damping=damping, relative=relative)
    assert list(found) == list(layers.params[0])
    for param, influence_MN in found.items():
        torch.testing.assert_close(influence_MN, dense(model, param, damping, relative), rtol=1e-6, atol=1e-9)


@needs_kronfluence
def test_neither_batches_nor_memory_change_it():
    model = tiny_model(num_hidden_layers=1).double()
    layers = layer_map(model)
    one = measured(model, layers)
    for settings in ({"batch_size": 4}, {"memory_gb": 1e-9}):
        for param, influence_MN in measured(model, layers, **settings).items():
            torch.testing.assert_close(influence_MN, one[param], rtol=1e-6, atol=1e-9)


@needs_kronfluence
def test_it_agrees_with_exact_influence():
    """Another curvature of the same gradients: mostly the same sign, and samples ranked alike."""
    model = tiny_model().double()
    layers = layer_map(model)
    found = measured(model, layers, damping=10.0)
    train, validation = (list(batches(encodings, 2, 1)) for encodings in (TRAIN, VALIDATION))
    exact = Exact(damping=10.0).influences(measure(model, layers, train, validation).in_float64.grams)
    ours, theirs = (torch.cat([each[param].flatten() for param in found]) for each in (found, exact))
    large = theirs.abs() > theirs.abs().median()
    assert float((ours.sign() == theirs.sign())[large].float().mean()) > 0.95
    assert spearmanr(ours, theirs)[0] > 0.75  # type: ignore[operator]


@needs_kronfluence
def test_the_model_is_left_as_it_was():
    model = tiny_model("qwen2").train()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before = [(name, type(module), module.training) for name, module in model.named_modules()]
    parameters = {name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()}
    poisoned = tiny_model("qwen2")
    poisoned.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss of a sample is not finite"):
        measured(poisoned, layer_map(poisoned))
    assert [type(module) for module in poisoned.modules()] == [kind for _, kind, _ in before]
    measured(model, layer_map(model))
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == before
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == parameters[name][0]
        assert torch.equal(parameter, parameters[name][1])


@needs_kronfluence
def test_matrices_of_an_adapter_are_measured_and_zero_gradients_count_as_zero():
    model = get_peft_model(tiny_model(num_hidden_layers=1), LoraConfig(r=2, target_modules=["q_proj"])).double()
    layers = layer_map(model, parameters="lora")
    with pytest.warns(RuntimeWarning, match=r"all train gradients are zero.*lora_A.*1 of 2 matrices"):
        found = measured(model, layers)
    influence_A, influence_B = (found[param] for param in layers.params[0])
    assert not influence_A.any()  # while B is zero
    torch.testing.assert_close(influence_B, dense(model, layers.params[0][1], 0.1, True), rtol=1e-6, atol=1e-9)


@needs_kronfluence
def test_a_decider_measures_it_once_for_each_damping(decider: Decider):
    first = decider()
    assert not first.reused
    assert first.scores is not None
    assert all(value > 0 for value in first.scores.values)
    assert first.reliability is not None
    again = replace(decider, estimator=Ekfac(aggregation="positive"))()
    assert again.reused
    assert again.scores.fingerprint == first.scores.fingerprint  # type: ignore[union-attr]
    assert not replace(decider, estimator=Ekfac(damping=1.0))().reused


@pytest.mark.skipif(find_spec("kronfluence") is not None, reason="kronfluence is installed")
def test_without_kronfluence_the_commands_are_given_before_anything_is_measured(decider: Decider):
    def never():
        raise AssertionError("no model is needed for that")

    with pytest.raises(ValueError, match=r"not installed; run `pip install --no-deps kronfluence==1\.0\.1`"):
        decider(never)
    replace(decider, estimator=Uniform())(never)


def test_scores_sum_the_influences_of_a_blocks_matrices():
    layers = LayerMap(("a", "b"), (("a.q", "a.k"), ("b.q",)), (2, 2))
    influences = {name: torch.full((3, 4), value) for name, value in (("a.q", -2.0), ("a.k", 1.0), ("b.q", -3.0))}
    scores = Ekfac().score(LayerInfluences(layers, influences, "f"))
    assert scores.values == (12.0, 36.0)
    assert Ekfac(normalisation="numel").score(LayerInfluences(layers, influences, "f")).values == (6.0, 18.0)


@pytest.fixture(autouse=True)
def _as_users_see_it():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield
