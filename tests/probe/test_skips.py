"""The effect of leaving out a unit equals its definition, one sample at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from layerif.allocate.blocks import Blocks
from layerif.data.rows import IGNORED
from layerif.estimators.skip_curve import SkipCurve
from layerif.evidence import LayerSkips
from layerif.layers import within_block
from layerif.models.blocks import blocks, layer_map
from layerif.models.loss import per_sample_loss
from layerif.probe.curves.text import LossText, windows_text
from layerif.probe.skips import measure_skips
from layerif.pruning.calibration import Calibration
from layerif.pruning.trials import mean_token_loss
from tests.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.usefixtures("softmax_in_the_models_dtype")

LENGTHS = (17, 4, 13, 6)
WITH_PARTS = ("llama", "gemma", "gemma2", "qwen3", "phi3", "gpt_neox", "gemma3_text")


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 256, (length,), generator=generator) for length in LENGTHS]


def loss_text(size: int, side: str = "left") -> LossText:
    rows, batches = samples(), []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        width = max(map(len, chunk))
        ids, mask = torch.zeros(len(chunk), width, dtype=torch.long), torch.zeros(len(chunk), width, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, each in enumerate(chunk):
            where = slice(width - len(each), width) if side == "left" else slice(0, len(each))
            ids[row, where], mask[row, where], labels[row, where] = each, 1, each
        indices = list(range(start, start + len(chunk)))
        batches.append((indices, {"input_ids": ids, "attention_mask": mask, "labels": labels}))
    weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    return LossText(batches, weights, [f"sample {index}" for index in range(len(rows))])


def model_of(family: str) -> Any:
    return tiny_model(family, **({"num_hidden_layers": 2} if family != "gemma3_text" else {})).double()


def units_of(model: Any, parts: Sequence[str] = ()) -> list[str]:
    return [f"{block}.{part}" for block in blocks(model) for part in parts] if parts else list(blocks(model))


def parts_of(family: str) -> tuple[str, str]:
    return ("attention", "mlp") if family == "gpt_neox" else ("self_attn", "mlp")


def by_gates(model: Any, units: Sequence[str], ids_T: Tensor) -> Tensor:
    """z at every token (T×U) by autograd: the loss falls by it as a gate on what a unit adds goes from 1 to 0.

    The gate stands where the unit's output joins the hidden state, behind a norm of Gemma 2 and 3.
    """
    gates_UT1 = torch.ones(len(units), len(ids_T), 1, dtype=torch.float64, requires_grad=True)
    handles, is_gemma = [], model.config.model_type in ("gemma2", "gemma3_text")
    for number, unit in enumerate(units):
        where, gate = unit, gates_UT1[number]
        if is_gemma and within_block(unit):
            norm = {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[within_block(unit)]
            where = f"{unit.rpartition('.')[0]}.{norm}"

        def look(module, args, kwargs, output, unit=unit, gate=gate):
            first = output[0] if isinstance(output, tuple) else output
            if within_block(unit):
                first = first * gate
            else:
                before = args[0] if args else kwargs["hidden_states"]
                first = before + gate * (first - before)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        handles.append(model.get_submodule(where).register_forward_hook(look, with_kwargs=True))
    ids = ids_T[None]
    loss = per_sample_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    (slope_UT1,) = torch.autograd.grad(loss.sum(), gates_UT1)
    for handle in handles:
        handle.remove()
    return -slope_UT1[:, :, 0].T


def expected(model: Any, units: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {"first": [], "second": []}
    for ids_T in samples():
        z_TU = by_gates(model, units, ids_T)
        found["first"].append(z_TU.sum(0))
        found["second"].append(0.5 * (len(ids_T) - 1) * z_TU.square().sum(0))
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_blocks_equal_the_slope_of_a_gate_on_what_they_add(family):
    model = model_of(family)
    assert_same(measure_skips(model, units_of(model), loss_text(1)), expected(model, units_of(model)))


@pytest.mark.parametrize("family", WITH_PARTS)
def test_attention_and_mlp_equal_the_slope_of_a_gate_on_what_they_add(family):
    model = model_of(family)
    units = units_of(model, parts_of(family))
    assert_same(measure_skips(model, units, loss_text(1)), expected(model, units))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        torch.testing.assert_close(
            found, theirs[name], rtol=tolerance, atol=tolerance * float(theirs[name].abs().max())
        )


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_batch_size_nor_padding_changes_anything(family, side):
    model = model_of(family)
    alone = measure_skips(model, units_of(model), loss_text(1))
    assert_same(measure_skips(model, units_of(model), loss_text(3, side)), alone)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_first_order_is_the_slope_of_the_loss_and_estimators_weigh_the_windows():
    model = model_of("llama")
    units = units_of(model)
    windows = [
        torch.stack([torch.randint(3, 256, (12,), generator=torch.Generator().manual_seed(n)) for n in range(4)])
    ]
    found = measure_skips(model, units, windows_text(windows))
    halves = {name: torch.stack([each[::2].sum(0), each[1::2].sum(0)]) / 4 for name, each in found.items()}
    evidence = LayerSkips(tuple(units), (10, 10), "block", halves["first"], halves["second"], {}, "f")
    for order, total in (("first", found["first"]), ("second", found["second"]), ("both", sum(found.values()))):
        curves = SkipCurve(order=order).curves(evidence)  # type: ignore[arg-type]
        assert (curves.kind, curves.unit, curves.levels) == ("blocks", "block", (0.0, 1.0))
        torch.testing.assert_close(curves.costs[:, 0], total.mean(0))  # type: ignore[union-attr]
        assert not curves.costs[:, 1].any()
        kept = Blocks(keep=1)(curves)
        dearest = int(curves.costs[:, 0].argmax())
        assert kept.values == tuple(int(number == dearest) for number in range(2))
        assert curves.at({units[0]: 0, units[1]: 1}) == pytest.approx(float(curves.costs[0, 0]))
    step = 1e-4
    linear = model.get_submodule("model.layers.0")

    def shrunk(module, args, output):
        return args[0] + (1 - step) * (output - args[0])

    dense = mean_token_loss(model, windows)
    handle = linear.register_forward_hook(shrunk)
    slope = (mean_token_loss(model, windows) - dense) / step
    handle.remove()
    assert slope == pytest.approx(float(found["first"].mean(0)[0]), rel=1e-2)


def test_the_store_keeps_both_orders_and_a_decision_reads_windows_alone(decider, tmp_path):
    from dataclasses import replace

    text = tmp_path / "text.txt"
    text.write_text("the cat runs over the red hill " * 40)
    windows = Calibration(text=str(text), num_windows=4, window=16, batch_size=3)
    made = [
        replace(decider, estimator=SkipCurve(calibration=windows, order=order), allocator=Blocks(keep=1))()  # type: ignore[arg-type]
        for order in ("second", "first")
    ]
    assert [each.reused for each in made] == [False, True]
    assert made[0].num_samples == (0, 0)
    assert made[0].source == f"skip_curve(order=second, unit=block, calibration={text}, seed=0)"
    assert made[0].curves.source.keys() == {"model", "loss_text"}
    assert made[0].record().curves["predicted"] == pytest.approx(
        sum(
            cost
            for cost, kept in zip(made[0].curves.costs[:, 0].tolist(), made[0].allocation.values, strict=True)
            if not kept
        )
    )
    parts = replace(
        decider, estimator=SkipCurve(calibration=windows, unit="sublayer"), allocator=Blocks(keep=0.5, unit="sublayer")
    )()
    assert (len(parts.allocation.units), parts.allocation.budget) == (6, 3)


def test_an_effect_that_is_not_finite_is_named():
    model = model_of("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"leaving out model\.layers\.\d is not finite on sample 0; .*float32"):
        measure_skips(model, units_of(model), loss_text(1))


def test_the_layers_of_a_model_say_its_parts():
    model = model_of("llama")
    from layerif.layers import sublayers

    found = sublayers(layer_map(model, scope="all"))
    assert list(found) == units_of(model, ("self_attn", "mlp"))
    assert sum(found.values()) == sum(layer_map(model, scope="all").numel)
