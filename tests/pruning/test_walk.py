"""The walk equals pruning with whole forwards of the model, for every family; killed and resumed it changes no bit."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from layerif import PACKAGE
from layerif.models.blocks import blocks, linears
from layerif.pruning import Pruner
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.sparsegpt import SparseGPT
from layerif.pruning.targets import matrices, targets
from layerif.pruning.walk import Walk, capture_inputs
from tests.damage import flip
from tests.tiny import FAMILIES, VOCAB_SIZE, tiny_model

FAMILY_NAMES = [*FAMILIES, "gemma3_text"]


def windows(length: int = 40) -> list[torch.Tensor]:
    """Two batches of unequal size, longer than the sliding windows of the tiny models."""
    return list(torch.randint(VOCAB_SIZE, (3, length), generator=torch.Generator().manual_seed(0)).split([2, 1]))


def walked(model: nn.Module, pruner: Pruner, folder: Path, num_blocks: int | None = None, **options) -> nn.Module:
    sparsities = {name: 0.4 + 0.1 * number for number, name in enumerate(list(blocks(model))[:3])}
    allocation = dict.fromkeys(blocks(model), 0.5) | sparsities
    found = Walk(model, pruner, targets(model, allocation, pruner), windows(), folder, **options)
    for index in range(len(found.blocks) if num_blocks is None else num_blocks):
        found(index)
    return model


def reference(model: nn.Module, pruner: Pruner) -> nn.Module:
    """Per block one forward of the whole model, every matrix with inputs of its own."""
    sparsities = {name: 0.4 + 0.1 * number for number, name in enumerate(list(blocks(model))[:3])}
    wanted = targets(model, dict.fromkeys(blocks(model), 0.5) | sparsities, pruner)
    for block_name, block in blocks(model).items():
        seen: dict[str, list[torch.Tensor]] = defaultdict(list)
        handles = [module.register_forward_pre_hook(_keep(seen[name])) for name, module in linears(block)]
        with torch.no_grad():
            for batch in windows():
                model(input_ids=batch, use_cache=False)
            for handle in handles:
                handle.remove()
            for name, module in linears(block):
                target = wanted[block_name][name]
                statistic = pruner.observe(None, torch.cat(seen[name]))
                shared = pruner.prepare(statistic, 3, name=name)
                module.weight.copy_(pruner(module.weight, shared, target.sparsity, target.n))
    return model


def _keep(kept: list[torch.Tensor]):
    def hook(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        kept.append(given[0].flatten(0, -2))

    return hook


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("pruner", [SparseGPT(block_size=16), SparseGPT(m=4)], ids=["any", "n:4"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_is_pruned_as_by_whole_forwards(tmp_path, family, pruner):
    expected = weights(reference(tiny_model(family).double(), pruner))
    found = weights(walked(tiny_model(family).double(), pruner, tmp_path))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
        assert torch.equal(found[name] == 0, value == 0), name


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_pruned_model_reloads_to_the_same_logits(tmp_path, family):
    from transformers import AutoModelForCausalLM

    model = walked(tiny_model(family), SparseGPT(), tmp_path / "blocks")
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    with torch.no_grad():
        logits = [of(input_ids=windows()[0]).logits for of in (model, reloaded.eval())]
    assert torch.equal(*logits)
    assert {name for name, module in matrices(reloaded).items() if (module.weight == 0).any()} == set(matrices(model))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, family, killed_after):
    whole = weights(walked(tiny_model(family), SparseGPT(), tmp_path / "whole"))
    walked(tiny_model(family), SparseGPT(), tmp_path / "killed", num_blocks=killed_after)
    resumed = tiny_model(family)
    seen: list[str] = []

    class Counting(SparseGPT):
        def prepare(self, statistic, num_windows, *, name):
            seen.append(name)
            return super().prepare(statistic, num_windows, name=name)

    found = weights(walked(resumed, Counting(), tmp_path / "killed"))
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert {name.split(".")[2] for name in seen} == {str(index) for index in range(killed_after, 3)}


@pytest.mark.parametrize("position", [-1, 0, 20])
def test_from_a_damaged_block_on_it_is_pruned_again_to_the_same_bits(tmp_path, position):
    expected = weights(walked(tiny_model(), SparseGPT(), tmp_path / "whole"))
    walked(tiny_model(), SparseGPT(), tmp_path / "killed")
    damaged = tmp_path / "killed" / "block-001.safetensors"
    flip(damaged, position)
    with pytest.warns(UserWarning, match=f"{damaged} is damaged and its block is pruned again") as said:
        found = weights(walked(tiny_model(), SparseGPT(), tmp_path / "killed"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert Path(said[0].filename).is_relative_to(PACKAGE)  # which makes it a note of the record
    assert damaged.read_bytes()[:8] == (tmp_path / "whole" / damaged.name).read_bytes()[:8]


@pytest.mark.parametrize("offload", ["device", "disk"])
def test_where_activations_wait_changes_nothing(tmp_path, offload):
    expected = weights(walked(tiny_model(), SparseGPT(), tmp_path / "cpu"))
    found = weights(walked(tiny_model(), SparseGPT(), tmp_path / "other", offload=offload))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert bool(list((tmp_path / "other").glob("hidden-*"))) == (offload == "disk")


def test_the_capture_keeps_equal_arguments_once_and_leaves_the_model_alone():
    model = tiny_model("gemma2")
    hidden, calls = capture_inputs(model, [windows()[0], windows()[0]])
    tensors = [tensor for made in calls.values() for call in made for tensor in _tensors(call)]
    different = {id(tensor) for tensor in tensors}
    assert len(different) < len(tensors) / 4
    masks = [next(t for t in _tensors(made[0]) if t.ndim == 4) for made in calls.values()]
    assert not torch.equal(masks[0], masks[1])  # a sliding and a full layer
    assert len(hidden) == 2
    assert not any("forward" in vars(block) for block in blocks(model).values())
    assert model(input_ids=windows()[0]).logits.isfinite().all()


def test_magnitude_needs_no_text(tmp_path):
    model = tiny_model()
    allocation = dict.fromkeys(blocks(model), 0.5)
    found = Walk(model, Magnitude(), targets(model, allocation, Magnitude()), [], tmp_path)
    for index in range(3):
        found(index)
    assert all(int((module.weight == 0).sum()) * 2 == module.weight.numel() for module in matrices(model).values())


def test_activations_that_are_not_finite_name_their_block(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"the outputs of model\.layers\.1 are not finite on the calibration text"):
        walked(model, SparseGPT(), tmp_path)
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the embeddings are not finite"):
        walked(model, SparseGPT(), tmp_path / "other")


def test_a_failing_cholesky_names_the_matrix(tmp_path):
    model = tiny_model()
    with torch.no_grad():  # every position of every window is alike: H has rank one
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].expand(VOCAB_SIZE, -1))
    with pytest.raises(
        ValueError, match=r"Hessian of model\.layers\.0\.self_attn\.q_proj .* try pruner\.damping=0\.001"
    ):
        walked(model, SparseGPT(damping=0.0), tmp_path)
    assert not list(tmp_path.glob("block-*"))


def test_blocks_that_cannot_be_captured_are_refused_by_name(tmp_path):
    model = tiny_model()
    layers = model.model.layers

    class Scaled(type(layers[1])):
        def __call__(self, hidden_states, *args, **kwargs):
            return super().__call__(2 * hidden_states, *args, **kwargs)

    layers[1].__class__ = Scaled
    with pytest.raises(ValueError, match=r"inputs of block model\.layers\.1 cannot be captured: it does not take"):
        walked(model, SparseGPT(), tmp_path)
    skipping = tiny_model()
    skipping.config.num_hidden_layers = 2  # the third block is never called
    with pytest.raises(
        ValueError, match=r"inputs of block model\.layers\.2 cannot be captured: it ran 0 times.*; use pruner=magnitude"
    ):
        walked(skipping, SparseGPT(), tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_says_what_to_do_and_leaves_no_half_file(tmp_path, monkeypatch, error):
    def full(tensors, file, header):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"No space left.* method\.offload=cpu.* carries on"):
        walked(tiny_model(), SparseGPT(), tmp_path, offload="disk")
    assert list(tmp_path.iterdir()) == []


def _tensors(tree) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
