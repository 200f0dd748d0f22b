"""The private parts of other libraries behave as `layerif.compat` expects them to."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from typing import Any

import lightning as L
import peft
import pytest
import torch
from peft import get_peft_model
from peft.utils import PeftType
from torch import nn
from torch.utils.data import DataLoader

from layerif import compat
from layerif.models.pretrained import HubModel
from layerif.moe import LoraMoeConfig
from tests.tiny import tiny_model


def test_peft_asks_for_a_deprecated_name_and_the_warning_of_it_is_ignored():
    for is_quiet in (False, True):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            if is_quiet:
                compat.quieten_peft()
            get_peft_model(tiny_model(), LoraMoeConfig(num_experts=1))
        assert any("is_gradient_checkpointing" in str(each.message) for each in found) != is_quiet


class Line(L.LightningModule):
    """A line fitted by Lightning, which notes what `compat` says at every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.steps: list[int] = []
        self.validates: list[bool] = []
        self.validated_after: list[int] = []

    def training_step(self, batch, index):
        self.steps.append(compat.logged_step(self.trainer))
        return self.line(batch).square().mean()

    def on_train_batch_end(self, *_):
        self.validates.append(compat.validates_now(self.trainer))

    def validation_step(self, batch, index):
        self.validated_after.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fitted(tmp_path) -> tuple[Line, L.Trainer]:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=6,
        val_check_interval=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    rows: Any = torch.ones(12, 1)
    module, data = Line(), DataLoader(rows, batch_size=2)
    trainer.fit(module, data, data)
    return module, trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightnings_steps_and_validations_are_foreseen(fitted):
    module, trainer = fitted
    assert module.steps == [0, 1, 2, 3, 4, 5]
    assert module.validates == [False, True] * 3
    assert module.validated_after == [2, 4, 6]
    compat.set_logged_step(trainer, 40)
    assert compat.logged_step(trainer) == trainer.fit_loop.epoch_loop._batches_that_stepped == 40


def test_hydras_options_are_those_of_its_help():
    assert {"--help", "--cfg", "--multirun", "--config-dir", "--config-name"} <= set(compat.hydra_options())


def test_hydra_composes_by_the_loader_that_it_is_given(tmp_path):
    from hydra import compose, initialize_config_dir
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    seen = []

    class Loader(ConfigLoaderImpl):
        def load_configuration(self, config_name, overrides, *rest, **options):
            seen.append(overrides)
            return super().load_configuration(config_name, overrides, *rest, **options)

    (tmp_path / "config.yaml").write_text("a: 1")
    for context, number in ((compat.compose_by(Loader), 1), (contextlib.nullcontext(), 1)):
        with context, initialize_config_dir(str(tmp_path), version_base="1.3"):
            assert compose("config", ["a=2"]).a == 2
        assert seen == [["a=2"]] * number


def test_hydra_takes_the_whitelist_where_it_has_one_and_resolvers_in_defaults_either_way(tmp_path):
    import hydra
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    given = compat.execution_whitelist(["layerif.*"])
    assert given in ({}, {"execution_whitelist": ["layerif.*"]})
    assert callable(hydra.main(version_base="1.3", config_path=None, **given))
    OmegaConf.register_new_resolver("twice", lambda text: text * 2, replace=True)
    compat.resolve_in_defaults()
    for folder, name, content in (("a", "x", "a: 1"), ("b", "xx", "b: 2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.yaml").write_text(content)
    (tmp_path / "config.yaml").write_text("defaults: [b: '${twice:${a}}', a: x]")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("config") == {"a": {"a": 1}, "b": {"b": 2}}


def test_hydras_arguments_are_read_as_hydra_reads_them():
    found = compat.hydra_arguments(["-m", "a=1", "b=2", "--config-n", "mine"])
    assert (found.multirun, found.overrides, found.config_name, found.experimental_rerun) == (
        True,
        ["a=1", "b=2"],
        "mine",
        None,
    )


def test_wandb_starts_with_the_arguments_that_the_logger_keeps(tmp_path):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=str(tmp_path), project="mine", mode="offline")
    assert compat.wandb_init(logger)["project"] == "mine"
    compat.wandb_init(logger)["mode"] = "disabled"
    try:
        assert logger.experiment.disabled
    finally:
        logger.experiment.finish()  # a run that is left open takes the place of the next one in this process


def test_a_new_peft_type_is_a_full_member_of_the_enum():
    name = "LORA_MOE"  # the package's own, because a member cannot be taken out again
    for _ in range(2):
        compat.add_peft_type(name)
    mine = PeftType(name)
    assert mine is PeftType.LORA_MOE is PeftType[name] is pickle.loads(pickle.dumps(mine)) is copy.deepcopy(mine)  # type: ignore[attr-defined]
    assert mine == mine.value == mine.name == name
    assert mine in PeftType
    assert name in PeftType.__members__
    assert [one.name for one in PeftType].count(name) == 1


def test_the_commit_of_a_model_is_the_one_in_the_hubs_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "models--org--tiny"
    for folder in ("refs", f"snapshots/{commit}"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert compat.hub_commit("org/tiny", None) == commit
    assert HubModel(name="org/tiny", revision="main").weights_hash() == f"org/tiny@{commit}"


def test_changes_in_place_are_counted():
    tensor = torch.zeros(3)
    before = compat.changes_of(tensor)
    tensor.add_(1)
    assert compat.changes_of(tensor) != before
    with torch.inference_mode():
        assert compat.changes_of(torch.zeros(3)) is None


def test_every_tensor_of_a_tree_is_mapped_and_nothing_else():
    tree = ((torch.ones(2), 3), {"mask": [torch.zeros(1), None]})
    (first, number), named = compat.map_tensors(lambda tensor: tensor + 1, tree)
    assert number == 3
    assert named["mask"][1] is None
    assert torch.equal(first, torch.full((2,), 2.0))
    assert torch.equal(named["mask"][0], torch.ones(1))


def test_a_trainer_drops_the_columns_that_its_model_does_not_take(tmp_path):
    from transformers import Trainer, TrainingArguments

    seen: list[Any] = []
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(tiny_model(), arguments, data_collator=lambda rows: seen.extend(rows) or {})
    compat.trainer_collator(trainer)([{"input_ids": [3], "labels": [3], "name": "x"}])
    assert seen == [{"input_ids": [3], "labels": [3]}]


def test_peft_puts_lora_on_fused_experts_where_a_dense_layer_is_named():
    from layerif.models.stored import expert_tensors
    from tests.families import model_of

    assert {"gate_proj", "up_proj", "down_proj"} <= {*compat.renamed_for_experts("deepseek_v3")}
    assert compat.renamed_for_experts("llama") == ()
    model = model_of("deepseek_v3")
    names = [name.rpartition(".")[2] for name in expert_tensors(model)]
    config = peft.LoraConfig(target_modules=["mlp.down_proj"], r=2, lora_dropout=0)
    adapted = {name for name, _ in get_peft_model(model, config).named_parameters() if "lora_A" in name}
    assert "down_proj" in names
    assert adapted
    assert all("experts" in name for name in adapted)


def test_models_say_if_they_have_sdpa():
    from tests.families import model_of

    assert compat.has_sdpa(tiny_model())
    assert not compat.has_sdpa(model_of("gpt_oss"))
