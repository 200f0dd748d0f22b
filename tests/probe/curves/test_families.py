"""Loss curves of families with Conv1D, hybrid blocks, text decoders and fused experts, against their definition."""

from __future__ import annotations

import pytest
import torch

from layerif.models.blocks import layer_map
from layerif.probe.curves.measure import measure_loss_curves
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.wanda import Wanda
from tests.families import TOLERANCES, each_family, model_of, separated
from tests.probe.curves.test_measure import LEVELS, assert_is_the_definition, loss_text

pytestmark = pytest.mark.usefixtures("softmax_in_the_models_dtype", "all_in_the_models_dtype")


@pytest.mark.parametrize("family", each_family())
def test_curves_are_those_of_the_same_model_with_separate_linear_layers(family):
    model = model_of(family).double()
    tolerance = TOLERANCES.get(family, 1e-8)
    assert_is_the_definition(model, Wanda(), reference=separated(model), tolerance=tolerance)


def test_an_expert_without_a_token_is_named():
    model = model_of("mixtral").double()
    router = model.model.layers[0].mlp.gate
    router.top_k = 1
    with torch.no_grad():  # expert 2 of the first block is never the best: one of two opposite experts is better
        router.weight[1], router.weight[2] = -router.weight[0], 0
    params = layer_map(model, scope="all").matrices
    with pytest.raises(ValueError, match=r"no calibration token reaches model\.layers\.0\.mlp\.experts\.2; .*skip=\["):
        measure_loss_curves(model, params, Wanda(), loss_text(), LEVELS)
    with pytest.warns(
        RuntimeWarning, match=r"no token of the samples reaches model\.layers\.0\.mlp\.experts\.2\.gate_up"
    ):
        found = measure_loss_curves(model, params, Magnitude(), loss_text(), LEVELS)
    assert not found.costs[found.units.index("model.layers.0.mlp.experts.2.down_proj")].any()
