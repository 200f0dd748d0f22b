"""Training some layers alone: the others do not change, and nothing runs backward below the lowest one."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from layerif.adapt.adapters import EqualLoraAdapter, LoraAdapter, LoraMoeAdapter
from layerif.adapt.data import TaskDataModule
from layerif.adapt.full import FullTuning
from layerif.adapt.kinds import tuning_of
from layerif.adapt.module import AdapterModule
from layerif.adapt.sizes import adapted_shapes, num_parameters
from layerif.adapt.tuning import Tuning
from layerif.allocate.allocation import Allocation
from layerif.models.blocks import blocks
from layerif.models.pretrained import LocalModel
from layerif.scores import AllocationKind
from tests.tiny import shipped_task, tiny_model

LEARNING = {"learning_rate": 0.01, "seed": 1}
FULL = partial(FullTuning, **LEARNING)


def allocation(*values: int, kind: AllocationKind = "layers") -> Allocation:
    return Allocation(tuple(f"model.layers.{l}" for l in range(len(values))), kind, values, sum(values))


@pytest.fixture
def data(task_folder, model_folder):
    splits = shipped_task("jsonl", f"task.path={task_folder}").load()
    return partial(TaskDataModule, splits, LocalModel(path=str(model_folder)).tokenizer(), batch_size=4)


@pytest.fixture
def module(model_folder):
    """Makes a module; nothing is trained yet."""
    model = {"_target_": "layerif.models.pretrained.LocalModel", "path": str(model_folder)}
    return lambda tuning, given=None: AdapterModule(tuning, model, given)


@pytest.fixture
def trained(tmp_path, module, data):
    """Trains for some steps and returns the module."""

    def run(
        tuning: Tuning, given: Allocation, *callbacks: L.Callback, steps: int = 2, folder: str = "run", **fit: Any
    ) -> AdapterModule:
        made = module(tuning, given)
        saving = ModelCheckpoint(
            tmp_path / folder, filename="last", every_n_train_steps=1, enable_version_counter=False
        )
        trainer = L.Trainer(
            max_epochs=-1,
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            callbacks=[saving, *callbacks],
        )
        trainer.fit(made, data(seed=1), **fit)
        return made

    return run


@pytest.fixture
def skeleton():
    with torch.device("meta"):
        return tiny_model("llama", num_hidden_layers=4)


def weights(model: nn.Module | None) -> dict[str, torch.Tensor]:
    assert model is not None
    return {name: weight.detach() for name, weight in model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Adapters on some layers


@pytest.mark.parametrize(
    ("some", "every", "spent"),
    [
        (LoraAdapter(r=3, **LEARNING), LoraAdapter(**LEARNING), allocation(3, 3, 3, kind="rank")),
        (LoraMoeAdapter(num_experts=2, **LEARNING), LoraMoeAdapter(**LEARNING), allocation(2, 2, 2, kind="experts")),
    ],
)
def test_all_layers_equal_the_same_rank_or_experts_everywhere_to_the_bit(trained, some, every, spent):
    found, expected = trained(some, allocation(1, 1, 1)), trained(every, spent)
    assert_equal(weights(found.model), weights(expected.model))
    assert found.model.peft_config["default"].to_dict() == expected.model.peft_config["default"].to_dict()


@pytest.mark.parametrize("tuning", [LoraAdapter(**LEARNING), LoraMoeAdapter(**LEARNING)])
def test_layers_that_are_not_trained_get_no_adapter_and_plain_peft_reloads_the_rest(
    trained, tuning, model_folder, tmp_path
):
    found: Any = trained(tuning, allocation(0, 1, 1)).model
    per_block = {
        name: sum(weight.requires_grad for weight in block.parameters()) for name, block in blocks(found).items()
    }
    assert per_block["model.layers.0"] == 0 < per_block["model.layers.1"] == per_block["model.layers.2"]
    found.save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(LocalModel(path=str(model_folder)).load(), tmp_path / "adapter")
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, found.eval()(ids).logits)


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
@pytest.mark.parametrize("values", [(0, 1, 0, 1), (0, 0, 1, 0), (1, 1, 1, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize(
    "tuning", [LoraAdapter, partial(LoraAdapter, r=5), LoraMoeAdapter, partial(LoraMoeAdapter, num_experts=1, r=2)]
)
def test_equal_parameters_are_those_of_all_layers_within_half_a_step(skeleton, tuning, values, targets):
    made = tuning(equal_parameters=True, target_modules=targets)
    shapes = adapted_shapes(skeleton, targets)
    wanted = made.compared(skeleton, allocation(*values))["all_layers"]
    everywhere = tuning(target_modules=targets).capacities(skeleton, allocation(1, 1, 1, 1))
    assert wanted == num_parameters(shapes, everywhere)
    capacities = made.capacities(skeleton, allocation(*values))
    found = num_parameters(shapes, capacities)
    grows = "experts" if isinstance(made, LoraMoeAdapter) else "rank"
    counts = {block: getattr(capacities[block], grows) for block in allocation(*values).units}
    of_trained = [count for block, count in counts.items() if allocation(*values).by_name()[block]]
    assert sum(of_trained) == sum(counts.values())
    assert max(of_trained) - min(of_trained) <= 1
    steps = [
        num_parameters(shapes, {**capacities, block: capacities[block]._replace(**{grows: count + 1})}) - found
        for block, count in counts.items()
        if count
    ]
    assert abs(found - wanted) <= max(steps) / 2
    if made.r != 2:  # ranks, and experts with routers everywhere, come out exactly where the layers are alike
        assert found == wanted


def test_the_count_of_equal_parameters_is_that_of_the_adapter(module):
    made = module(LoraAdapter(r=5, equal_parameters=True), allocation(0, 1, 1))
    made.configure_model()
    trained = sum(weight.numel() for weight in made.model.parameters() if weight.requires_grad)
    assert made.compared == {"all_layers": trained}
    ranks = [layer.r["default"] for layer in made.model.modules() if isinstance(layer, LoraLayer)]
    assert ranks == [8] * 7 + [7] * 7  # of 15


def test_the_default_of_a_trained_layer_is_rank_8_or_5_experts(skeleton):
    values = allocation(0, 1, 0, 1)
    assert [tuple(each) for each in LoraAdapter().capacities(skeleton, values).values()] == [(1, 0), (1, 8)] * 2
    assert [each.experts for each in LoraMoeAdapter().capacities(skeleton, values).values()] == [0, 5] * 2


@pytest.mark.parametrize(
    ("tuning", "values", "message"),
    [
        (
            LoraAdapter(r=4),
            allocation(8, 8, 8, 8, kind="rank"),
            r"^method\.r=4 is for allocator=layers, and this allo.*",
        ),
        (
            LoraAdapter(equal_parameters=True),
            allocation(8, 8, 8, 8, kind="rank"),
            r"^method\.equal_parameters=true is for allocator=layers, and this allocation of rank says .*; leave",
        ),
        (
            LoraMoeAdapter(equal_parameters=True),
            allocation(2, 2, 2, 2, kind="experts"),
            r"^method\.equal_parameters=true is for allocator=layers, and this allocation of experts",
        ),
        (
            LoraMoeAdapter(num_experts=3),
            allocation(2, 2, 2, 2, kind="experts"),
            r"^method\.num_experts=3 is for allocator=layers",
        ),
        (LoraAdapter(), allocation(0, 0, 0, 0), r"^the allocation trains none of 4 layers; give at least one"),
        (LoraMoeAdapter(), allocation(0, 0, 0, 0), r"^the allocation trains none of 4 layers"),
        (LoraAdapter(), allocation(1, 1), r"2 of 4 blocks have no value, the first is 'model\.layers\.2'"),
        (LoraAdapter(r=100), allocation(0, 1, 0, 1), r"^a rank of 100 is more than .*; lower method\.r, or name fewer"),
        (
            LoraAdapter(equal_parameters=True),
            allocation(0, 1, 0, 0),
            r"^a rank of 32 is more than model\.layers\.1\.self_attn\.k_proj .*; lower method\.r, or name fewer",
        ),
        (
            LoraAdapter(target_modules=["q_proj", "lm_head"], equal_parameters=True),
            allocation(0, 1, 0, 0),
            r"method\.target_modules names lm_head, which is outside them; leave that out, or use",
        ),
    ],
)
def test_what_does_not_fit_layers_is_refused_by_name(skeleton, tuning, values, message):
    with pytest.raises(ValueError, match=message):
        tuning.check_fits(skeleton, values)


def test_a_recovery_names_its_own_settings(skeleton):
    values = allocation(1, 1, 1, 1, kind="experts")
    for settings in ({"num_experts": 3}, {"equal_parameters": True}):
        with pytest.raises(ValueError, match=rf"^method\.adapter\.{next(iter(settings))}=.*; leave method\.adapter\."):
            LoraMoeAdapter(**settings).check_fits(skeleton, values, where="method.adapter")


def test_the_advice_for_too_many_experts_names_the_settings_of_layers(skeleton):
    with pytest.raises(ValueError, match=r"; lower method\.r or method\.num_experts, or name fewer layers in"):
        LoraMoeAdapter(num_experts=10**9).check_fits(skeleton, allocation(0, 1, 0, 1), free=1e9)


# Full fine-tuning of some layers


def test_only_the_chosen_layers_change_and_all_others_keep_every_bit(trained, model_folder):
    before = weights(LocalModel(path=str(model_folder)).load())
    found: Any = trained(FULL(), allocation(0, 1, 0)).model
    after = weights(found)
    for name, value in before.items():
        assert torch.equal(after[name], value) != name.startswith("model.layers.1."), name
    assert not found.training


def test_resume_equals_uninterrupted_bit_for_bit(trained, tmp_path):
    class StopAt(L.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == 4:
                raise SystemExit

    given = allocation(1, 0, 1)
    whole = trained(FULL(), given, steps=7, folder="whole")
    with pytest.raises(SystemExit):
        trained(FULL(), given, StopAt(), steps=7, folder="killed")
    torch.manual_seed(99)  # the result must not depend on the generator's state in a fresh process
    last = str(tmp_path / "killed" / "last.ckpt")
    resumed = trained(FULL(), given, steps=7, folder="resumed", ckpt_path=last)
    assert_equal(weights(resumed.model), weights(whole.model))


def test_a_checkpoint_holds_the_chosen_layers_alone_and_loads_without_help(trained, tmp_path):
    made = trained(FULL(), allocation(0, 0, 1))
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert saved["state_dict"]
    assert all(name.startswith("model.layers.2.") for name in saved["state_dict"])
    loaded = AdapterModule.load_from_checkpoint(tmp_path / "run" / "last.ckpt", map_location="cpu")
    assert loaded.allocation == allocation(0, 0, 1)
    assert loaded.tuning == FULL()
    assert_equal(weights(loaded.model), weights(made.model))


def test_weights_of_a_checkpoint_bring_their_layers(trained, module, tmp_path):
    first = trained(FULL(), allocation(0, 0, 1))
    other = module(FULL(), allocation(1, 1, 0))
    other.configure_model()
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.add_(1.0)  # as if it had been trained
    other.on_load_checkpoint(torch.load(tmp_path / "run" / "last.ckpt", weights_only=True))
    assert other.allocation == allocation(0, 0, 1)
    assert_equal(weights(other.model), weights(first.model))
    trainable = [name for name, weight in other.model.named_parameters() if weight.requires_grad]
    assert all(name.startswith("model.layers.2.") for name in trainable)


def test_weights_of_other_layers_are_refused(module):
    made = module(FULL(), allocation(0, 0, 1))
    made.configure_model()
    held = FULL().trained(made.model)
    held.pop("model.layers.2.mlp.up_proj.weight")
    with pytest.raises(
        ValueError, match=r"the checkpoint is of another model: .* first .*'model\.layers\.2\.mlp\.up_p"
    ):
        FULL().restore(made.model, held)


@pytest.mark.parametrize("kind", [LoraAdapter, LoraMoeAdapter, EqualLoraAdapter, FullTuning])
def test_every_kind_comes_back_from_what_a_checkpoint_holds_of_it(kind):
    settings = kind(learning_rate=0.25, seed=3)
    assert tuning_of(settings.saved()) == settings


def test_full_fine_tuning_is_not_of_a_model_under_an_adapter(model_folder):
    model = {"_target_": "layerif.models.pretrained.LocalModel", "path": str(model_folder), "adapter": "/adapter"}
    with pytest.raises(ValueError, match=r"^fine-tuning cannot build on model\.adapter='/adapter'; merge that adapter"):
        AdapterModule(FULL(), model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision_are_not_trained_themselves(model_folder, dtype):
    skeleton = LocalModel(path=str(model_folder), dtype=dtype).skeleton()
    message = rf"^method=full .* model\.dtype={dtype} would round .*; use model\.dtype=float32"
    with pytest.raises(ValueError, match=message):
        FullTuning().check_fits(skeleton, allocation(0, 1, 1))


def test_layers_that_no_memory_can_hold_are_refused_with_the_numbers(skeleton):
    trained = sum(weight.numel() for block in list(blocks(skeleton).values())[:2] for weight in block.parameters())
    with pytest.raises(
        ValueError, match=rf"^2 layers to train would have {trained:,} parameters, .*; lower allocator\."
    ):
        FullTuning().check_fits(skeleton, allocation(1, 1, 0, 0), free=16 * trained - 1)
    FullTuning().check_fits(skeleton, allocation(1, 1, 0, 0), free=16 * trained)


# The backward pass


class Backward(L.Callback):
    """Counts how often the gradient of each block's output and input is computed."""

    def __init__(self) -> None:
        self.of_output, self.of_input = Counter(), Counter()

    def on_train_start(self, trainer, pl_module: Any) -> None:
        for name, block in blocks(pl_module.model).items():
            block.register_full_backward_pre_hook(lambda *_, name=name: self.of_output.update([name]))
            block.register_forward_pre_hook(partial(self._watch, name), with_kwargs=True)

    def _watch(self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.of_input.update([name]))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tuning", [LoraAdapter, LoraMoeAdapter, FullTuning])
def test_nothing_runs_backward_below_the_lowest_trained_layer(trained, tuning, checkpointing):
    counted, steps = Backward(), 2
    trained(tuning(**LEARNING, gradient_checkpointing=checkpointing), allocation(0, 1, 0), counted, steps=steps)
    assert counted.of_output == {"model.layers.1": steps, "model.layers.2": steps}
    assert counted.of_input == {"model.layers.2": steps}


@pytest.mark.parametrize("tuning", [LoraAdapter, FullTuning])
def test_only_blocks_from_the_lowest_trained_layer_on_keep_anything_for_a_backward_pass(module, data, tuning):
    made: Any = module(tuning(**LEARNING), allocation(0, 0, 1))
    made.configure_model()
    batch = next(iter(data().train_dataloader()))
    kept: Counter[str] = Counter()
    running: list[str] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[running[-1] if running else "outside"] += 1
        return tensor

    for name, block in blocks(made.model).items():
        block.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        block.register_forward_hook(lambda *_: running.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert kept["model.layers.2"] > 0
    assert kept["model.layers.0"] == kept["model.layers.1"] == 0
