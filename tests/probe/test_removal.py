"""The error that a mask makes is a sum over pairs of removed weights; batch size and padding change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layerif.data.batches import Encoded, Encodings
from layerif.estimators.lsa import Lsa
from layerif.estimators.outlier import Outlier
from layerif.models.blocks import layer_map
from layerif.probe import activations, removal
from layerif.probe.activations import observe
from layerif.probe.removal import removal_errors
from layerif.pruning.wanda import wanda_mask
from tests.tiny import FAMILIES, tiny_model


def samples(lengths: tuple[int, ...] = (9, 4, 7, 7, 2, 5)) -> Encodings:
    generator = torch.Generator().manual_seed(0)
    rows = (tuple(torch.randint(3, 64, (length,), generator=generator).tolist()) for length in lengths)
    return Encodings(Encoded(ids, 1) for ids in rows)


def errors(model, *, sparsity: float = 0.5, **options) -> dict[str, torch.Tensor]:
    layers = layer_map(model, scope="all", skip_unsupported=True)
    seen = observe(model, layers, samples(), [None] * 6, epsilon=0.1)
    norms = {param: seen[f"input_square_norms/{param}"] for param in layers.matrices}
    return removal_errors(model, layers, samples(), norms, sparsity=sparsity, mask=wanda_mask, **options)


def by_pairs(weight_OI: torch.Tensor, input_VI: torch.Tensor, sparsity: float) -> float:
    """Sums w_j w_k H_jk over every row and every pair of its weights of least |w|·‖x‖; exact where rows lose alike."""
    gram_II = (input_VI.T @ input_VI).tolist()
    norms, total = input_VI.norm(dim=0).tolist(), 0.0
    for row in weight_OI.tolist():
        removed = sorted(range(len(row)), key=lambda j: abs(row[j]) * norms[j])[: int(sparsity * len(row))]
        total += sum(row[j] * row[k] * gram_II[j][k] for j in removed for k in removed)
    return total


@pytest.mark.usefixtures("softmax_in_the_models_dtype")
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_is_the_sum_over_pairs_of_removed_weights(family, sparsity):
    model = tiny_model(family).double()
    inputs: dict[str, list[torch.Tensor]] = {}
    names = [param.removesuffix(".weight") for param in layer_map(model, scope="all", skip_unsupported=True).matrices]

    def keeping(name: str):
        return lambda module, given: inputs.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))

    handles = [model.get_submodule(name).register_forward_pre_hook(keeping(name)) for name in names]
    with torch.no_grad():
        for row in samples():
            model(input_ids=torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    found = errors(model, sparsity=sparsity, batch_size=3)
    assert found.keys() == {f"{name}.weight" for name in names}
    for name in names:
        weight = model.get_parameter(f"{name}.weight").detach()
        assert (sparsity * weight.shape[1]) % 1 == 0
        expected = by_pairs(weight, torch.cat(inputs[name]), sparsity)
        assert float(found[f"{name}.weight"]) == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_batch_size_and_padding_change_nothing(family):
    alone = errors(tiny_model(family), batch_size=1)
    for options in ({"batch_size": 2}, {"batch_size": 8}, {"batch_size": 8, "pad_id": 7}):
        batched = errors(tiny_model(family), **options)
        assert {name: float(value) for name, value in batched.items()} == pytest.approx(
            {name: float(value) for name, value in alone.items()}, rel=1e-4
        )


def test_half_precision_is_summed_up_in_float32():
    model = tiny_model("llama").bfloat16()
    single = errors(tiny_model("llama"))
    assert {name: float(value) for name, value in errors(model).items()} == pytest.approx(
        {name: float(value) for name, value in single.items()}, rel=0.05
    )


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    errors(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_store_keeps_errors_by_proxy_and_the_inputs_are_measured_once(decider, monkeypatch):
    passes: list[str] = []
    for module, name in ((activations, "observe"), (removal, "removal_errors")):
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=inner, **kw: passes.append(n) or f(*args, **kw))
    replace(decider, estimator=Outlier(multiple=2.0))()
    first = replace(decider, estimator=Lsa())()
    assert passes == ["observe", "removal_errors"]
    assert not first.reused
    again = replace(decider, estimator=Lsa(), probe=replace(decider.probe, batch_size=3))()
    assert again.reused
    assert again.scores == first.scores
    other = replace(decider, estimator=Lsa(proxy=0.25))()
    assert passes == ["observe", "removal_errors", "removal_errors"]
    assert other.scores.values != first.scores.values
    assert other.scores.fingerprint != first.scores.fingerprint
