"""`transformers.Trainer` and TRL's `SFTTrainer` train adapters as Lightning does, and get them by the scores."""

from __future__ import annotations

import json
import warnings
from random import Random
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

import layerif
from layerif.adapt import huggingface
from layerif.adapt.adapters import LoraAdapter, LoraMoeAdapter
from layerif.adapt.module import AdapterModule
from layerif.allocate.allocation import Allocation
from layerif.models.pretrained import LocalModel
from layerif.moe import LoraMoeConfig, balance_loss
from layerif.moe.lora import lora_of_ranks
from tests.tiny import tiny_model, tiny_tokenizer

EXPERTS = Allocation(tuple(f"model.layers.{number}" for number in range(3)), "experts", (1, 3, 2), 6)
MOE = LoraMoeAdapter(r=2, lora_dropout=0.0, balance_coefficient=0.5, warmup_ratio=0.0)


def ids_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 200, (length,), generator=generator) for length in lengths]


def shake(model: nn.Module) -> None:
    """Gives the adapter random weights: at the start B is zero, and hides everything but the routers."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.partition("base_model.")[2]: value.grad.clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


class Seen(TrainerCallback):
    """Keeps the gradients of every step of the optimiser."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, *, model: Any = None, **_: Any) -> None:
        self.steps.append(gradients_of(model))


class SeenByLightning(L.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module: Any, optimizer) -> None:
        self.steps.append(gradients_of(pl_module.model))


def settings(folder, **further: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": MOE.learning_rate,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **further,
    }


def by_trainer(folder, model: Any, rows: list[Tensor], **further: Any) -> list[dict[str, Tensor]]:
    seen = Seen()
    data: Any = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    Trainer(model, TrainingArguments(**settings(folder, **further)), train_dataset=data, callbacks=[seen]).train()
    return seen.steps


def by_trl(folder, model: Any, rows: list[Tensor], config: Any = None, **further: Any) -> list[dict[str, Tensor]]:
    trl = pytest.importorskip("trl", reason="the extra `dev` brings trl")
    from datasets import Dataset

    seen = Seen()
    asked = trl.SFTConfig(**settings(folder, **further), bf16=False, max_length=None)
    data = Dataset.from_list([{"input_ids": row.tolist()} for row in rows])
    trainer = trl.SFTTrainer(
        model, asked, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=[seen], peft_config=config
    )
    trainer.train()
    return seen.steps


def by_lightning(folder, model_folder, rows: list[Tensor], *, accumulate: int, checkpointing: bool):
    seen = SeenByLightning()
    tuning = LoraMoeAdapter(**{**vars(MOE), "gradient_checkpointing": checkpointing})
    module = AdapterModule(tuning, {"_target_": "layerif.models.pretrained.LocalModel", "path": str(model_folder)})
    module.allocation = EXPERTS
    module.configure_model()
    shake(module)
    batches: Any = DataLoader([{"input_ids": r, "labels": r, "attention_mask": torch.ones_like(r)} for r in rows], 2)  # type: ignore[arg-type]
    L.Trainer(
        max_steps=2,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[seen],
    ).fit(module, batches)
    assert module.model is not None
    return seen.steps, get_peft_model_state_dict(module.model)


def adapted(model_folder) -> PeftModel:
    model: Any = MOE.put_on(LocalModel(path=str(model_folder)).load(), EXPERTS)
    shake(model)
    return model


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-3 * float(value.norm()) + 1e-9, name


@pytest.mark.parametrize(("accumulate", "checkpointing"), [(1, False), (2, True)])
@pytest.mark.parametrize("by", [by_trainer, by_trl])
@pytest.mark.filterwarnings("error:balance_coefficient")
def test_experts_and_their_balance_are_trained_as_lightning_does(tmp_path, model_folder, by, accumulate, checkpointing):
    rows = ids_of(*[12] * 8)
    expected, weights = by_lightning(tmp_path, model_folder, rows, accumulate=accumulate, checkpointing=checkpointing)
    asked = {"gradient_accumulation_steps": accumulate, "gradient_checkpointing": checkpointing}
    if checkpointing:
        asked["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    model = adapted(model_folder)
    found = by(tmp_path, model, rows, **asked)
    assert any("router" in name for name in expected[0])
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)
    assert_close(get_peft_model_state_dict(model), weights)


@pytest.mark.parametrize("by", [by_trainer, by_trl])
def test_a_batch_of_more_tokens_has_more_of_the_balance_loss(tmp_path, model_folder, by):
    """Both trainers weigh tokens alike over the batches of a step, and the balance loss follows."""
    rows = ids_of(5, 14)
    (found,) = by(
        tmp_path,
        adapted(model_folder),
        rows,
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    model = adapted(model_folder)
    for row in rows:
        loss = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None]).mean().neg()
        ((loss + 0.5 * balance_loss(model)) * (len(row) - 1) / (4 + 13)).backward()
    assert_close(found, gradients_of(model))


@pytest.mark.filterwarnings("ignore:balance_coefficient")  # nothing goes backward here
def test_the_own_loss_has_the_balance_loss_once():
    model: Any = get_peft_model(tiny_model(), LoraMoeConfig(num_experts=3, balance_coefficient=0.5, lora_dropout=0.0))  # type: ignore[arg-type]
    (row,) = ids_of(9)
    batch = {"input_ids": row[None], "labels": row[None]}
    with torch.no_grad():
        plain = model(**batch).loss
    output = model(**batch)
    term = balance_loss(model)
    assert not term.requires_grad  # so that a loop that adds it, too, trains it once
    assert float(output.loss.detach()) == pytest.approx(float(plain + 0.5 * term), rel=1e-6)
    first, *_ = model(**batch, return_dict=False)
    assert float(first.detach()) == pytest.approx(float(output.loss.detach()), rel=1e-6)
    model.requires_grad_(False)
    assert float(model(**batch).loss) == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize("by", [by_trainer, by_trl])
def test_a_loss_that_leaves_the_balance_loss_out_is_announced(tmp_path, model_folder, by):
    with pytest.warns(UserWarning, match="balance_coefficient is above 0 but the last training step left .* out"):
        by(tmp_path, adapted(model_folder), ids_of(*[8] * 4), label_smoothing_factor=0.1)


def test_a_loss_that_weighs_tokens_differently_is_refused(tmp_path, model_folder):
    with pytest.raises(ValueError, match="the balance loss cannot be part of a loss that weighs tokens differently"):
        by_trl(tmp_path, adapted(model_folder), ids_of(*[8] * 4), loss_type="dft")


@pytest.mark.parametrize("by", [by_trainer, by_trl])
def test_ranks_by_block_are_trained_as_they_are(tmp_path, by):
    """The rank pattern reaches the adapter, and both trainers get the gradients of a plain loop."""
    ranks = {"model.layers.0": 1, "model.layers.1": 4, "model.layers.2": 2}
    config = lora_of_ranks(ranks, ["q_proj", "down_proj"], scaling=2.0, lora_dropout=0.0)
    rows = ids_of(*[10] * 2)
    model: Any = get_peft_model(tiny_model(), config)
    shake(model)
    (found,) = by(tmp_path, model, rows, max_steps=1)
    assert {value.shape[0] for name, value in found.items() if "layers.1" in name and "lora_A" in name} == {4}
    again: Any = get_peft_model(tiny_model(), config)
    shake(again)
    ids = torch.stack(rows)
    again(input_ids=ids, labels=ids).loss.backward()
    assert_close(found, gradients_of(again))


def test_trl_takes_both_configurations_as_its_own(tmp_path):
    lora = LoraAdapter().peft_config(tiny_model(), Allocation(EXPERTS.units, "rank", (1, 3, 2), 6))
    moe = LoraMoeConfig(num_experts=EXPERTS.by_name(), r=2, balance_coefficient=0.01, task_type="CAUSAL_LM")
    for config in (lora, moe):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="balance_coefficient")
            found = by_trl(tmp_path, tiny_model(), ids_of(*[8] * 4), config=config)
        assert len(found) == 2
        assert all(bool(value.isfinite().all()) for value in found[-1].values())
    assert any("router" in name and bool(value.any()) for name, value in found[0].items())


# The callback that decides.


def rows_of(number: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a trainer, each with a column that no model takes and a prompt that the loss leaves out."""
    found = []
    for seed in range(start, start + number):
        ids = torch.randint(3, 200, (7 + seed % 4,), generator=torch.Generator().manual_seed(seed)).tolist()
        found.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "attention_mask": [1] * len(ids), "id": "x"})
    return found


def trainer_of(folder, model: Any = None, *, train: Any = None, held_out: Any = None, **further: Any) -> Trainer:
    from datasets import Dataset

    train = Dataset.from_list(rows_of(12)) if train is None else train
    held_out = Dataset.from_list(rows_of(6, start=100)) if held_out is None else held_out
    arguments = TrainingArguments(**settings(folder, **further))
    collate = DataCollatorForSeq2Seq(tiny_tokenizer())
    return Trainer(model or tiny_model(), arguments, collate, train or None, held_out or None)


@pytest.fixture
def no_doubts():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the scores of the layers")
        yield


@pytest.mark.usefixtures("no_doubts")
def test_the_callback_decides_as_score_does_on_the_same_rows(tmp_path):
    trainer = trainer_of(tmp_path)
    callback = layerif.AllocateCallback(trainer, num_train=8, num_validation=4)
    train, validation = (
        [{name: row[name] for name in ("input_ids", "labels")} for row in rows_of(12, start)] for start in (0, 100)
    )
    chosen = chosen_rows(train, "train_dataset", 8), chosen_rows(validation[:6], "eval_dataset", 4)
    expected = layerif.score(tiny_model(), None, *chosen, seed=42, progress=False)
    assert callback.profile is not None
    assert callback.profile.scores.by_name() == expected.scores.by_name()
    assert callback.allocation is not None
    assert callback.allocation.by_name() == expected.rank().by_name()
    assert trainer.model.peft_config["default"].rank_pattern == expected.lora_config().rank_pattern  # type: ignore[union-attr]


def chosen_rows(rows: list[Any], name: str, number: int) -> list[Any]:
    order = list(range(len(rows)))
    Random(f"42 {name}").shuffle(order)
    return [rows[index] for index in order[:number]]


@pytest.mark.usefixtures("no_doubts")
def test_in_two_lines_a_trainer_trains_what_was_decided_and_keeps_the_decision(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=1, max_steps=2, lr_scheduler_type="constant")
    trainer.add_callback(
        layerif.AllocateCallback(trainer, kind="experts", budget=7, adapter={"balance_coefficient": 0.01})
    )
    trainer.train()
    model: Any = trainer.model
    decided = json.loads((tmp_path / "checkpoint-2" / "decision.json").read_text())
    assert sum(decided["allocation"]["values"]) == 7
    assert model.peft_config["default"].num_experts == Allocation.from_dict(decided["allocation"]).by_name()
    assert any(bool(value.any()) for name, value in model.named_parameters() if "lora_moe_B" in name)

    again = trainer_of(tmp_path, save_strategy="no", max_steps=2, lr_scheduler_type="constant")
    resumed = layerif.AllocateCallback(again, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.profile is None  # nothing is measured twice
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.allocation is not None
    assert_close(get_peft_model_state_dict(again.model), get_peft_model_state_dict(model))  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_doubts")
def test_the_callback_decides_for_trl_by_curves_and_without_an_eval_dataset(tmp_path):
    trl = pytest.importorskip("trl", reason="the extra `dev` brings trl")
    from datasets import Dataset

    texts = [
        {"prompt": f"Question {number}: what is {number}?", "completion": f" It is {number}."} for number in range(9)
    ]
    trainer = trl.SFTTrainer(
        tiny_model(),
        trl.SFTConfig(**settings(tmp_path), bf16=False),
        train_dataset=Dataset.from_list(texts),
        processing_class=tiny_tokenizer(),
    )
    callback = layerif.AllocateCallback(trainer, estimator="gain_curve", budget=2000, num_validation=3)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.allocation is not None
    assert callback.allocation.kind == "rank"
    trained = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
    assert 1900 < trained <= 2000


def with_optimiser(trainer: Trainer) -> None:
    trainer.create_optimizer()


def with_adapter(trainer: Trainer) -> None:
    base: Any = trainer.model
    trainer.model = get_peft_model(base, lora_of_ranks({"model.layers.0": 1}, ["q_proj"], scaling=1, lora_dropout=0))


def without_rows(trainer: Trainer) -> None:
    trainer.train_dataset = None


def with_two_data_sets(trainer: Trainer) -> None:
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}  # type: ignore[assignment]


def with_positions(trainer: Trainer) -> None:
    collate: Any = trainer.data_collator
    trainer.data_collator = lambda rows: {**collate(rows), "position_ids": torch.zeros(1, 3)}


def without_labels(trainer: Trainer) -> None:
    trainer.data_collator = lambda rows: {"input_ids": torch.tensor([rows[0]["input_ids"]])}


@pytest.mark.parametrize(
    ("spoil", "given", "said"),
    [
        (with_optimiser, {}, "the trainer has an optimiser already"),
        (with_adapter, {}, "the trainer's model has an adapter already"),
        (without_rows, {}, "the trainer has no train_dataset"),
        (with_two_data_sets, {}, r"eval_dataset holds 2 data sets \(a, b\)"),
        (with_positions, {}, "the trainer's collator gives position_ids for row 0"),
        (without_labels, {}, "the trainer's collator gives no labels"),
        (None, {"kind": "ranks"}, "kind='ranks' is not allowed.*rank"),
        (None, {"adapter": {"scalling": 2}}, "adapter takes no 'scalling'.*scaling"),
        (None, {"budget": 2}, "budget=2 cannot give 3 layers"),
        (None, {"allocator": {"budget": 9}}, "allocator holds budget=9, which is not allowed there; .* give budget="),
        (None, {"adapter": {"scaling": -1}}, r"adapter\.scaling=-1 is not allowed; allowed: a finite number above 0"),
        (None, {"adapter": {"lora_dropout": 2.0}}, r"adapter\.lora_dropout=2\.0 is not allowed; .* below 1"),
        (None, {"adapter": {"num_experts": 2}}, "adapter holds num_experts=2, .* give kind='experts' and budget="),
        (None, {"kind": "experts", "adapter": {"num_experts": 2}}, "adapter holds num_experts=2, which"),
        (
            None,
            {"kind": "experts", "adapter": {"target_modules": ["q_proj"]}},
            r"adapter holds .* give target_modules=",
        ),
        (None, {"kind": "experts", "adapter": {"top_k": 0}}, r"top_k=0 is not allowed; allowed: a whole number"),
        (None, {"kind": "experts", "adapter": {"layers_to_transform": [0]}}, r"num_experts"),
        (None, {"target_modules": ["q_proj", "k_prj"]}, r"^target_modules holds 'k_prj', .*did you mean 'k_proj'"),
        (None, {"target_modules": "q_proj"}, "target_modules='q_proj' is not allowed; allowed: a list of names"),
        (None, {"target_modules": ["lm_head"]}, "'lm_head', which is not a linear layer of the blocks"),
        (None, {"allocator": {"matrices": "size"}}, "rank"),
        (None, {"estimator": "gain_curve", "budget": 3}, "budget=3"),
        (
            None,
            {"estimator": "gain_curve", "allocator": {"target": 0.5}},
            "allocator holds target=0.5, which .* budget=",
        ),
        (None, {"resume_from_checkpoint": "/nowhere"}, "there is no checkpoint with an adapter"),
    ],
    ids=lambda case: getattr(case, "__name__", None),
)
@pytest.mark.usefixtures("no_doubts")
def test_a_trainer_that_cannot_get_an_adapter_is_refused_in_a_sentence(tmp_path, monkeypatch, spoil, given, said):
    trainer = trainer_of(tmp_path)
    if spoil is not None:
        spoil(trainer)
    for measure in ("score", "curves"):
        monkeypatch.setattr(huggingface, measure, None)  # nothing is measured before
    with pytest.raises(ValueError, match=said):
        layerif.AllocateCallback(trainer, num_train=8, num_validation=4, **given)


def test_what_is_no_trainer_is_refused():
    with pytest.raises(ValueError, match="trainer is a Llama"):
        layerif.AllocateCallback(tiny_model())  # type: ignore[arg-type]


@pytest.mark.parametrize("by", [by_trainer, by_trl])
@pytest.mark.filterwarnings("error:balance_coefficient")
def test_both_train_experts_on_a_base_in_four_bits(tmp_path, model_folder, by):
    pytest.importorskip("bitsandbytes", reason="the extra `quantised` brings bitsandbytes")
    base: Any = LocalModel(path=str(model_folder), quantised="nf4").load()
    config = LoraMoeConfig(num_experts=EXPERTS.by_name(), r=2, balance_coefficient=0.5, task_type="CAUSAL_LM")
    found = by(tmp_path, get_peft_model(base, config), ids_of(*[10] * 4))  # type: ignore[arg-type]
    assert len(found) == 2
    assert all(bool(value.isfinite().all()) for step in found for value in step.values())
    routers = [value for name, value in found[0].items() if "router" in name]  # B is zero: the balance alone moves them
    assert len(routers) == 14
    assert all(bool(value.any()) for value in routers)
