"""The front door: a model in memory, rows of any kind, and the model unharmed."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import layerif
from layerif.data.batches import collate, encode
from layerif.data.render import Example
from layerif.data.rows import example_of
from layerif.data.windows import cut_windows, running_ids
from layerif.estimators.datainf import DataInf
from layerif.models.loss import per_sample_loss
from layerif.scores import LayerScores
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unharmed import assert_unharmed_by

TOKENIZER = tiny_tokenizer()
TEXTS = [
    f"the {noun} runs over the {colour} hill"
    for noun in ["cat", "dog", "cow", "hen", "pig"]
    for colour in ["red", "blue", "old"]
]
TRAIN, VALIDATION = TEXTS[:10], TEXTS[10:]
LONG = " ".join(TEXTS * 20)


def scored(model=None, train=TRAIN, validation=VALIDATION, *, tokenizer: Any = TOKENIZER, **options):
    model = tiny_model() if model is None else model
    return layerif.score(model, tokenizer, train, validation, progress=False, **options)


def batches_of(rows):
    samples: Any = encode(
        [example_of(row, id=str(n), where="row") for n, row in enumerate(rows)],
        TOKENIZER, template="plain", max_length=None, eos=False,
    )  # fmt: skip
    return DataLoader(samples, batch_size=4, collate_fn=lambda some: collate(some, 1, side="left"))


def test_the_scores_are_those_of_the_decider_to_the_bit(decider):
    model = decider.model.load()

    def row(example: Example) -> dict[str, str]:
        return {"prompt": example.instruction, "completion": " " + example.output}

    splits = {part: getattr(decider.splits, part) for part in ("train", "validation")}
    decided = replace(decider, estimator=DataInf(), probe=replace(decider.probe, num_train=20))()
    found = layerif.score(
        model,
        decider.tokenizer,
        [row(example) for example in splits["train"]],
        [row(example) for example in splits["validation"]],
        num_train=20,
        num_validation=4,
        loss_on="all",
        progress=False,
    )
    assert found.scores.values == decided.scores.values
    assert found.reliability == decided.reliability
    assert found.experts(9) == decided.allocation


def test_every_form_of_the_same_rows_gives_the_same_scores():
    ids = [TOKENIZER(text)["input_ids"] for text in TEXTS]
    forms = {
        "mappings": [{"text": text} for text in TEXTS],
        "token ids": [{"input_ids": row} for row in ids],
        "tensors": [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids],
    }
    expected = scored().scores.values
    for name, rows in forms.items():
        tokenizer = TOKENIZER if name == "mappings" else None
        assert scored(train=rows[:10], validation=rows[10:], tokenizer=tokenizer).scores.values == expected, name
    loaded = scored(train=batches_of(TRAIN), validation=iter(list(batches_of(VALIDATION))), tokenizer=None)
    assert loaded.scores.values == pytest.approx(expected, rel=1e-5)


def test_the_model_comes_back_as_it_was():
    assert_unharmed_by(scored)


def test_a_model_in_a_wrapper_of_peft_is_scored_with_its_adapter_and_keeps_it():
    bare = tiny_model()
    expected = scored(bare).scores
    wrapped = get_peft_model(copy.deepcopy(bare), LoraConfig(r=2, target_modules=["q_proj"]))
    assert scored(wrapped).scores.values == pytest.approx(expected.values, rel=1e-5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert scored(wrapped).scores.values != pytest.approx(expected.values, rel=1e-3)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    scored(wrapped, estimator="block_influence")
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


@pytest.mark.parametrize("adapted", [["q_proj", "v_proj"], "all-linear"])
def test_a_model_with_an_adapter_gives_the_same_targets_for_the_next_one(adapted):
    wrapped = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=adapted))
    assert scored(wrapped).target_modules == scored().target_modules
    assert len(scored().target_modules) == 7


def test_a_store_answers_for_the_same_configuration_and_state_of_the_adapter_alone(tmp_path):
    wrapped: Any = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    num_found = []

    def score_it():
        again = [scored(wrapped, estimator="grad_dot", store=tmp_path).scores.values for _ in range(2)]
        assert again[0] == again[1] == scored(wrapped, estimator="grad_dot").scores.values
        num_found.append(len(list(tmp_path.rglob("*.safetensors"))))

    score_it()
    with wrapped.disable_adapter():
        score_it()
    wrapped.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    score_it()
    wrapped.config.sliding_window = 4
    score_it()
    assert num_found == [1, 2, 3, 4]


def test_padded_rows_and_batches_of_arrays_are_read_as_the_rows_themselves():
    batches = [{name: each.numpy() for name, each in batch.items()} for batch in batches_of(TRAIN)]
    expected = scored().scores.values
    assert scored(train=batches).scores.values == pytest.approx(expected, rel=1e-5)
    padded = [
        {name: each[row].tolist() for name, each in batch.items() if name != "labels"}
        for batch in batches_of(TRAIN)
        for row in range(len(batch["input_ids"]))
    ]
    assert scored(train=padded).scores.values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["exact", "grad_dot", "fisher_trace", "uniform", "random", "block_influence", "alpha"])
def test_an_estimator_is_called_by_its_file(name):
    found = scored(estimator=name)
    assert len(found.scores.values) == 3
    assert (found.reliability is None) == (name in ("uniform", "random", "block_influence", "alpha"))


def test_half_precision_is_compared_with_a_copy_and_stays_half():
    model: Any = tiny_model()
    model.to(torch.bfloat16)
    found = scored(model)
    assert model.dtype == torch.bfloat16
    assert len(found.scores.values) == 3


def test_nothing_is_written_without_a_store_and_a_store_answers_the_second_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = scored()
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        assert scored(store=tmp_path / "store").scores.values == first.scores.values
    assert len(list(tmp_path.glob("store/grams/*.safetensors"))) == 1
    changed = tiny_model()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    scored(changed, store=tmp_path / "store")
    assert len(list(tmp_path.glob("store/grams/*.safetensors"))) == 2


def test_a_loss_of_ones_own_is_measured_and_stored_only_under_a_name(tmp_path):
    def doubled(model, batch):
        return 2 * per_sample_loss(model, batch)

    plain, mine = scored(estimator="grad_dot"), scored(estimator="grad_dot", loss=doubled, store=tmp_path)
    assert mine.scores.values == pytest.approx([4 * value for value in plain.scores.values], rel=1e-5)
    assert not list(tmp_path.rglob("*.safetensors"))
    for version in (1, 1, 2):
        named = layerif.loss("doubled", version=version)(doubled)
        assert scored(estimator="grad_dot", loss=named, store=tmp_path).scores.values == mine.scores.values
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_profile_is_a_table_a_frame_a_picture_and_a_file(tmp_path):
    found = scored()
    rows = found.table()
    assert [row["block"] for row in rows] == list(found.scores.layers)
    assert sorted(row["rank"] for row in rows) == [1, 2, 3]
    assert all(row["rank_low"] <= row["rank"] <= row["rank_high"] for row in rows)
    assert found.frame().to_dict("records") == rows
    found.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 1000
    found.save(tmp_path / "profile.json")
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert LayerScores.from_dict(saved) == found.scores
    assert re.search(r"reliability -?\d\.\d\d \(rank correlation of two halves\); 10 \+ 5 samples", str(found))
    assert "warning: 10 + 5 samples are few" in str(found)


def test_low_reliability_is_a_warning():
    found = replace(scored(), reliability=0.2, num_samples=(300, 50))
    assert [warning.partition(":")[0] for warning in found.warnings] == ["the reliability is 0.20"]
    assert replace(found, reliability=0.9).warnings == ()


def test_configurations_of_adapters_spend_the_budget_on_the_model():
    model, found = tiny_model(), scored()
    ranks = found.rank(12)
    config = found.lora_config(12)
    adapted = get_peft_model(copy.deepcopy(model), config)
    held = {}
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            block = next(block for block in found.scores.layers if name.startswith(f"{block}."))
            held.setdefault(block, set()).add(module.lora_A["default"].out_features)
            assert module.scaling["default"] == pytest.approx(2.0)
    assert held == {block: {rank} for block, rank in ranks.by_name().items()}
    moe = get_peft_model(copy.deepcopy(model), found.moe_config(9, r=2))
    assert sum(found.experts(9).values) == 9
    assert any("lora_moe" in name for name, _ in moe.named_parameters())
    assert found.lora_config(12, target_modules="all-linear").target_modules == "all-linear"
    for ask in (found.rank, found.lora_config):
        with pytest.raises(ValueError, match=r"takes no 'betaa' \(did you mean 'beta'\?\)"):
            ask(12, betaa=2)


def test_pruning_reaches_its_target_in_place_and_by_any_form_of_it():
    found = scored()
    for given in (0.5, found.sparsity(0.5), dict.fromkeys(found.scores.layers, 0.5)):
        model = tiny_model()
        assert layerif.prune(model, TOKENIZER, given, calibration=TEXTS, window=16, progress=False) is model
        weights = [model.get_parameter(param) for param in found.layers.matrices]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert zeros == round(0.5 * sum(weight.numel() for weight in weights))
    by_size = layerif.prune(tiny_model(), None, 0.5, pruner="magnitude", progress=False)
    assert int((by_size.model.layers[0].mlp.up_proj.weight == 0).sum()) > 0


def test_pruning_equals_the_command_lines_for_the_same_text(tmp_path, tiny_overrides, model_folder):
    from transformers import AutoModelForCausalLM

    from tests.command import run_layerif

    texts = [f"{text} and then the {number} sheep follow" for number, text in enumerate(TEXTS * 3)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    chosen = ["method.calibration.num_windows=4", "method.calibration.window=32", "method.calibration.seed=0"]
    run_layerif(
        [*tiny_overrides, "method=prune", "estimator=uniform", "allocator=sparsity", "allocator.smoothing=false",
         f"method.calibration.text={tmp_path / 'text.jsonl'}", *chosen],
        tmp_path,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(next((tmp_path / "run").glob("*/config.json")).parent)
    ours = AutoModelForCausalLM.from_pretrained(model_folder)
    layerif.prune(ours, TOKENIZER, 0.5, calibration=texts, num_windows=4, window=32, progress=False)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name


@pytest.mark.parametrize("bos", ["tokenizer", "first", "none"])
def test_calibration_windows_of_texts_begin_with_bos_as_asked(bos):
    tokenizer = tiny_tokenizer(bos=True)
    ids, lead = running_ids(tokenizer, "\n\n".join(TEXTS), bos)
    windows = [{"input_ids": list(each)} for each in cut_windows(ids, 16, lead)]
    by_texts, by_ids = (
        layerif.prune(tiny_model(), given, 0.5, calibration=rows, window=16, bos=bos, progress=False)
        for given, rows in ((tokenizer, TEXTS), (None, windows))
    )
    for name, weight in by_texts.state_dict().items():
        assert torch.equal(weight, by_ids.state_dict()[name]), name


def by_row(model, batch):
    rows = range(len(batch["input_ids"]))
    return torch.cat([per_sample_loss(model, {name: each[row, None] for name, each in batch.items()}) for row in rows])


def nan_model():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": []}, "train holds no row"),
        ({"train": iter(())}, "an iterator that was read before is empty"),
        ({"train": "a text"}, "train is a str; it must be a list of rows"),
        ({"train": ["a b c", ""]}, "train row 1: the text is empty"),
        ({"validation": TRAIN[2:3]}, "1 of 1 validation rows ask the same as train rows"),
        ({"train": [{"messages": [{"role": "user", "content": "a"}]}]}, "the tokenizer has none"),
        ({"train": [{"input_ids": [3, 999]}], "tokenizer": None, "validation": [{"input_ids": [4, 5]}]},
         "train 0: the token id 999 is beyond the vocabulary"),
        ({"train": [{"input_ids": [3, 4], "labels": [-100, -100]}]}, "none of its 2 tokens counts"),
        ({"train": [{"input_ids": torch.ones(2, 3), "pixel_values": 1}]}, "a batch of train holds pixel_values"),
        ({"estimator": "datainv"}, "did you mean 'datainf'"),
        ({"estimator": "tracin"}, "estimator='tracin' needs settings of its own"),
        ({"estimator": "alpha", "loss": per_sample_loss}, "measures no loss of yours"),
        ({"loss": lambda model, batch: per_sample_loss(model, batch).mean()}, "the loss gave shape () for 8 samples"),
        ({"loss": lambda model, batch: per_sample_loss(model, batch).detach()}, "the loss gave numbers without"),
        ({"loss": lambda model, batch: per_sample_loss(model, batch) * float("inf")}, "is not finite"),
        ({"loss": lambda model, batch: per_sample_loss(model, batch) + per_sample_loss(model, batch)},
         "the loss ran the model more than once; call it once for the whole batch"),
        ({"loss": lambda model, batch: by_row(model, batch)}, "call it once for the whole batch"),
        ({"loss": lambda model, batch: torch.ones(len(batch["input_ids"]), requires_grad=True)},
         "the loss does not depend on any measured matrix"),
        ({"loss": "mean"}, "loss is 'mean'; give a function"),
        ({"estimator": "loss_curve"}, "gives curves, not scores; use layerif.curves"),
        ({"estimator": "measured_loss"}, "gives curves, not scores; use layerif.curves"),
        ({"estimator": None}, "estimator is a NoneType; give the name of one"),
        ({"estimator": DataInf}, "estimator is the class DataInf; give the name of one"),
        ({"tokenizer": "gpt2"}, "tokenizer is a str; give one of transformers, as from AutoTokenizer"),
        ({"store": __file__}, "is a file; give a folder"),
        ({"train": pd.DataFrame({"text": TRAIN})}, "its rows are frame.to_dict('records')"),
        ({"train": [LONG], "max_length": 600}, "train 0 has 600 tokens, and the model reads at most 512; use"),
        ({"validation": [f"{TRAIN[0]} and more"], "max_length": 5},
         "1 of 1 validation rows have the same token ids as train rows, as the model reads them, cut at max_length=5 "
         "(the first: validation 0 and train 0)"),
        ({"num_train": 0}, "num_train=0 is not allowed"),
        ({"memory_gb": 1e-9}, "memory_gb"),
        ({"model": torch.nn.Linear(2, 2)}, "the model is a Linear; give a causal language model"),
        ({"model": tiny_model().model}, "which has no head that predicts the next token"),
        ({"model": torch.nn.Module.to(copy.deepcopy(tiny_model()), "meta")}, "the model is on the meta device"),
        ({"model": nan_model()}, "is not finite, from block model.layers.1 on"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_one_clear_error_and_harms_no_model(options, said):
    model = options.pop("model", None) or tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items() if not value.is_meta}
    with pytest.raises(ValueError, match=re.escape(said)):
        scored(model, **options)
    assert all(torch.equal(model.state_dict()[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"allocation": 1.5}, "target=1.5 is not allowed"),
        ({"allocation": {"model.layers.9": 0.5}}, "'model.layers.9'"),
        ({"calibration": []}, "calibration holds no row"),
        ({"calibration": TEXTS[:1], "window": 256}, "0 windows of 256; one is needed: use a shorter window"),
        ({"window": 5000}, "the model reads at most 512 tokens"),
        ({"bos": "frist"}, "bos='frist' is not allowed; allowed: tokenizer, first, none (did you mean 'first'?)"),
        ({"pruner": "wonda"}, "did you mean 'wanda'"),
        ({"batch_size": 0}, "batch_size=0 is not allowed; allowed: a whole number of at least 1"),
        ({"model": nan_model(), "pruner": "magnitude"}, "model.layers.1.mlp.up_proj.weight holds values that are not"),
    ],
)
def test_what_cannot_be_pruned_is_one_clear_error(options, said):
    model = options.pop("model", None) or tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = options.pop("allocation", 0.5)
    with pytest.raises(ValueError, match=re.escape(said)):
        layerif.prune(model, TOKENIZER, given, **{"calibration": TEXTS, "window": 16, "progress": False} | options)
    assert all(torch.equal(model.state_dict()[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


def test_a_model_with_an_adapter_and_an_allocation_of_experts_are_not_pruned():
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge it first"):
        layerif.prune(adapted, TOKENIZER, 0.5, calibration=TEXTS, progress=False)
    with pytest.raises(ValueError, match=r"the allocation is of experts; pruning needs one of sparsity"):
        layerif.prune(tiny_model(), TOKENIZER, scored().experts(9), calibration=TEXTS, progress=False)


def test_the_light_road_imports_no_laboratory():
    heavy = [
        "hydra",
        "omegaconf",
        "lightning",
        "wandb",
        "datasets",
        "pandas",
        "statsmodels",
        "matplotlib",
        "rich",
        "pydantic",
        "sklearn",
    ]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({heavy!r}))  # an import of one of them fails
import layerif
assert "torch" not in sys.modules
from layerif import Allocation, LoraMoeConfig, Profile, loss, prune, score
import layerif.estimators.datainf, layerif.pruning.wanda
assert sorted(layerif.__all__) == [name for name in dir(layerif) if name in layerif.__all__]
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes))
texts = [{{"input_ids": [(7 * row + 3 * token) % 32 for token in range(8)]}} for row in range(4)]
allocation = layerif.curves(model, None, texts, window=8, progress=False).allocate(0.5)
layerif.prune(model, None, allocation, calibration=texts, window=8, progress=False)
assert sum(int((linear.weight == 0).sum()) for linear in model.model.layers.modules() if hasattr(linear, "in_features"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_extra_is_named_with_the_command_that_brings_it(monkeypatch, tmp_path):
    found = scored()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"this needs pandas, which is not installed: pip install 'layerif\[lab\]'"):
        found.frame()
    with pytest.raises(AttributeError, match="has no attribute 'scroe'; it has"):
        layerif.scroe  # noqa: B018


def test_rows_of_a_data_set_are_mappings():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": text} for text in TRAIN])
    assert scored(train=rows).scores == scored().scores


def test_smaller_choices_are_parts_of_larger_ones():
    few = scored(num_train=4, num_validation=3)
    assert few.num_samples == (4, 3)
    assert not np.allclose(few.scores.values, scored().scores.values)
