"""First weights of EVA and LoRA-GA: the model starts unchanged, sizes stay, and a resumed run has the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from layerif.adapt.adapters import LoraAdapter
from layerif.adapt.initial import lora_layers, ranks_of
from layerif.adapt.module import AdapterModule
from layerif.adapt.sizes import adapted_shapes
from layerif.models.loss import per_sample_loss
from layerif.models.pretrained import LocalModel
from tests.adapt.test_module import ALLOCATION, StopAt, adapter, counts, lora, trainer
from tests.adapt.test_module import data as data
from tests.adapt.test_module import model_config as model_config
from tests.adapt.test_module import splits as splits

LIMIT: dict[str, Any] = {"max_epochs": -1, "max_steps": 8}
EVEN = dict.fromkeys(ALLOCATION, 4)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_run_starts_unchanged_ends_as_large_resumes_and_is_written_for_the_untouched_base(
    tmp_path, model_config, data, init
):
    settings: dict[str, Any] = {"allocation": EVEN, "init": init, "lora_dropout": 0.0, "learning_rate": 1e-2}
    rows = data(seed=1)
    batch = rows.collate(rows.first_rows(5))
    base: Any = LocalModel(path=model_config["path"]).load()
    untouched = per_sample_loss(base, batch)

    whole = lora(model_config, **settings)
    first: dict[str, torch.Tensor] = {}

    class Look(StopAt):
        def on_train_start(self, trainer, pl_module: Any) -> None:
            first["loss"] = per_sample_loss(pl_module.model, batch)

    trainer(tmp_path / "whole", Look(-1), **LIMIT).fit(whole, data(seed=1))
    torch.testing.assert_close(first["loss"], untouched, atol=2e-5, rtol=1e-5)

    with pytest.raises(SystemExit):
        trainer(tmp_path / "killed", StopAt(7), **LIMIT).fit(lora(model_config, **settings), data(seed=1))
    for given in ("argument", "attribute"):
        torch.manual_seed(99)
        resumed, file = lora(model_config, **settings), str(tmp_path / "killed" / "last.ckpt")
        again = trainer(tmp_path / given, **LIMIT)
        if given == "attribute":
            again.ckpt_path = file
        again.fit(resumed, data(seed=1), ckpt_path=file if given == "argument" else again.ckpt_path)
        for name, value in adapter(whole).items():
            assert torch.equal(adapter(resumed)[name], value), name

    model: Any = whole.model
    ends = per_sample_loss(model, batch)
    assert not torch.allclose(ends, untouched, atol=1e-2)
    whole.tuning.write(model, rows.tokenizer, tmp_path / "adapter")
    loaded: Any = PeftModel.from_pretrained(LocalModel(path=model_config["path"]).load(), str(tmp_path / "adapter"))
    torch.testing.assert_close(per_sample_loss(loaded, batch), ends, atol=1e-4, rtol=1e-4)
    of_checkpoint = AdapterModule.load_from_checkpoint(tmp_path / "whole" / "last.ckpt")
    torch.testing.assert_close(per_sample_loss(of_checkpoint.model, batch), ends, atol=1e-5, rtol=1e-5)

    ranks = whole.tuning.finished(model)
    assert bool(ranks) == (init == "eva")
    if init == "eva":
        assert len(ranks) == 3 * 7
        assert max(ranks.values()) <= 9
        assert len(set(ranks.values())) > 1
        assert {name.removeprefix("base_model.model."): layer.r["default"] for name, layer in lora_layers(model)} == {
            name: rank for name, rank in ranks.items() if rank
        }
    plain = lora(model_config, allocation=EVEN)
    plain.configure_model()
    sizes = [sum(value.numel() for value in adapter(of).values()) for of in (whole, plain)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.03)  # a rank of one of 21 matrices is a large part of a tiny model


def test_lora_ga_starts_from_ranks_by_matrix(tmp_path, model_config, data):
    rows, base = data(seed=1), LocalModel(path=model_config["path"]).load()
    names = [f"{block}.{name}" for block, layers in adapted_shapes(base, None).items() for name in layers]
    ranks = {name: 2 + place % 3 for place, name in enumerate(names)}
    module, batch = lora(model_config, allocation=ranks, init="lora_ga"), rows.collate(rows.first_rows(5))
    expected = per_sample_loss(base, batch)
    trainer(tmp_path, max_epochs=-1, max_steps=1).fit(module, rows)
    assert {name: rank for name, rank in ranks_of(module.model, None).items() if rank} == ranks
    resumed: Any = lora(model_config, allocation=ranks, init="lora_ga", learning_rate=1e-9)
    trainer(tmp_path / "still", max_epochs=-1, max_steps=1).fit(resumed, data(seed=1))
    torch.testing.assert_close(per_sample_loss(resumed.model.eval(), batch), expected, atol=2e-4, rtol=1e-4)


def test_eva_takes_the_directions_of_the_inputs_and_lora_ga_those_of_the_mean_gradient(tmp_path, model_config, data):
    rows = data(seed=1)
    few = rows.first_rows(128)
    batches = [rows.collate(few[at : at + 4]) for at in range(0, len(few), 4)]
    base: Any = LocalModel(path=model_config["path"]).load()
    weight = base.model.layers[1].mlp.down_proj.weight
    for batch in batches:
        per_sample_loss(base, batch).mean().backward()
    _, _, right = torch.linalg.svd(weight.grad.double())

    found: dict[str, Any] = {}

    class Look(StopAt):
        def on_train_start(self, trainer, pl_module: Any) -> None:
            layers = lora_layers(pl_module.model)
            found[init] = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers}

    for init, rho in (("lora_ga", 2.0), ("eva", 1.0)):
        module = lora(model_config, allocation=EVEN, init=init, rho=rho)
        trainer(tmp_path / init, Look(-1), max_epochs=-1, max_steps=1).fit(module, data(seed=1))
    a = found["lora_ga"]["base_model.model.model.layers.1.mlp.down_proj"].double()
    assert torch.linalg.matrix_norm(a @ right[:4].T) ** 2 == pytest.approx(4, rel=1e-2)

    inputs: list[torch.Tensor] = []
    base.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, given: inputs.append(given[0][masks[-1]].detach().double())
    )
    masks: list[torch.Tensor] = []
    for batch in batches:
        masks.append(batch["labels"] != -100)
        per_sample_loss(base, batch)
    every = torch.cat(inputs)
    _, _, main = torch.linalg.svd(every - every.mean(0))
    a = found["eva"]["base_model.model.model.layers.1.mlp.down_proj"].double()
    torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=torch.float64), atol=1e-4, rtol=0)
    assert torch.linalg.matrix_norm(a @ main[:4].T) ** 2 > 3.5


@pytest.mark.parametrize(
    ("settings", "rank", "words"),
    [
        (
            {"init": "eva", "rho": 2.5},
            10,
            r"a rank of 10 with method.rho=2.5 asks for 25 .* which has 24; lower",
        ),
        ({"init": "lora_ga"}, 13, r"rank of 13 with method.init=lora_ga, which takes two .* asks for 26 directions of"),
        (
            {"init": "eva", "rho": 1.0},
            24,
            r"method.init=eva needs 48 tokens .* the 2 train rows have .*; lower a",
        ),
    ],
)
def test_ranks_without_enough_directions_or_tokens_are_refused(
    model_config, data, settings: dict[str, Any], rank: int, words
):
    rows = data(loss_on="output")
    rows.train = type(rows.train)(rows.train[:2])
    module = lora(model_config, **settings)
    skeleton = LocalModel(path=model_config["path"]).skeleton()
    with pytest.raises(ValueError, match=words):
        module.tuning.check_start(skeleton, counts(dict.fromkeys(ALLOCATION, rank), LoraAdapter), rows)
