"""AdaLoRA: it ends with the parameters of the budget, resumes to the bit, and plain PEFT loads what it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from layerif.adapt.adalora import AdaLoraAdapter, orthogonality
from layerif.adapt.module import AdapterModule
from layerif.allocate.allocation import Allocation
from layerif.models.loss import per_sample_loss
from layerif.models.pretrained import LocalModel
from tests.adapt.test_module import StopAt, adapter, lora, trainer
from tests.adapt.test_module import data as data
from tests.adapt.test_module import model_config as model_config
from tests.adapt.test_module import splits as splits

RANKS = {"model.layers.0": 4, "model.layers.1": 4, "model.layers.2": 4}
LIMIT: dict[str, Any] = {"max_epochs": -1, "max_steps": 12}


def adalora(model_config, ranks=RANKS, **settings: Any) -> AdapterModule:
    given = Allocation(tuple(ranks), "rank", tuple(ranks.values()), sum(ranks.values()))
    return AdapterModule(AdaLoraAdapter(**settings), model_config, given)


@pytest.mark.parametrize("killed_at", [3, 6, 11])  # while ranks are taken away, and after they are settled
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, model_config, data, killed_at):
    whole = adalora(model_config)
    trainer(tmp_path / "whole", **LIMIT).fit(whole, data(seed=1))
    with pytest.raises(SystemExit):
        trainer(tmp_path / "killed", StopAt(killed_at), **LIMIT).fit(adalora(model_config), data(seed=1))
    resumed = adalora(model_config)
    file = str(tmp_path / "killed" / "last.ckpt")
    trainer(tmp_path / "resumed", **LIMIT).fit(resumed, data(seed=1), ckpt_path=file)
    for name, value in adapter(whole).items():
        assert torch.equal(adapter(resumed)[name], value), name
    assert resumed.tuning.finished(resumed.model) == whole.tuning.finished(whole.model)  # type: ignore[arg-type]


def test_it_ends_with_the_parameters_of_the_budget_and_plain_peft_loads_it(tmp_path, model_config, data):
    module, rows = adalora(model_config, lora_dropout=0.0, learning_rate=1e-2), data(seed=1)
    batch = rows.collate(rows.first_rows(5))
    trainer(tmp_path, **LIMIT).fit(module, rows)
    model: Any = module.model
    before = per_sample_loss(model, batch)
    at_first = sum(value.numel() for value in adapter(module).values())
    ranks = module.tuning.finished(model)
    torch.testing.assert_close(per_sample_loss(model, batch), before, atol=1e-5, rtol=1e-5)
    plain = lora(model_config, allocation=RANKS)
    plain.configure_model()
    wanted = sum(value.numel() for value in adapter(plain).values())
    size = sum(value.numel() for value in adapter(module).values())
    assert at_first > 1.4 * wanted
    assert size == pytest.approx(wanted, rel=0.02)
    assert len(ranks) == 21
    assert len(set(ranks.values())) > 1
    module.tuning.write(model, rows.tokenizer, tmp_path / "adapter")
    loaded: Any = PeftModel.from_pretrained(LocalModel(path=model_config["path"]).load(), str(tmp_path / "adapter"))
    torch.testing.assert_close(per_sample_loss(loaded, batch), before, atol=1e-4, rtol=1e-4)


def test_the_penalty_is_the_one_that_peft_adds_to_its_own_loss(model_config, data):
    module, rows = adalora(model_config), data(seed=1)
    module.configure_model()
    model: Any = module.model
    batch = rows.collate(rows.first_rows(3))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    model.eval()
    alone = model.base_model.model(**inputs, labels=batch["labels"]).loss
    with_penalty = model(**inputs, labels=batch["labels"]).loss
    (weight, value) = module.tuning.penalties(model)["orthogonality"]
    torch.testing.assert_close(weight * value, with_penalty - alone, atol=1e-4, rtol=1e-4)
    assert adalora(model_config, orthogonality=0.0).tuning.penalties(model) == {}
    assert orthogonality(model) > 0


def test_bad_settings_are_refused_with_what_to_do(tmp_path, model_config, data):
    with pytest.raises(ValueError, match=r"needs at least 3 steps to choose ranks, and the trainer's settings give 2"):
        trainer(tmp_path, max_epochs=-1, max_steps=2).fit(adalora(model_config), data(seed=1))
    with pytest.raises(ValueError, match=r"finds ranks by itself, and this allocation gives 1 to 4; use estim"):
        adalora(model_config, {**RANKS, "model.layers.1": 1}).configure_model()
    with pytest.raises(SystemExit):
        trainer(tmp_path, StopAt(2), **LIMIT).fit(unsettled := adalora(model_config), data(seed=1))
    with pytest.raises(ValueError, match=r"ended before AdaLoRA had settled its ranks; give it the time for all its"):
        unsettled.tuning.finished(unsettled.model)  # type: ignore[arg-type]
