"""Training: the allocation becomes the model, checkpoints hold the adapter alone, and resuming changes no bit."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from layerif.adapt.adapters import Adapter, EqualLoraAdapter, LoraAdapter, LoraMoeAdapter
from layerif.adapt.callback import InfluenceCallback
from layerif.adapt.data import EpochShuffle, TaskDataModule
from layerif.adapt.kinds import tuning_of
from layerif.adapt.module import AdapterModule
from layerif.allocate.allocation import Allocation
from layerif.allocate.experts import Experts
from layerif.allocate.rank import Rank
from layerif.data.batches import collate
from layerif.data.source import Folder
from layerif.data.task import Splits, Task
from layerif.decide import Decider
from layerif.estimators.datainf import DataInf
from layerif.models.blocks import bare, blocks
from layerif.models.contexts import evaluating
from layerif.models.loss import per_sample_loss
from layerif.models.pretrained import LocalModel
from layerif.probe.settings import Probe
from layerif.probe.store import Store
from tests.command import run_layerif
from tests.tiny import shipped_task, tiny_model

ALLOCATION = {"model.layers.0": 1, "model.layers.1": 3, "model.layers.2": 2}
KINDS = (LoraMoeAdapter, LoraAdapter, EqualLoraAdapter)


def module_of(kind: type[Adapter], model_config, *, allocation=None, **settings: Any) -> AdapterModule:
    given = None if allocation is None else counts(allocation, kind)
    return AdapterModule(kind(**settings), model_config, given)


def counts(by_name: dict[str, int], kind: type[Adapter] = LoraMoeAdapter) -> Allocation:
    spent = "rank" if kind is LoraAdapter else "experts"
    return Allocation(tuple(by_name), spent, tuple(by_name.values()), sum(by_name.values()))


moe, lora, equal = (partial(module_of, kind) for kind in KINDS)


@pytest.fixture
def model_config(model_folder):
    return {"_target_": "layerif.models.pretrained.LocalModel", "path": str(model_folder)}


@pytest.fixture(scope="session")
def splits(task_folder) -> Splits:
    task = Task(
        name="tiny",
        source=Folder(path=str(task_folder)),
        columns={},
        instruction="{{ question }}",
        output="Answer: {{ label }}.",
        labels="options",
        answer="answer",
        pattern="Answer: (.*)",
        splits={"train": "train", "validation": "validation", "test": "test"},
    )
    return task.load()


@pytest.fixture
def data(splits, model_folder):
    return partial(TaskDataModule, splits, LocalModel(path=str(model_folder)).tokenizer(), batch_size=4)


def trainer(folder, *callbacks, **options) -> L.Trainer:
    defaults = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    saving = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    return L.Trainer(
        **{**defaults, **options},
        default_root_dir=folder,
        callbacks=[saving, *callbacks],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
    )


class StopAt(L.Callback):
    """Stops a run after a number of steps, as if it were killed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            raise SystemExit


def adapter(module: AdapterModule) -> dict[str, torch.Tensor]:
    assert module.model is not None
    return {name: value.detach() for name, value in module.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("new", "limit", "killed_at"),  # an epoch has 5 steps
    [
        (moe, {"max_epochs": 2}, 5),
        (moe, {"max_epochs": -1, "max_steps": 8}, 7),
        (lora, {"max_epochs": 2}, 3),
    ],
)
def test_resume_equals_uninterrupted_bit_for_bit(tmp_path, model_config, data, new, limit, killed_at):
    settings: dict[str, Any] = {"allocation": ALLOCATION, "seed": 1, "target_modules": ["q_proj", "down_proj"]}
    whole = new(model_config, **settings)
    trainer(tmp_path / "whole", **limit).fit(whole, data(seed=1))
    with pytest.raises(SystemExit):
        trainer(tmp_path / "killed", StopAt(killed_at + 1), **limit).fit(new(model_config, **settings), data(seed=1))
    torch.manual_seed(99)  # the result must not depend on the generator's state in a fresh process
    resumed = new(model_config, **settings)
    trainer(tmp_path / "resumed", **limit).fit(resumed, data(seed=1), ckpt_path=str(tmp_path / "killed" / "last.ckpt"))
    expected = adapter(whole)
    assert any(bool(value.any()) for name, value in expected.items() if "_B" in name)
    for name, value in adapter(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_plain_lora_has_the_rank_of_its_block_and_one_scaling_everywhere(tmp_path, model_config, data):
    ranks = {"model.layers.0": 1, "model.layers.1": 11, "model.layers.2": 3}
    module = lora(model_config, allocation=ranks, scaling=1.5)
    trainer(tmp_path, max_steps=2).fit(module, data())
    expected = 0
    model: Any = module.model
    for block, layer in blocks(model).items():
        adapted: list[Any] = [linear for linear in layer.modules() if isinstance(linear, LoraLayer)]
        assert len(adapted) == 7  # q, k, v, o, gate, up, down
        for linear in adapted:
            assert linear.r["default"] == linear.lora_A["default"].out_features == ranks[block]
            assert linear.scaling["default"] == pytest.approx(1.5)
            expected += ranks[block] * (linear.in_features + linear.out_features)
    assert sum(value.numel() for value in adapter(module).values()) == expected
    assert not [name for name in adapter(module) if "lm_head" in name]
    model.save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(LocalModel(path=model_config["path"]).load(), tmp_path / "adapter")
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_the_callback_gives_plain_lora_its_ranks(tmp_path, model_config, model_folder, data, splits):
    decide = replace(decider(model_folder, splits, tmp_path / "store"), allocator=Rank(budget=20))
    module = lora(model_config)
    trainer(tmp_path, InfluenceCallback(decide), max_steps=1).fit(module, data())
    assert module.allocation is not None
    assert sum(module.allocation.values) == 20


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
@pytest.mark.parametrize("experts", [(1, 3, 2), (1, 1, 1), (5, 5, 5)])
def test_the_baseline_of_equal_size_is_as_near_as_ranks_come(model_config, targets, experts):
    allocation = dict(zip(ALLOCATION, experts, strict=True))
    shared: dict[str, Any] = {"allocation": allocation, "r": 4, "target_modules": targets}
    mixture, plain = moe(model_config, **shared), equal(model_config, **shared)
    for module in (mixture, plain):
        module.configure_model()
    of_moe, of_plain = (sum(value.numel() for value in adapter(module).values()) for module in (mixture, plain))
    assert plain.compared == {"lora_moe": of_moe}
    assert plain.model is not None
    linears: list[Any] = [module for module in plain.model.modules() if isinstance(module, LoraLayer)]
    ranks = [linear.r["default"] for linear in linears]
    assert max(ranks) - min(ranks) <= 1
    per_rank_of_a_block = sum(linear.in_features + linear.out_features for linear in linears) / 3
    assert abs(of_plain - of_moe) <= per_rank_of_a_block / 2
    if experts == (1, 1, 1):
        assert of_plain == of_moe  # one expert is plain LoRA


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (
            {**ALLOCATION, "model.layer.2": 1},
            r"'model\.layer\.2' has a rank but is not a block.*did you mean 'model\.layers\.2'.*its blocks are model",
        ),
        ({"model.layers.0": 1}, r"2 of 3 blocks have no rank, the first is 'model\.layers\.1'; give each one"),
    ],
)
def test_ranks_of_another_model_are_refused(model_config, ranks, message):
    with pytest.raises(ValueError, match=message):
        lora(model_config, allocation=ranks).configure_model()


@pytest.mark.parametrize("kind", KINDS)
def test_whether_an_adapter_fits_is_found_out_without_weights(model_config, kind):
    def fits(**settings):
        kind(**settings).check_fits(LocalModel(path=model_config["path"]).skeleton(), counts(ALLOCATION, kind))

    fits()
    fits(target_modules=["q_proj", "mlp.up_proj"])
    with pytest.raises(
        ValueError, match=r"target_modules holds 'q_porj', which is not a layer of this model .* mean 'q_proj'"
    ):
        fits(target_modules=["v_proj", "q_porj"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_from_what_a_checkpoint_holds_of_it(kind):
    settings = kind(learning_rate=0.01, target_modules=["q_proj"])
    assert tuning_of(settings.saved()) == settings


def test_advice_comes_with_a_refused_setting():
    with pytest.raises(
        ValueError, match=r"method\.warmup_ratio=1 is not allowed; .*; for steps use method\.warmup_steps"
    ):
        LoraMoeAdapter(warmup_ratio=1)


def test_a_batch_holds_a_sample(data):
    with pytest.raises(ValueError, match=r"data\.batch_size=0 is not allowed; allowed: a whole number of at least 1"):
        data(batch_size=0)


def test_an_adapter_is_not_trained_on_top_of_another(model_config):
    with pytest.raises(ValueError, match=r"cannot build on model\.adapter='/adapter'; merge"):
        moe({**model_config, "adapter": "/adapter"})


def test_a_checkpoint_holds_the_adapter_alone_and_loads_without_help(tmp_path, model_config, data):
    module = moe(model_config, allocation=ALLOCATION)
    trainer(tmp_path, max_steps=2).fit(module, data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"]
    assert all("lora" in name for name in saved["state_dict"])
    loaded = AdapterModule.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu", weights_only=True)
    assert loaded.allocation == counts(ALLOCATION)
    for name, value in adapter(module).items():
        assert torch.equal(value, adapter(loaded)[name])


def test_training_changes_only_the_adapter(tmp_path, model_config, data, model_folder):
    module = moe(model_config, allocation=ALLOCATION)
    trainer(tmp_path, max_steps=2).fit(module, data())
    before = LocalModel(path=str(model_folder)).load().state_dict()
    assert module.model is not None
    for name, value in bare(module.model).state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])


def decider(model_folder, splits, store) -> Decider:
    model = LocalModel(path=str(model_folder))
    probe = Probe(num_train=8, num_validation=4)
    return Decider(
        model=model,
        tokenizer=model.tokenizer(),
        splits=splits,
        probe=probe,
        estimator=DataInf(),
        allocator=Experts(budget=9),
        store=Store(store),
    )


def test_the_callback_decides_before_the_model_is_built(tmp_path, model_config, model_folder, data, splits):
    callback = InfluenceCallback(decider(model_folder, splits, tmp_path / "store"))
    module = moe(model_config)
    trainer(tmp_path, callback, max_steps=1).fit(module, data())
    assert callback.decision is not None
    assert not callback.decision.reused
    assert module.allocation == callback.decision.allocation
    assert sum(callback.decision.allocation.values) == 9
    assert isinstance(module.model, PeftModel)
    assert module.model.peft_config["default"].num_experts == module.allocation.by_name()  # type: ignore[union-attr]


def test_a_resumed_run_takes_the_allocation_of_its_checkpoint(tmp_path, model_config, model_folder, data, splits):
    first = InfluenceCallback(decider(model_folder, splits, tmp_path / "store"))
    trainer(tmp_path, first, max_steps=1).fit(moe(model_config), data())

    def never(_):
        raise AssertionError("must not decide again")

    again = InfluenceCallback(never)
    module = moe(model_config)
    resumed = trainer(tmp_path / "more", again, max_steps=2)
    resumed.ckpt_path = str(tmp_path / "last.ckpt")
    resumed.fit(module, data())
    assert first.decision is not None
    assert again.decision is not None
    assert module.allocation == first.decision.allocation
    assert again.decision.scores == first.decision.scores


def test_weights_of_a_checkpoint_bring_their_allocation(tmp_path, model_config, data):
    first = moe(model_config, allocation=ALLOCATION)
    trainer(tmp_path, max_steps=1).fit(first, data())
    other = moe(model_config, allocation=dict.fromkeys(ALLOCATION, 2))
    trainer(tmp_path / "more", max_steps=1).fit(other, data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert other.allocation == counts(ALLOCATION)
    for name, value in adapter(first).items():
        assert torch.equal(value, adapter(other)[name])


def test_without_an_allocation_the_module_says_so(tmp_path, model_config, data):
    with pytest.raises(ValueError, match="no allocation yet"):
        trainer(tmp_path, max_steps=1).fit(moe(model_config), data())


def test_a_gradient_that_is_not_finite_stops_training_and_names_its_matrix(tmp_path, model_config, data):
    module = moe(model_config, allocation=ALLOCATION)

    class Spoil(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            parameter = next(value for name, value in pl_module.named_parameters() if "lora_moe_B" in name)
            parameter.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(ValueError, match=r"the gradient of .*layers\.0\..*lora_moe_B.* is not finite at step 0"):
        trainer(tmp_path, Spoil(), max_steps=2).fit(module, data())


@pytest.mark.parametrize(
    ("is_divided", "said"),
    [
        (False, r"step 0, batch 3, from block model\.layers\.1 on; lower"),
        (True, r"step 0, batch 3, in a block that nobody looks for, because the weights are divided among processes"),
    ],
)
def test_a_loss_that_is_not_finite_names_the_block_where_a_forward_pass_needs_no_other_process(
    is_divided, said, model_config, data, monkeypatch
):
    module = moe(model_config, allocation=ALLOCATION)
    module.configure_model()
    batch = next(iter(data().train_dataloader()))
    passes: list[int] = []
    assert module.model is not None
    blocks(module.model)["model.layers.1"].register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        for parameter in blocks(module.model)["model.layers.1"].parameters():
            parameter.fill_(float("nan"))
    monkeypatch.setattr("layerif.adapt.module.is_sharded", lambda trainer: is_divided)
    with pytest.raises(ValueError, match=said):
        module.training_step(batch, 3)
    assert len(passes) == (1 if is_divided else 2)


def test_under_a_gradient_scaler_such_a_step_is_left_to_it(tmp_path, model_config, data):
    """Dynamic loss scaling starts too high on purpose, and the scaler skips the steps that overflow."""
    module = moe(model_config, allocation=ALLOCATION)
    spoiled = []

    class Overflow(L.Callback):
        def on_after_backward(self, trainer, pl_module) -> None:
            if not spoiled:
                parameter = next(value for name, value in pl_module.named_parameters() if "lora_moe_B" in name)
                assert parameter.grad is not None
                parameter.grad.fill_(float("inf"))
                spoiled.append(adapter(module))

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(tmp_path, Overflow(), max_steps=3, plugins=[plugin]).fit(module, data())
    assert spoiled
    assert scaler.get_scale() == 2.0
    assert all(bool(value.isfinite().all()) for value in adapter(module).values())


def test_the_balance_loss_trains_and_is_logged(tmp_path, model_config, data):
    module = moe(model_config, allocation=ALLOCATION, balance_coefficient=0.001)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data())
    assert run.callback_metrics["train/balance"] >= 1 - 1e-4


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gradient_checkpointing_runs_blocks_again_and_gives_the_same_adapter(tmp_path, model_folder, data, family):
    """Blocks of OPT drop out by their own mode, which must not change. Validation and loading keep the setting on."""
    path = tmp_path / family
    shutil.copytree(model_folder, path)
    settings: dict[str, Any] = {"dropout": 0.5} if family == "opt" else {}
    tiny_model(family, num_hidden_layers=2, **settings).save_pretrained(path)
    config = {"_target_": "layerif.models.pretrained.LocalModel", "path": str(path)}
    experts = dict.fromkeys(LocalModel(path=str(path)).layers().names, 2)
    adapters, counts, written = [], [], []
    for on in (False, True):
        module = moe(config, allocation=experts, gradient_checkpointing=on, balance_coefficient=0.001)
        module.configure_model()
        ran = Counter()

        def count(block, args, ran=ran, module=module) -> None:
            ran["training" if torch.is_grad_enabled() else "validation"] += 1

        assert module.model is not None
        for block in blocks(module.model).values():
            next(block.children()).register_forward_pre_hook(count)
        trainer(tmp_path / str(on), max_steps=4).fit(module, data(batch_size=8))  # a validation comes after step 3
        adapters.append(adapter(module))
        counts.append(ran)
        with evaluating(module.model), torch.inference_mode():
            written.append(module.model.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=4).tolist())  # type: ignore[operator]
    assert written[0] == written[1]
    plain, checkpointed = counts
    assert plain["training"] == 4 * 2
    assert checkpointed["training"] == 2 * plain["training"]
    assert checkpointed["validation"] == plain["validation"] > 0
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-4, atol=1e-6)


def test_accumulated_small_batches_equal_one_large_batch(tmp_path, model_config, data):
    results = []
    for number, (size, accumulated) in enumerate([(4, 1), (2, 2)]):
        module = moe(model_config, allocation=ALLOCATION, lora_dropout=0.0)
        run = trainer(tmp_path / str(number), max_steps=2, accumulate_grad_batches=accumulated)
        run.fit(module, data(batch_size=size))
        results.append(adapter(module))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("options", "peak"), [({"warmup_ratio": 0.5}, 5), ({"warmup_steps": 2}, 2)])
def test_the_learning_rate_rises_then_falls_to_zero(tmp_path, model_config, data, options, peak):
    rates = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = moe(model_config, allocation=ALLOCATION, learning_rate=1.0, target_modules=["q_proj"], **options)
    trainer(tmp_path, Watch(), max_steps=10).fit(module, data())
    expected = [step / peak if step < peak else (10 - step) / (10 - peak) for step in range(1, 11)]
    assert rates == pytest.approx(expected)


def test_an_epoch_is_every_sample_once_in_an_order_of_its_own():
    sampler = EpochShuffle(10, 10, seed=0, epoch=iter((0, 1)).__next__)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_sampler_carries_on_where_it_was():
    whole = list(EpochShuffle(10, 10, seed=0))
    first = EpochShuffle(10, 10, seed=0)
    begun = iter(first)
    assert [next(begun), next(begun), next(begun)] == whole[:3]
    rest = EpochShuffle(10, 10, seed=0, start=first.drawn)
    assert list(rest) == whole[3:]
    assert list(rest) == whole  # the next epoch is whole again


@pytest.mark.parametrize(("count", "num_processes"), [(10, 1), (10, 2), (10, 4), (9, 4), (1, 4)])
def test_processes_share_an_epoch_and_each_carries_on_where_it_was(count, num_processes):
    one = list(EpochShuffle(12, count, seed=0))
    samplers = [
        EpochShuffle(12, count, seed=0, rank=rank, num_processes=num_processes) for rank in range(num_processes)
    ]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(sampler) for sampler in samplers} == {-(-count // num_processes)}
    dealt = [position for turn in zip(*shares, strict=True) for position in turn]
    assert dealt[:count] == one  # disjoint and complete, and at each step the same as one process draws
    assert set(dealt[count:]) <= set(one)
    assert len(dealt) - count < num_processes
    for rank, share in enumerate(shares):
        rest = EpochShuffle(12, count, seed=0, start=1, rank=rank, num_processes=num_processes)
        assert list(rest) == share[1:]
        assert list(rest) == share


def test_drop_partial_counts_what_all_processes_take(data):
    found = data(batch_size=2, drop_partial=True)
    found.trainer = SimpleNamespace(global_rank=1, world_size=4, accumulate_grad_batches=2, current_epoch=0)
    assert len(found.train_dataloader()) == 2  # 20 samples give one step of 16: two batches of two in each process
    found.batch_size = 3
    with pytest.raises(ValueError, match=r"batch_size=3 × 2 accumulated × 4 processes"):
        found.train_dataloader()


def test_drop_partial_leaves_whole_batches(data):
    assert len(data(batch_size=8, drop_partial=False).train_dataloader()) == 3
    assert len(data(batch_size=8, drop_partial=True).train_dataloader()) == 2
    with pytest.raises(ValueError, match="leaves none of 20 samples"):
        data(batch_size=64, drop_partial=True).train_dataloader()


def test_early_stopping_and_the_best_checkpoint_are_settings(tmp_path, tiny_overrides):
    """With a learning rate that soon does harm, training stops, and the adapter of the best epoch is kept."""
    fit = [
        "fit.keep=best",
        "fit.patience=2",
        "trainer.max_steps=-1",
        "method.learning_rate=0.5",
        "method.warmup_ratio=0",
        "method.target_modules=[q_proj,down_proj]",
        "estimator=uniform",
        "data.batch_size=8",
    ]
    run_layerif([*tiny_overrides, *fit, "trainer.max_epochs=20", "data.template=plain"], tmp_path)
    losses = pd.read_csv(tmp_path / "run" / "metrics.csv")["validation/loss"].dropna().reset_index(drop=True)
    assert len(losses) == losses.to_numpy().argmin() + 3 < 20
    model_path, task_path = (tiny_overrides[position].partition("=")[2] for position in (1, 3))
    model = LocalModel(path=model_path)
    kept = PeftModel.from_pretrained(model.load(), tmp_path / "run" / "adapter")
    splits = shipped_task("jsonl", f"task.path={task_path}").load()
    encoded = TaskDataModule(splits, model.tokenizer(), template="plain", batch_size=8).validation
    with torch.inference_mode():
        found = float(per_sample_loss(kept, collate(encoded, 0)).mean())
    assert found == pytest.approx(losses.min(), rel=1e-4)


def test_a_run_trains_ranks_and_its_adapter_is_weighed_by_ila(tmp_path, tiny_overrides):
    """On the command line, method=lora spends allocator=rank, and estimator=ila scores the adapter that it trained."""
    trained = run_layerif([*tiny_overrides, "method=lora", "allocator=rank", "estimator=uniform"], tmp_path)
    assert trained.decision.allocation.kind == "rank"
    assert sum(trained.decision.allocation.values) == 24
    assert trained.parameters["trainable"] > 0
    ila = ["estimator=reversed", "estimator@estimator.of=ila", "estimator.of.num_steps=3", "method=none"]
    adapter_folder = f"model.adapter={tmp_path / 'run' / 'adapter'}"
    (tmp_path / "again").mkdir()
    scored = run_layerif([*tiny_overrides, *ila, adapter_folder], tmp_path / "again")
    assert scored.decision.scores.higher_means == "important"
    assert scored.decision.source.startswith("reversed(ila(")
    assert scored.decision.samples == {"train": 20, "validation": 0}
    assert all(0 < value < 1 for value in scored.decision.scores.values)


def test_the_baseline_of_equal_size_states_both_sizes_and_a_shape_its_name(tmp_path, tiny_overrides):
    shape = ["allocator=shape", "allocator.shape=[1,3,2]", "allocator.budget=6", "method=lora_equal"]
    record = run_layerif([*tiny_overrides, *shape], tmp_path)
    assert record.decision.source == "shape(1-3-2)"
    assert record.decision.scores is None
    assert record.decision.allocation.values == [1, 3, 2]
    assert record.parameters["trainable"] == pytest.approx(record.parameters["lora_moe"], rel=0.05)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
