"""Spectra equal the dense eigenvalues, and an exponent can be read off them."""

from __future__ import annotations

import pytest
import torch

from layerif.models.blocks import layer_map
from layerif.probe.spectra import spectra
from tests.tiny import tiny_model


def test_eigenvalues_are_those_of_the_dense_gram():
    model = tiny_model("llama").double()
    layers = layer_map(model, scope="all")
    found = spectra(model, layers)
    for params in layers.params:
        for param in params:
            weight = model.get_parameter(param).detach()
            dense = torch.linalg.eigvalsh(weight.mT @ weight)[-min(weight.shape) :]
            torch.testing.assert_close(found[param], dense)
    assert len(found["seconds"]) == 3
    assert bool((found["seconds"] > 0).all())


def test_half_precision_is_decomposed_in_float32():
    model = tiny_model("llama").bfloat16()
    layers = layer_map(model, scope="attention")
    found = spectra(model, layers)
    expected = spectra(model.float(), layers)
    assert all(torch.equal(found[param], expected[param]) for params in layers.params for param in params)


def test_a_weight_that_is_not_finite_is_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.k_proj.weight")[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight is not finite"):
        spectra(model, layer_map(model))
