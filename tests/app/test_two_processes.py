"""Processes started from outside, as by Slurm, train together (gloo, CPU): one folder, one epoch, one adapter."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from peft import PeftModel
from safetensors.torch import load_file

from layerif.adapt.module import AdapterModule
from layerif.app.schema import check, register
from layerif.app.setup import Setup
from layerif.files import conf_folder
from layerif.record.record import RunRecord

SIZE = 2
SETTINGS = [
    "estimator=uniform",
    "allocator.budget=9",
    "logger=none",
    "method.lora_dropout=0",  # a mask fits the shape of one batch
    "method.learning_rate=0.01",
    "trainer.max_steps=8",  # of 5 an epoch
    "fit.checkpoint_steps=1",
]


def trained(overrides: list[str], folder: Path) -> RunRecord:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", [*overrides, *SETTINGS])
    check(config)
    setup = Setup(config)
    record = RunRecord(name="test", seed=0, config={}, overrides=[])
    setup.method.run(setup, record, folder)
    return record


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def _process(rank: int, overrides: list[str], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank > 0:
        PeftModel.save_pretrained = None  # type: ignore[assignment] - the first process saves for all
    two = [*overrides, "data.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp"]
    trained(two, folder / "whole")
    step = AdapterModule.training_step

    def killed(self: AdapterModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.global_step == 3:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    AdapterModule.training_step = killed
    with pytest.raises(RuntimeError, match="killed"):
        trained(two, folder / "killed")
    AdapterModule.training_step = step
    assert any("did not finish" in note for note in trained(two, folder / "killed").notes)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one_of_the_larger_batch_and_carry_on_in_the_middle_of_an_epoch(
    tiny_overrides, tmp_path
):
    alone = trained([*tiny_overrides, "data.batch_size=4"], tmp_path / "alone")
    assert alone.metrics["accuracy"] >= 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (tiny_overrides, tmp_path, port), nprocs=SIZE)  # type: ignore[attr-defined]
    one, two, resumed = (adapter(tmp_path / name) for name in ("alone", "whole", "killed"))
    assert any(bool(value.any()) for name, value in one.items() if "lora_moe_B" in name)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(resumed[name], two[name]), name
