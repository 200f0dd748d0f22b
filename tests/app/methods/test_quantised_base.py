"""Runs on a quantised base: adapters are trained, scored and compared, and other methods are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from peft import PeftModel

from layerif.models.pretrained import LocalModel
from tests.command import run_layerif

pytest.importorskip("bitsandbytes", reason="the extra `quantised` brings bitsandbytes")

FEW = ("probe.num_train=8", "probe.num_validation=4", "probe.fidelity_samples=6", "logger=none")
TWO_EPOCHS = ("trainer.max_steps=-1", "trainer.max_epochs=2", "method.gradient_checkpointing=true")


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("nf4", ("method=lora", "allocator.budget=9")),
        ("int8", ("method=lora_moe", "allocator.budget=6", "method.balance_coefficient=0.01")),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_an_adapter_trains_on_a_quantised_base_and_comes_back_on_it(
    tmp_path, tiny_overrides, model_folder, scheme, method
):
    """Validations, which run without gradients, come between the epochs, and take none from the second."""
    record = run_layerif([*tiny_overrides, *FEW, *TWO_EPOCHS, f"model.quantised={scheme}", *method], tmp_path)
    decision: Any = record.decision
    assert -1 <= decision.fidelity["scores"] <= 1
    assert 0 < decision.fidelity["influences"] < 1
    assert record.inputs["quantised"] == scheme
    dense: Any = LocalModel(path=str(model_folder)).load()
    before = sum(each.numel() for each in dense.parameters())
    assert record.parameters["total"] == before + record.parameters["trainable"]
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "base.json").read_text()) == {"quantised": scheme}
    model: Any = LocalModel(path=str(model_folder), quantised=scheme, adapter=str(adapter)).load()
    assert isinstance(model, PeftModel)
    moved = [bool(value.any()) for name, value in model.named_parameters() if "_B." in name]
    assert all(moved)
    assert len(moved) == 3 * 7


@pytest.mark.usefixtures("undrawn")
def test_an_adapter_of_a_quantised_base_is_handed_over_alone(tmp_path, tiny_overrides):
    from layerif.app.export import export

    run_layerif([*tiny_overrides, *FEW, "model.quantised=nf4", "method=lora", "allocator.budget=9"], tmp_path)
    with pytest.raises(
        ValueError, match=r"trained on a quantised base \(nf4\), which merging would round anew; use --to"
    ):
        export(tmp_path / "run", "merged", tmp_path / "merged")
    export(tmp_path / "run", "peft", tmp_path / "peft")
    assert "trained on the base quantised to nf4" in (tmp_path / "peft" / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("method=prune", "allocator.smoothing=false"), "pruning works on weights as they were before"),
        (("method=drop", "allocator.keep=2"), "dropping blocks works on weights as they were before"),
        (("method=quantise", "estimator=datainf", "allocator=bits"), "quantising works on weights as they were before"),
        (("method=full", "allocator.keep=1"), "method=full trains the weights themselves"),
        (("method=lora", "method.init=lora_ga"), r"method\.init=lora_ga moves the weights of the base"),
        (("method=lora_moe", "method.keep_zeros=true"), r"method\.keep_zeros=true keeps zeros of the weights"),
        (("method=none", "estimator=measured_loss"), "estimator=measured_loss changes weights"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, tuple) else None,
)
def test_what_cannot_work_on_a_quantised_base_is_refused_before_anything_is_measured(setup_of, given, said):
    with pytest.raises(ValueError, match=said):
        checked(setup_of, "model.quantised=nf4", *given)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("method", [("none",), ("rows", "selection=loss", "selection.budget=4"), ("lora",), ("prune",)])
def test_a_quantised_model_is_not_divided_whatever_the_method(setup_of, scheme, method):
    with pytest.raises(
        ValueError, match=rf"divides weights among devices, and the model is quantised \({scheme}\); use"
    ):
        setup_of(f"model.quantised={scheme}", "trainer.strategy=fsdp", f"method={method[0]}", *method[1:])


def checked(setup_of, *overrides: str) -> None:
    setup = setup_of(*overrides)
    setup.method.check(setup)
