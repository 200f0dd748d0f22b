"""The statistics pass against a loop over single samples in float64, and what must not change a statistic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from layerif.data.batches import Encoded
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map
from layerif.probe.activations import observe
from tests.tiny import FAMILIES, tiny_model

LENGTHS = (9, 4, 7, 7, 2, 5)
PROMPTS = (6, 2, 3, 6, 1, 5)  # the last sample has lost its output
EPSILON = 0.05


def samples(seed: int, missing: tuple[int, ...] = ()) -> list[Encoded | None]:
    generator = torch.Generator().manual_seed(seed)
    found: list[Encoded | None] = []
    for index, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        ids = tuple(torch.randint(3, 64, (length,), generator=generator).tolist())
        found.append(None if index in missing else Encoded(ids, prompt))
    return found


RIGHT, WRONG = samples(0), samples(1, missing=(3,))


def look(model, **options) -> dict[str, torch.Tensor]:
    layers = layer_map(model, scope="all", skip_unsupported=True)
    return observe(model, layers, RIGHT, WRONG, epsilon=EPSILON, **options)  # type: ignore[arg-type]


def one_by_one(model, layers: LayerMap, rows: list[Encoded | None]) -> Iterator[Any]:
    """Per sample: input and output of every block (L×T×H), and the input of every matrix, by plain hooks."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str):
        def hook(module, args, kwargs, output) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            seen[name] = before, output[0] if isinstance(output, tuple) else output

        return hook

    names = [*layers.names, *(param.removesuffix(".weight") for params in layers.params for param in params)]
    handles = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in names]
    for row in filter(None, rows):
        with torch.no_grad():
            model(input_ids=torch.tensor([row.input_ids]))
        before, after = (torch.stack([seen[name][side].view(len(row), -1) for name in layers.names]) for side in (0, 1))
        inputs = {f"{name}.weight": seen[name][0].reshape(len(row), -1) for name in names[len(layers.names) :]}
        yield row, before, after, inputs
    for handle in handles:
        handle.remove()


def moments_of(output_LTH: torch.Tensor) -> torch.Tensor:
    """The number of entries of each block's output, their sum, that of their squares, and those near zero (L×4)."""
    near_LTH = (output_LTH.abs() < EPSILON).double()
    counted = torch.ones_like(output_LTH), output_LTH, output_LTH.square(), near_LTH
    return torch.stack([each.sum((1, 2)) for each in counted], dim=1)


@pytest.mark.usefixtures("softmax_in_the_models_dtype")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_statistic_is_its_definition_over_the_real_tokens(family):
    model = tiny_model(family).double()
    layers = layer_map(model, scope="all", skip_unsupported=True)
    ours = look(model, batch_size=3)
    looked = list(one_by_one(model, layers, RIGHT))
    before_LVH, after_LVH = (torch.cat([one[side] for one in looked], dim=1) for side in (1, 2))
    flat = after_LVH.flatten(1)
    cosines = torch.nn.functional.cosine_similarity(before_LVH, after_LVH, dim=2).mean(1)
    torch.testing.assert_close(ours["cosines"], cosines)
    torch.testing.assert_close(ours["variances"], flat.var(dim=1, correction=0))
    torch.testing.assert_close(ours["sparsities"], (flat.abs() < EPSILON).double().mean(1))
    assert ours["num_entries"] == flat.shape[1]
    for params in layers.params:
        for param in params:
            squares = torch.cat([inputs[param] for *_, inputs in looked]).square().sum(0)
            torch.testing.assert_close(ours[f"input_square_norms/{param}"], squares)
    prompts = torch.stack([after[:, : row.prompt_length].mean(1) for row, _, after, _ in looked], dim=1)
    right = torch.stack([after[:, row.prompt_length :].mean(1) for row, _, after, _ in looked], dim=1)
    torch.testing.assert_close(ours["prompts"], prompts.float())
    torch.testing.assert_close(ours["right"], right.float(), equal_nan=True)
    first = torch.stack([before[0, row.prompt_length :].mean(0) for row, before, *_ in looked])
    torch.testing.assert_close(ours["embedded/right"], first.float(), equal_nan=True)
    moments = torch.stack([moments_of(after[:, row.prompt_length :]) for row, _, after, _ in looked], dim=1)
    torch.testing.assert_close(ours["moments/right"], moments)
    others = list(one_by_one(model, layers, WRONG))
    wrong = torch.stack([after[:, row.prompt_length :].mean(1) for row, _, after, _ in others], dim=1)
    present = [index for index, row in enumerate(WRONG) if row is not None]
    torch.testing.assert_close(ours["wrong"][:, present], wrong.float(), equal_nan=True)
    assert bool(ours["wrong"][:, 3].isnan().all())
    moments = torch.stack([moments_of(after[:, row.prompt_length :]) for row, _, after, _ in others], dim=1)
    torch.testing.assert_close(ours["moments/wrong"][:, present], moments)
    assert not bool(ours["moments/wrong"][:, 3].any())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_batch_size_and_padding_change_nothing(family):
    model = tiny_model(family)
    alone = look(model, batch_size=1)
    for options in ({"batch_size": 2}, {"batch_size": 8}, {"batch_size": 8, "pad_id": 7}):
        batched = look(model, **options)
        assert batched.keys() == alone.keys()
        for name, value in batched.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


def test_nothing_is_left_behind():
    model = tiny_model("llama").train()
    look(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_output_that_is_not_finite_names_its_block():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"block model\.layers\.1 is not finite"):
        look(model)
