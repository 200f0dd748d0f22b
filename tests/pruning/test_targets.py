"""Every matrix gets its count by name, and what cannot be pruned is refused by name."""

from __future__ import annotations

import pytest

from layerif.models.blocks import blocks
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.targets import matrices, targets
from tests.tiny import FAMILIES, tiny_model


def removed(model, found) -> int:
    return sum(
        round(target.sparsity * dict(matrices(model))[f"{block}.{name}"].weight.numel())
        for block, of in found.items()
        for name, target in of.items()
    )


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_blocks_hand_their_sparsity_to_their_matrices_and_the_total_is_exact(family):
    model = tiny_model(family)
    allocation = {name: 0.3 + 0.037 * number for number, name in enumerate(blocks(model))}
    found = targets(model, allocation, Magnitude())
    exact = sum(
        allocation[block] * dict(matrices(model))[f"{block}.{name}"].weight.numel()
        for block, of in found.items()
        for name in of
    )
    assert abs(removed(model, found) - exact) <= 0.5 + 1e-6
    assert list(found) == list(allocation)
    assert all(abs((target.sparsity or 0) - allocation[b]) < 0.01 for b, of in found.items() for target in of.values())


def test_a_matrix_goes_before_its_block():
    model = tiny_model()
    allocation = dict.fromkeys(blocks(model), 0.5)
    allocation |= {"model.layers.1.mlp": 0.25, "model.layers.1.mlp.up_proj.weight": 0.75}
    found = targets(model, allocation, Magnitude())["model.layers.1"]
    assert found["mlp.up_proj"].sparsity == 0.75
    assert found["mlp.down_proj"].sparsity == 0.25
    assert found["self_attn.q_proj"].sparsity == 0.5


def test_mixed_groups_follow_the_blocks_and_fixed_groups_must_agree():
    model = tiny_model()
    allocation = dict(zip(blocks(model), (0.25, 0.5, 0.75), strict=True))
    found = targets(model, allocation, Magnitude(m=4))
    assert [{target.n for target in of.values()} for of in found.values()] == [{3}, {2}, {1}]
    with pytest.raises(ValueError, match=r"removes 0\.5 everywhere, but model\.layers\.0 is allocated 0\.25"):
        targets(model, allocation, Magnitude(n=2, m=4))
    even = targets(model, dict.fromkeys(allocation, 0.5), Magnitude(n=2, m=4))
    assert {target.n for of in even.values() for target in of.values()} == {2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.7": 0.5},
            r"'model\.layers\.7', which holds no linear layer \(did you mean 'model\.layers\.\d.* name blocks or",
        ),
        ({"model.layers.1": None}, r"no sparsity for model\.layers\.1\.self_attn\.q_proj \(7 of 21"),
        ({"model.layers.1": 1.0}, r"model\.layers\.1 is 1\.0; allowed: a number of at least 0 and below 1"),
    ],
)
def test_names_and_values_are_checked(change, message):
    model = tiny_model()
    allocation = dict.fromkeys(blocks(model), 0.5) | change
    allocation = {name: value for name, value in allocation.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        targets(model, allocation, Magnitude())


def test_a_width_that_m_does_not_divide_names_its_matrix():
    model = tiny_model(intermediate_size=54)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj with 54 inputs .* m=8"):
        targets(model, dict.fromkeys(blocks(model), 0.5), Magnitude(n=4, m=8))


def test_shared_weights_are_refused_by_name():
    model = tiny_model()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj shares its weight with model\.layers\.0\.mlp\.up"):
        matrices(model)
