"""Loss curves equal their definition, with a copy of the weight at every position, and what must not change them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from layerif.allocate.curves import Curves
from layerif.data.rows import IGNORED
from layerif.layers import block_of
from layerif.models.blocks import layer_map
from layerif.models.loss import per_sample_loss
from layerif.probe.curves import measure as measurement
from layerif.probe.curves.measure import measure_loss_curves
from layerif.probe.curves.text import LossText, mean_loss
from layerif.probe.grams.processes import spread
from layerif.pruning import Pruner
from layerif.pruning.magnitude import Magnitude
from layerif.pruning.sparsegpt import SparseGPT
from layerif.pruning.wanda import Wanda
from tests.processes import SIZE, Pair
from tests.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.usefixtures("softmax_in_the_models_dtype")

# The first is longer than the tiny models' sliding windows. Powers of two are counted, 16, 2, 8 and 4: norms round
# gradients to float32, and a factor of two rounds nothing.
LENGTHS = (17, 4, 13, 6)
FROM = (0, 2, 5, 0)  # the first token of each sample that its loss counts
WEIGHTS = (0.4, 0.3, 0.2, 0.1)
LEVELS = (0.3, 0.65)


@dataclass(frozen=True)
class Sample:
    """Token ids, and which of them the loss counts."""

    ids: Tensor
    labels: Tensor

    @property
    def num_counted(self) -> int:
        return int((self.labels[1:] != IGNORED).sum())


def samples() -> list[Sample]:
    """Samples of different lengths, of which parts alone count; the last has a hole in what counts."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length, start in zip(LENGTHS, FROM, strict=True):
        ids = torch.randint(3, 256, (length,), generator=generator)
        found.append(Sample(ids, ids.where(torch.arange(length) >= start, IGNORED)))
    found[-1].labels[2] = IGNORED
    return found


def collated(rows: Sequence[Sample], side: str = "left") -> dict[str, Tensor]:
    width = max(len(row.ids) for row in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED)
    mask = torch.zeros_like(ids)
    for position, row in enumerate(rows):
        where = slice(width - len(row.ids), width) if side == "left" else slice(0, len(row.ids))
        ids[position, where], labels[position, where], mask[position, where] = row.ids, row.labels, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_text(size: int = 2, side: str = "left", order: Sequence[int] | None = None) -> LossText:
    rows, order = samples(), list(range(len(LENGTHS)) if order is None else order)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [(chunk, collated([rows[index] for index in chunk], side)) for chunk in chunks]
    names = [f"sample {index}" for index in range(len(rows))]
    return LossText(batches, torch.tensor(WEIGHTS, dtype=torch.float64), names)


def model_of(family: str = "llama", num_blocks: int = 2) -> Any:
    return tiny_model(family, num_hidden_layers=num_blocks).double()


def curves_of(model: nn.Module, masks: Pruner | None = None, text: LossText | None = None, **options) -> Curves:
    params = layer_map(model, scope="all").matrices
    return measure_loss_curves(model, params, masks or Wanda(), text or loss_text(), LEVELS, **options)


def assert_equal(ours: Curves, theirs: Curves, tolerance: float = 1e-9) -> None:
    assert (ours.units, ours.levels, ours.unit) == (theirs.units, theirs.levels, theirs.unit)
    assert torch.equal(ours.sizes, theirs.sizes)
    for field in ("costs", "by_half"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=tolerance, atol=0)


# The definition


def modules_of(model: nn.Module, params: Sequence[str]) -> dict[str, Any]:
    return {param: model.get_submodule(param.removesuffix(".weight")) for param in params}


@contextmanager
def a_copy_at_every_position(model: nn.Module, params: Sequence[str], length: int) -> Iterator[dict[str, Tensor]]:
    """Gives every linear layer a copy of its weight for each of `length` positions (T×O×I)."""
    copies: dict[str, Tensor] = {}
    modules = modules_of(model, params)

    def forward(param: str, values: Tensor) -> Tensor:
        output_TO = torch.einsum("toi,ti->to", copies[param], values.reshape(length, -1))
        bias = modules[param].bias
        return (output_TO if bias is None else output_TO + bias).view(*values.shape[:-1], -1)

    for param, module in modules.items():
        copies[param] = module.weight.detach().expand(length, -1, -1).clone().requires_grad_()
        module.forward = partial(forward, param)
    try:
        yield copies
    finally:
        for module in modules.values():
            del module.forward


def gradients_of_copies(model: nn.Module, params: Sequence[str]) -> dict[str, list[Tensor]]:
    """Gives, by matrix, for each sample the gradient of T_i·L_i in every position's copy of the weight (T×O×I)."""
    found: dict[str, list[Tensor]] = {param: [] for param in params}
    for row in samples():
        with a_copy_at_every_position(model, params, len(row.ids)) as copies:
            (row.num_counted * per_sample_loss(model, collated([row])).sum()).backward()
        for param, copy in copies.items():
            assert copy.grad is not None
            found[param].append(copy.grad)
    return found


def changes_by_calling(model: nn.Module, params: Sequence[str], masks: Pruner) -> dict[str, Tensor]:
    """Gives, by matrix, the change that the pruner itself makes at each level (K×O×I), from the samples' inputs."""
    inputs: dict[str, list[Tensor]] = {param: [] for param in params}
    modules = modules_of(model, params)
    handles = [modules[param].register_forward_pre_hook(_keep(kept)) for param, kept in inputs.items()]
    with torch.no_grad():
        for row in samples():
            model(input_ids=row.ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    found = {}
    for param, module in modules.items():
        shared = None
        if masks.needs_inputs:
            shared = masks.prepare(masks.observe(None, torch.cat(inputs[param])), len(LENGTHS), name=param)
        weight = module.weight.detach()
        found[param] = torch.stack([masks(weight, shared, level, None) - weight for level in LEVELS])
    return found


def _keep(kept: list[Tensor]):
    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        kept.append(given[0].flatten(0, -2))

    return hook


def dense(
    gradients: Mapping[str, list[Tensor]], changes: Mapping[str, Tensor], form: str, granularity: str, index: int
) -> dict[str, Tensor]:
    """Gives what sample number `index` adds to the cost of every unit (K), by the definition."""
    row, p = samples()[index], WEIGHTS[index]
    sums: dict[str, Tensor] = {}
    for param, gradient in gradients.items():
        unit = block_of(param) if granularity == "block" else param.removesuffix(".weight")
        if form == "exact":
            effects_KT = torch.einsum("toi,koi->kt", gradient[index], changes[param])
        else:
            squares = torch.einsum("toi,koi->kt", gradient[index].square(), changes[param].square())
            effects_KT = squares
        sums[unit] = sums[unit] + effects_KT if unit in sums else effects_KT
    powers = {unit: each.square() if form == "exact" else each for unit, each in sums.items()}
    return {unit: 0.5 * p / row.num_counted * each.sum(1) for unit, each in powers.items()}


def assert_is_the_definition(
    model: nn.Module, masks: Pruner, *, reference: nn.Module | None = None, tolerance: float = 1e-9
) -> None:
    """Compares with the definition, taken on the same model with linear layers alone where a reference is given."""
    params, linear = layer_map(model, scope="all").matrices, reference or model
    gradients, changes = gradients_of_copies(linear, params), changes_by_calling(linear, params, masks)
    for form in ("exact", "diagonal"):
        for granularity in ("matrix", "block"):
            found = curves_of(model, masks, form=form, granularity=granularity)
            terms = [dense(gradients, changes, form, granularity, index) for index in range(len(LENGTHS))]
            assert found.units == tuple(terms[0])
            assert (found.levels, found.unit) == ((0.0, *LEVELS), granularity)
            by_half = torch.stack([torch.stack([sum_of(unit, terms[half::2]) for unit in terms[0]]) for half in (0, 1)])
            assert found.by_half is not None
            assert not found.costs[:, 0].any()
            torch.testing.assert_close(found.by_half[:, :, 1:], by_half, rtol=tolerance, atol=0)
            torch.testing.assert_close(found.costs[:, 1:], by_half.sum(0), rtol=tolerance, atol=0)


def sum_of(unit: str, terms: Sequence[Mapping[str, Tensor]]) -> Tensor:
    return torch.stack([term[unit] for term in terms]).sum(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_are_their_definition_with_a_copy_of_the_weight_at_every_position(family):
    assert_is_the_definition(model_of(family), Wanda())


@pytest.mark.parametrize(
    "masks", [Magnitude(), SparseGPT(block_size=16), Wanda(compare="cumulative")], ids=["magnitude", "sparsegpt", "α"]
)
def test_the_change_that_is_priced_is_the_pruners_own(masks):
    assert_is_the_definition(model_of(), masks)


def test_levels_of_n_of_m_are_priced_by_their_masks_of_groups():
    model, masks = model_of(num_blocks=1), Wanda(m=4)
    params = layer_map(model, scope="all").matrices
    found = measure_loss_curves(model, params, masks, loss_text(), masks.levels(), is_stepped=True)
    assert found.levels == (0.0, 0.25, 0.5, 0.75)
    assert found.is_stepped
    for level, kept in ((0.25, 3), (0.5, 2), (0.75, 1)):
        single = Wanda(n=kept, m=4)
        alone = measure_loss_curves(model, params, single, loss_text(), single.levels(), is_stepped=True)
        torch.testing.assert_close(found.costs[:, found.levels.index(level)], alone.costs[:, 1], rtol=1e-12, atol=0)


def test_sizes_are_the_weights_that_a_level_removes():
    model = model_of(num_blocks=1)
    numel = [model.get_parameter(param).numel() for param in layer_map(model, scope="all").matrices]
    by_matrix, by_block = curves_of(model), curves_of(model, granularity="block")
    expected_UK = torch.tensor(numel, dtype=torch.float64)[:, None] * torch.tensor([0.0, *LEVELS], dtype=torch.float64)
    torch.testing.assert_close(by_matrix.sizes, expected_UK)
    torch.testing.assert_close(by_block.sizes, expected_UK.sum(0, keepdim=True))


@pytest.mark.parametrize("masks", [Wanda(), Magnitude()], ids=["wanda", "magnitude"])
def test_nested_masks_give_monotone_diagonal_curves(masks):
    model, levels = model_of(), [number / 20 for number in range(1, 20)]
    params = layer_map(model, scope="all").matrices
    found = measure_loss_curves(model, params, masks, loss_text(), levels, form="diagonal")
    assert bool((found.costs.diff(dim=1) > 0).all())


def test_the_loss_that_is_predicted_is_the_weighted_mean_of_the_samples():
    model = model_of(num_blocks=1)
    with torch.no_grad():
        losses = [float(per_sample_loss(model, collated([row]))) for row in samples()]
    expected = sum(p * each for p, each in zip(WEIGHTS, losses, strict=True))
    assert mean_loss(model, loss_text(size=3)) == pytest.approx(expected, rel=1e-9)


# What changes nothing

KINDS: dict[str, tuple[Pruner, dict[str, Any]]] = {
    "exact": (Wanda(), {}),
    "blocks": (Wanda(), {"granularity": "block"}),
    "diagonal": (Magnitude(), {"form": "diagonal"}),
    "some tokens": (SparseGPT(), {"tokens": 0.5, "seed": 7}),
}
every_kind = pytest.mark.parametrize(("masks", "options"), KINDS.values(), ids=KINDS)


@every_kind
def test_batch_size_padding_side_and_order_change_nothing(masks, options):
    model = model_of()
    reference = curves_of(model, masks, loss_text(size=1), **options)
    for text in (loss_text(size=4), loss_text(size=4, side="right"), loss_text(size=2, order=[2, 0, 3, 1])):
        assert_equal(curves_of(model, masks, text, **options), reference)


def least_memory(model: nn.Module, masks: Pruner, **options) -> float:
    """The gigabytes that the error asks for."""
    with pytest.raises(ValueError, match=r"1e-09 GB for the probe .* are too few: model\.") as caught:
        curves_of(model, masks, memory_gb=1e-9, **options)
    return float(re.search(r"at least ([\d.e-]+)", str(caught.value))[1])  # type: ignore[index]


@every_kind
def test_several_passes_and_files_equal_one_pass_in_memory(masks, options, caplog, tmp_path):
    model = model_of()
    reference = curves_of(model, masks, **options)
    with caplog.at_level(logging.INFO):
        several = curves_of(model, masks, memory_gb=least_memory(model, masks, **options), **options)
    assert 1 < int(re.search(r"(\d+) passes", caplog.text)[1]) <= 14  # type: ignore[index]
    assert_equal(several, reference)
    assert_equal(curves_of(model, masks, offload="disk", partial=tmp_path, **options), reference)


@every_kind
def test_an_interrupted_measurement_resumes_from_its_finished_passes(masks, options, tmp_path, monkeypatch):
    model = model_of()
    memory, name = least_memory(model, masks, **options), "diagonal_costs" if "form" in options else "effects"
    priced, run = [], getattr(measurement, name)

    def price(*args):
        if len(priced) == 8:
            raise KeyboardInterrupt
        priced.append(args)
        return run(*args)

    monkeypatch.setattr(measurement, name, price)
    with pytest.raises(KeyboardInterrupt):
        curves_of(model, masks, memory_gb=memory, partial=tmp_path, **options)
    assert list(tmp_path.glob("curves-*"))
    monkeypatch.setattr(measurement, name, lambda *args: [priced.append(args), run(*args)][1])
    resumed = curves_of(model, masks, memory_gb=1, partial=tmp_path, **options)  # all that is left in one pass
    assert 14 <= len(priced) < 8 + 14
    assert_equal(resumed, curves_of(model, masks, **options))


@pytest.mark.parametrize("masks", [Wanda(), SparseGPT(), Magnitude()], ids=["wanda", "sparsegpt", "magnitude"])
def test_mask_windows_equal_to_the_loss_windows_are_the_samples_themselves(masks):
    model = model_of()
    windows = list(torch.randint(3, 256, (3, 12), generator=torch.Generator().manual_seed(1)).split([2, 1]))
    batches = [([0, 1], _window(windows[0])), ([2], _window(windows[1]))]
    text = LossText(batches, torch.full((3,), 1 / 3, dtype=torch.float64), ["a", "b", "c"])
    given = curves_of(model, masks, text, mask_windows=windows)
    assert_equal(given, curves_of(model, masks, text))
    other = curves_of(model, masks, text, mask_windows=[windows[0]])
    assert torch.equal(other.costs, given.costs) == (not masks.needs_inputs)


@pytest.mark.parametrize("masks", [SparseGPT(), Wanda(swaps=True)], ids=["sparsegpt", "swaps"])
def test_gram_matrices_of_inputs_count_as_memory_of_their_pass(masks):
    model, windows = model_of(), [torch.arange(3, 75).view(1, 72)]
    known = [least_memory(model, pruner) for pruner in (Wanda(), masks)]
    apart = least_memory(model, masks, mask_windows=windows)
    widest = max(linear.in_features for linear in model.model.layers.modules() if isinstance(linear, nn.Linear))
    assert known[0] + 2e-9 * 8 * widest**2 < known[1] < apart
    few = curves_of(model, masks, memory_gb=apart, mask_windows=windows)
    assert_equal(few, curves_of(model, masks, mask_windows=windows))


def _window(ids_BT: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT.clone()}


def test_the_model_is_left_as_it_was():
    model = model_of(num_blocks=1).train()
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    curves_of(model, SparseGPT(), mask_windows=[samples()[0].ids[None]])
    assert model.training
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.embed_tokens.weight"
    ]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_seed_is_deterministic_and_another_looks_at_other_positions():
    model = model_of(num_blocks=1)
    first = curves_of(model, tokens=0.4, seed=1)
    assert torch.equal(curves_of(model, tokens=0.4, seed=1).costs, first.costs)
    other = curves_of(model, tokens=0.4, seed=2).costs
    assert bool((other[:, 1:] != first.costs[:, 1:]).all())
    assert torch.equal(curves_of(model, tokens=1.0, seed=1).costs, curves_of(model, tokens=1.0, seed=2).costs)


def test_the_mean_over_seeds_is_the_cost_at_all_positions():
    model, param = model_of(num_blocks=1), "model.layers.0.mlp.down_proj.weight"

    def cost(**options) -> Tensor:
        return measure_loss_curves(model, [param], Magnitude(), loss_text(), LEVELS, **options).costs[0, 1:]

    draws_NK = torch.stack([cost(tokens=0.45, seed=seed) for seed in range(40)])
    standard_error_K = draws_NK.std(0) / len(draws_NK) ** 0.5
    assert bool((standard_error_K < 0.2 * cost()).all())  # so that the next line could fail
    assert bool(((draws_NK.mean(0) - cost()).abs() < 3 * standard_error_K).all())


# Bad input


def test_a_loss_that_is_not_finite_names_the_sample():
    model = model_of(num_blocks=1)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[int(samples()[2].ids[0])] = float("inf")
    with pytest.raises(ValueError, match=r"loss of sample 2 is not finite, from block model\.layers\.0 on"):
        curves_of(model, Magnitude())


def test_a_cost_that_is_not_finite_names_the_matrix():
    model = model_of(num_blocks=2)

    def spoil(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda delta: delta * float("inf"))

    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"cost of model\.layers\.\d\.\S+ is not finite; .*model\.dtype=float32"):
        curves_of(model, Magnitude())


def test_a_matrix_that_no_calibration_token_reaches_is_named():
    model = model_of(num_blocks=2)
    model.config.num_hidden_layers = 1  # the second block is never called
    with pytest.raises(
        ValueError,
        match=r"no calibration token reaches model\.layers\.1\.self_attn\.q_proj.* name them: pruner\.skip=\[",
    ):
        curves_of(model, mask_windows=[samples()[0].ids[None]])


# Two processes


def save_measured(rank: int, folder: Path, spread_out: bool = False, **options) -> None:
    torch.save(measured(spread_out, **options), folder / f"{rank}.pt")


def measured(spread_out: bool = False, masks: Pruner | None = None, **options) -> Curves:
    model = model_of()
    if spread_out:
        model = spread(model.float(), "cpu")
    # The other processes know no fixture.
    with patch.object(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: torch.softmax(scores, dim)):
        return curves_of(model, masks, loss_text(size=1 if spread_out else 3), **options)


@pytest.fixture(scope="module")
def pair():
    found = Pair()
    yield found
    found.close()


WINDOW = torch.arange(3, 19)[None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "block", "offload": "disk"},
        {"form": "diagonal", "tokens": 0.5, "masks": SparseGPT(), "mask_windows": [WINDOW, WINDOW + 100]},
    ],
    ids=["exact", "blocks by files", "diagonal"],
)
def test_two_processes_equal_one(pair, options, tmp_path):
    alone = measured(**options, partial=tmp_path / "alone")
    assert pair.run(save_measured, tmp_path, tmp_path, **options, partial=tmp_path / "partial") == ["", ""]
    for rank in range(SIZE):
        assert_equal(torch.load(tmp_path / f"{rank}.pt", weights_only=False), alone)


def test_a_spread_model_gives_the_same_curves(pair, tmp_path):
    options = {"masks": Wanda(), "mask_windows": [WINDOW, WINDOW + 100]}
    assert pair.run(save_measured, tmp_path, tmp_path, spread_out=True, **options) == ["", ""]
    assert_equal(torch.load(tmp_path / "0.pt", weights_only=False), measured(**options), 1e-4)
