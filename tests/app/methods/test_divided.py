"""Fine-tuning of a model whose frozen weights are divided: two processes (gloo, CPU) end with the adapter of one."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import AutoModelForCausalLM

from layerif.adapt.module import AdapterModule
from layerif.app.export import export
from layerif.probe.grams.processes import is_spread
from layerif.record.record import RunRecord
from tests.app.test_two_processes import SIZE, adapter, trained

SETTINGS = [
    "model.dtype=float64",
    "trainer.precision=64-true",
    "trainer.max_steps=4",
    "trainer.accumulate_grad_batches=2",
    "fit.checkpoint_steps=1",
    "method.gradient_checkpointing=true",
]
IDS = torch.arange(12)[None] + 5
KINDS = {
    "lora_moe": ["estimator=datainf", "probe.num_train=4", "probe.num_validation=2", "probe.scope=all"],
    "lora": ["method=lora", "allocator.budget=9"],
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _process(rank: int, overrides: list[str], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    two = [*overrides, "data.batch_size=2", "trainer.devices=2", "trainer.strategy=fsdp"]
    step, is_divided = AdapterModule.training_step, []

    def killed(self: AdapterModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        assert self.model is not None
        is_divided.append(is_spread(self.model))
        if self.global_step == 2:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    AdapterModule.training_step = killed
    with pytest.raises(RuntimeError, match="killed"):
        trained(two, folder)
    assert set(is_divided) == {True}
    AdapterModule.training_step = step
    record = trained(two, folder)
    assert any("did not finish" in note for note in record.notes)
    if rank == 0:
        torch.save((record.metrics, record.parameters), folder / "record.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_with_half_of_the_weights_each_carry_on_to_the_adapter_of_one(
    kind, tiny_overrides, tmp_path, model_folder
):
    overrides = [*tiny_overrides, *SETTINGS, *KINDS[kind]]
    mp.spawn(_process, (overrides, tmp_path / "two", free_port()), nprocs=SIZE)  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    record = trained([*overrides, "data.batch_size=4"], tmp_path / "one")
    one, two = (adapter(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert any(bool(value.any()) for name, value in one.items() if "B" in name)  # where training began with zeros
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-9)
    metrics, parameters = torch.load(tmp_path / "two" / "record.pt")
    assert metrics == pytest.approx(record.metrics, rel=1e-6)
    assert parameters == record.parameters
    for name in ("one", "two"):
        as_finished(tmp_path / name, kind, model_folder)
    if kind == "lora_moe":
        with pytest.raises(ValueError, match=r"--to peft does not fit this run of method=lora_moe, .* routers mix"):
            export(tmp_path / "two", "peft", tmp_path / "two-handed-over")
        return
    logits = []
    for name in ("one", "two"):
        folder = tmp_path / f"{name}-handed-over"
        export(tmp_path / name, "peft", folder)
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=IDS).logits)
            bare = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)(input_ids=IDS).logits
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits[1], bare, rtol=1e-4, atol=1e-4)


def as_finished(folder: Path, method: str, model_folder: Path) -> None:
    """Writes beside an adapter what the program itself writes at the end of a run."""
    RunRecord(name="test", seed=0, config={}, overrides=[], choices={"method": method}).write(folder)
    model = {"_target_": "layerif.models.pretrained.LocalModel", "path": str(model_folder), "dtype": "float64"}
    (folder / ".hydra").mkdir()
    OmegaConf.save({"model": model}, folder / ".hydra" / "config.yaml")


def test_one_process_that_holds_all_parts_trains_as_without_them(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, *SETTINGS[:2], "data.batch_size=4"]
    plain = trained(overrides, tmp_path / "plain")
    here = {"LOCAL_RANK": 0, "NODE_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in here.items():
            patch.setenv(name, str(value))
        try:
            parts = trained([*overrides, "trainer.strategy=fsdp"], tmp_path / "parts")
        finally:
            dist.destroy_process_group()
    for name, value in adapter(tmp_path / "plain").items():
        torch.testing.assert_close(adapter(tmp_path / "parts")[name], value, rtol=1e-6, atol=1e-9)
    assert parts.metrics == pytest.approx(plain.metrics, rel=1e-6)


@pytest.mark.parametrize("method", ["full", "adalora", "prune", "drop", "quantise", "diagnose", "fusion"])
def test_a_method_that_needs_the_whole_model_is_refused_by_name(method, setup_of, model_folder):
    other = ["+model@method.other=local", f"method.other.path={model_folder}"] if method == "fusion" else []
    with pytest.raises(
        ValueError, match=rf"^method={method} needs the whole model on every device.* another method: .*lora_moe"
    ):
        setup_of(f"method={method}", *other, "trainer.strategy=fsdp")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=lora", "method.init=eva"], r"^method\.init=eva asks the whole model on one device"),
        (["evaluation.before=true"], r"^evaluation\.before=true asks the whole model on one device"),
        (["trainer.precision=16-mixed"], r"^trainer\.precision=16-mixed scales the loss in every process by itself"),
        (["selection=loss", "selection.budget=4"], "this selection asks the whole model about rows"),
        (
            ["trainer.strategy={_target_: lightning.pytorch.strategies.ModelParallelStrategy}"],
            "fine-tuning cannot divide a frozen model by ModelParallelStrategy; use trainer.strategy=fsdp",
        ),
    ],
)
def test_what_asks_the_whole_model_is_refused_before_anything_is_measured(overrides, said, setup_of):
    setup = setup_of("trainer.strategy=fsdp", *overrides)
    with pytest.raises(ValueError, match=said):
        setup.method.check(setup)
