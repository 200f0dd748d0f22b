"""Laws of the per-layer types: shapes are checked, Grams add like gradients laid end to end, names decide."""

from __future__ import annotations

import pytest
import torch

from layerif.evidence import MatrixGram
from layerif.layers import LayerMap, block_of, depths, in_layer_order, kinds_of, short_names, within_block


def gram_of(train_NP: torch.Tensor, val_MP: torch.Tensor) -> MatrixGram:
    return MatrixGram(train_NP @ train_NP.T, val_MP @ train_NP.T, val_MP.norm(dim=1), train_NP.shape[1])


def test_the_sum_of_grams_is_the_gram_of_concatenated_gradients():
    torch.manual_seed(0)
    train_a, train_b = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    val_a, val_b = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    both = gram_of(train_a, val_a) + gram_of(train_b, val_b)
    whole = gram_of(torch.cat([train_a, train_b], dim=1), torch.cat([val_a, val_b], dim=1))
    torch.testing.assert_close(both.train_train, whole.train_train)
    torch.testing.assert_close(both.val_train, whole.val_train)
    torch.testing.assert_close(both.val_norms, whole.val_norms)
    assert both.numel == whole.numel


@pytest.mark.parametrize(
    ("train_train", "val_train", "val_norms"),
    [((4, 5), (3, 4), (3,)), ((5, 5), (3, 4), (3,)), ((4, 4), (3, 4), (4,))],
)
def test_a_gram_of_wrong_shape_is_refused_with_both_shapes(train_train, val_train, val_norms):
    with pytest.raises(ValueError, match=r"\(3, 4\).*M×N") as error:
        MatrixGram(torch.zeros(train_train), torch.zeros(val_train), torch.zeros(val_norms), 1)
    assert str(train_train) in str(error.value)
    assert str(val_norms) in str(error.value)


def test_a_layer_map_needs_one_entry_per_block():
    with pytest.raises(ValueError, match="2 names, 1 params, 2 numel"):
        LayerMap(("a", "b"), (("a.w",),), (3, 4))


def test_a_layer_map_tells_its_matrices_and_their_blocks_in_order():
    layers = LayerMap(("a", "b"), (("a.q", "a.k"), ("b.q",)), (3, 4))
    assert layers.matrices == ("a.q", "a.k", "b.q")
    assert layers.by_block == {"a": ("a.q", "a.k"), "b": ("b.q",)}
    assert layers.block_of == {"a.q": "a", "a.k": "a", "b.q": "b"}


def test_values_are_taken_by_name():
    assert in_layer_order({"b": 2, "a": 1}, ("a", "b"), source="x.json") == (1, 2)


def test_an_unknown_layer_is_refused_with_the_nearest_name():
    layers = ("model.layers.0", "model.layers.1")
    with pytest.raises(ValueError, match=r"x\.json.*'model\.layer\.1'.*did you mean 'model\.layers\.1'\?"):
        in_layer_order({"model.layers.0": 1, "model.layer.1": 2}, layers, source="x.json")


def test_a_missing_layer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"lacks 1 of the model's 2 layers.*'b'"):
        in_layer_order({"a": 1}, ("a", "b"), source="x.json")


def test_selecting_samples_equals_measuring_only_those():
    torch.manual_seed(0)
    train_NP, val_MP = torch.randn(6, 9), torch.randn(4, 9)
    gram = MatrixGram(train_NP @ train_NP.T, val_MP @ train_NP.T, val_MP.norm(dim=1), 9)
    chosen, kept = torch.tensor([4, 1, 2]), slice(1, None, 2)
    train_NP, val_MP = train_NP[chosen], val_MP[kept]
    selected = gram.select(chosen, kept)
    torch.testing.assert_close(selected.train_train, train_NP @ train_NP.T)
    torch.testing.assert_close(selected.val_train, val_MP @ train_NP.T)
    torch.testing.assert_close(selected.val_norms, val_MP.norm(dim=1))


def test_an_unknown_or_missing_matrix_is_called_a_matrix():
    matrices = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
    unknown = r"the matrix '.*up_prj', which .* or pruner\.skip leaves out \(did you mean '.*up_proj'"
    with pytest.raises(ValueError, match=unknown):
        in_layer_order({"model.layers.0.mlp.up_prj": 1}, matrices, source="x.json", unit="matrix")
    with pytest.raises(ValueError, match=r"lacks 1 of the model's 2 matrices, the first is '.*down_proj'"):
        in_layer_order({matrices[0]: 1}, matrices, source="x.json", unit="matrix")


@pytest.mark.parametrize(
    ("unit", "block", "inside"),
    [
        ("model.layers.12.mlp.down_proj", "model.layers.12", "mlp.down_proj"),
        ("model.layers.1.mlp.experts.3.w1", "model.layers.1", "mlp.experts.3.w1"),
        ("model.layers.12", "model.layers.12", ""),
        ("lm_head", "lm_head", ""),
    ],
)
def test_a_matrix_is_its_block_and_its_name_inside(unit, block, inside):
    assert (block_of(unit), within_block(unit)) == (block, inside)


def test_blocks_have_the_numbers_of_their_names_or_else_their_places():
    assert depths(["h.2", "h.10"]) == {"h.2": 2, "h.10": 10}
    assert depths(["b", "a.1"]) == {"b": 0, "a.1": 1}
    assert depths(["left.3", "right.3"]) == {"left.3": 0, "right.3": 1}
    assert depths(["h.99999", "h.1"]) == {"h.99999": 0, "h.1": 1}  # a picture of so many blocks would fill the memory


def test_kinds_of_matrices_keep_the_order_of_the_model_whichever_block_lacks_some():
    model = ["q", "k", "v", "o", "up", "down"]
    for lacking in model:
        first = [f"h.0.{kind}" for kind in model if kind != lacking]
        assert kinds_of([*first, *(f"h.1.{kind}" for kind in model)]) == model
    assert kinds_of(["h.0", "h.1"]) == []


def test_names_are_as_short_as_tells_them_apart():
    assert short_names(["attn.q_proj", "mlp.up_proj"]) == ["q_proj", "up_proj"]
    assert short_names(["experts.0.w1", "experts.1.w1"]) == ["experts.0.w1", "experts.1.w1"]
