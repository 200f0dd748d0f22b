"""Adapters in mixtures of experts: counted as they are, left alone with a word, and refused where PEFT cannot."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel

from layerif.adapt.adapters import LoraAdapter, LoraMoeAdapter
from layerif.adapt.sizes import adapted_shapes, num_parameters
from layerif.allocate.allocation import Allocation
from layerif.models.blocks import blocks, note_left_out
from layerif.moe.lora import lora_targets
from tests.families import model_of


def ranks(model, values=(3, 5), kind: Any = "rank") -> Allocation:
    return Allocation(tuple(blocks(model)), kind, values, sum(values))


def num_trained(model) -> int:
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next"])
def test_every_expert_gets_the_rank_of_its_block_and_plain_peft_loads_it(tmp_path, family):
    base, kind = model_of(family), LoraAdapter(experts=True, lora_dropout=0)
    kind.check_fits(model_of(family).to("meta"), ranks(base))
    shapes = adapted_shapes(base, kind.targets(base))
    expected = num_parameters(shapes, kind.capacities(base, ranks(base)))
    assert sum(".experts." in f".{name}" for layers in shapes.values() for name in layers) == 2 * 4 * 2
    model = kind.put_on(base, ranks(base))
    assert num_trained(model) == expected
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.copy_(0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(len(name))))
        ids = torch.arange(3, 33).view(2, 15)
        adapted = model.eval()(input_ids=ids).logits
        kind.write(model, None, tmp_path)
        again = PeftModel.from_pretrained(model_of(family), tmp_path).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, adapted)
        assert not torch.allclose(model_of(family)(input_ids=ids).logits, adapted, atol=1e-3)


def test_adapters_that_leave_experts_alone_say_so():
    base = model_of("mixtral")
    with pytest.warns(RuntimeWarning, match=r"lora adapts linear layers and leaves the fused .* method\.experts=true"):
        LoraAdapter().put_on(base, ranks(base))
    base = model_of("mixtral")
    with pytest.warns(RuntimeWarning, match="LoRA-MoE adapts linear layers and leaves the fused experts"):
        LoraMoeAdapter().put_on(base, ranks(base, kind="experts"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        LoraAdapter().put_on(base := model_of("gpt2"), ranks(base))


def test_what_peft_cannot_do_with_experts_is_refused():
    def refused(family: str, allocation: Allocation | None = None, **settings) -> str:
        model = model_of(family).to("meta")
        with pytest.raises(ValueError, match=r"method\.experts=true") as raised:
            LoraAdapter(experts=True, **settings).check_fits(model, allocation or ranks(model))
        return str(raised.value)

    assert "this model has none" in refused("gpt2", lora_dropout=0)
    assert "needs method.lora_dropout=0" in refused("mixtral")
    assert "this allocation is by matrix" in refused(
        "mixtral", Allocation(("model.layers.0.self_attn.q_proj",), "rank", (2,), 2), lora_dropout=0
    )


def test_dense_layers_that_peft_takes_for_experts_get_no_lora():
    targets = lora_targets(model_of("deepseek_v3"))
    assert not [name for name in targets if name.endswith(("gate_proj", "up_proj", "down_proj"))]
    assert any(name.endswith("o_proj") for name in targets)
    assert any(name.endswith("down_proj") for name in lora_targets(model_of("gemma3")))


def test_what_is_left_out_is_named_once_with_its_weights():
    assert note_left_out(model_of("gpt2")) is None
    note = note_left_out(model_of("jamba")) or ""
    for name in ("mamba.A_log", "mamba.conv1d.weight", "mamba.dt_proj.weight", "feed_forward.router.weight"):
        assert note.count(name) == 1
    assert "mamba" in (note_left_out(model_of("jamba"), "attention") or "")
    assert "mamba" not in (note_left_out(model_of("jamba"), "mlp") or "")
