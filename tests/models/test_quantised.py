"""Quantised models: measured as the linear layers that they are, trained under adapters, and refused by name."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import layerif
from layerif.adapt.adapters import LoraAdapter
from layerif.allocate.allocation import Allocation
from layerif.allocate.rank import Rank
from layerif.decide import Decider
from layerif.estimators.datainf import DataInf
from layerif.models.blocks import dtype_of, layer_map, weight_of
from layerif.models.pretrained import LocalModel
from layerif.models.quantised import compute_in, is_packed, num_unpacked, weight_in
from layerif.moe import LoraMoeConfig
from layerif.probe.settings import Probe
from layerif.probe.store import Unstored
from layerif.pruning.targets import matrices
from tests.tiny import shipped_task, tiny_model, tiny_tokenizer

pytest.importorskip("bitsandbytes", reason="the extra `quantised` brings bitsandbytes")

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "attn_implementation": "sdpa"}
ROWS = [
    {"input_ids": torch.randint(3, 200, (7 + seed % 5,), generator=torch.Generator().manual_seed(seed)).tolist()}
    for seed in range(18)
]
FORMATS = ("nf4", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("wide")
    tiny_model(**SIZES).save_pretrained(found)
    tiny_tokenizer().save_pretrained(found)
    return found


@pytest.fixture(scope="module", params=FORMATS)
def quantised(folder, request) -> Any:
    return LocalModel(path=str(folder), quantised=request.param).load()


def dense(model: nn.Module) -> Any:
    """The same model with linear layers that hold the dequantised weights."""
    found = copy.deepcopy(model)
    for name, module in list(found.named_modules()):
        if is_packed(module):
            weight_OI = weight_in(module).clone().float()
            linear = nn.Linear(*weight_OI.T.shape, bias=False)
            linear.weight.data = weight_OI
            holder, _, own = name.rpartition(".")
            setattr(found.get_submodule(holder), own, linear)
    return found.requires_grad_(False)


def scheme_of(model: Any) -> str:
    return "nf4" if model.config.quantization_config.load_in_4bit else "int8"


def scored(model: Any, **settings: Any) -> Any:
    return layerif.score(model, None, ROWS[:12], ROWS[12:], progress=False, **settings)


def assert_alike(first: Any, second: Any, rel: float = 1e-4) -> None:
    assert list(first) == pytest.approx(list(second), rel=rel)


def test_shapes_and_types_are_those_of_the_weights_and_not_of_their_packing(quantised, folder):
    plain = LocalModel(path=str(folder)).load()
    assert layer_map(quantised, scope="all") == layer_map(plain, scope="all")
    for param in layer_map(quantised, scope="all").matrices:
        assert dtype_of(quantised, param) == torch.float32  # factors are sent between processes in it
        error = (weight_of(quantised, param) - weight_of(plain, param)).norm() / weight_of(plain, param).norm()
        assert 0 < float(error.detach()) < 0.15


@pytest.mark.parametrize("kind", ["bare", "lora", "experts"])
def test_parameters_are_counted_as_those_of_the_weights_before(quantised, folder, kind):
    counts = []
    for base in (copy.deepcopy(quantised), LocalModel(path=str(folder)).load()):
        model: Any = base
        if kind != "bare":
            model = get_peft_model(model, LoraMoeConfig(num_experts=2) if kind == "experts" else LoraConfig(r=3))  # type: ignore[arg-type]
        counts.append(num_unpacked(model))
    assert counts == [sum(each.numel() for each in model.parameters())] * 2  # the last one is dense


@pytest.mark.parametrize("estimator", ["datainf", "ekfac", "alpha", "outlier", "lsa", "block_influence"])
def test_scores_are_those_of_linear_layers_with_the_dequantised_weights(quantised, estimator):
    settings = {"scope": "all"} if estimator == "datainf" else {}
    found, expected = (scored(model, estimator=estimator, **settings).scores for model in (quantised, dense(quantised)))
    assert_alike(found.values, expected.values, rel=1e-3)


def test_no_score_depends_on_the_batch(quantised):
    assert_alike(scored(quantised, batch_size=1).scores.values, scored(quantised, batch_size=12).scores.values)


@pytest.mark.parametrize("scheme", FORMATS)
def test_no_score_of_a_model_that_transformers_loaded_depends_on_the_batch(folder, scheme):
    """The forward of bitsandbytes quantises inputs of 8-bit layers by the largest values of the whole batch."""
    kinds = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}
    config = BitsAndBytesConfig(**kinds[scheme])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    before = {name: type(module) for name, module in model.named_modules()}
    found, expected = (scored(model, batch_size=size).scores.values for size in (1, 12))
    assert_alike(found, expected)
    assert_alike(found, scored(dense(model)).scores.values, rel=1e-3)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_gain_curves_are_those_of_linear_layers_with_the_dequantised_weights(quantised):
    found, expected = (
        layerif.curves(model, None, ROWS[:12], rows=ROWS[12:], kind="rank", progress=False)
        for model in (quantised, dense(quantised))
    )
    torch.testing.assert_close(found.costs, expected.costs, rtol=1e-3, atol=1e-6)


def test_the_model_comes_back_as_it_was_and_says_what_it_is(quantised):
    before = {name: value.clone() for name, value in quantised.state_dict().items()}
    profile = scored(quantised)
    assert profile.notes == (
        f"probed in {scheme_of(quantised)} weights; not compared with exact float32 (the weights as they were before "
        "they were quantised are not there)",
    )
    for name, value in quantised.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_forward_that_repacks_weights_for_the_processor_takes_no_gradient_away(folder):
    """bitsandbytes repacks 4-bit weights in evaluation mode on some processors, and gives no gradient after that."""
    model: Any = LocalModel(path=str(folder), quantised="nf4").load()
    repacks = importlib.import_module("bitsandbytes").functional.has_avx512bf16()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = repacks
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5, 6]]))
    assert_alike(scored(model).scores.values, scored(dense(model)).scores.values, rel=1e-3)


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_decision_says_how_scores_rank_against_the_model_before(folder, task_folder, scheme):
    model = LocalModel(path=str(folder), quantised=scheme)
    decider = Decider(
        model=model,
        tokenizer=model.tokenizer(),
        splits=shipped_task("jsonl", f"task.path={task_folder}").load(),
        probe=Probe(num_train=8, num_validation=4, fidelity_samples=6),
        estimator=DataInf(),
        allocator=Rank(budget=12),
        store=Unstored(),
    )
    decision = decider()
    assert decision.fidelity is not None
    assert decision.fidelity["train"] == 6
    assert -1 <= decision.fidelity["scores"] <= 1
    assert 0 < decision.fidelity["influences"] < 1
    plain = LocalModel(path=str(folder))
    assert {**model.fingerprint(), "quantised": None} == {**plain.fingerprint(), "quantised": None}
    assert model.fingerprint() != plain.fingerprint()  # the store keeps them apart


@pytest.mark.parametrize("kind", ["lora", "experts"])
def test_adapters_train_on_a_quantised_base_as_on_the_dequantised_one(quantised, kind):
    profile = scored(quantised)
    config = profile.lora_config(9, lora_dropout=0.0)
    if kind == "experts":
        config = LoraMoeConfig(num_experts=profile.experts(9).by_name(), lora_dropout=0.0, balance_coefficient=0.1)
    ids = torch.tensor([row["input_ids"][:7] for row in ROWS[:4]])
    gradients: list[dict[str, Tensor]] = []
    for base in (copy.deepcopy(quantised), dense(quantised)):
        torch.manual_seed(0)
        adapted: Any = get_peft_model(base, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
        with torch.no_grad():
            adapted.eval()(input_ids=ids)
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: each.grad for name, each in adapted.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        assert float((gradients[0][name] - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-9, name


def test_files_that_are_quantised_already_are_loaded_as_they_are(folder, tmp_path):
    first: Any = LocalModel(path=str(folder), quantised="nf4").load()
    first.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = LocalModel(path=str(tmp_path))
    model.check()
    assert (model.quantisation, model.has_dense_weights) == ("nf4", False)
    assert_alike(scored(model.load()).scores.values, scored(first).scores.values)
    assert model.layers() == LocalModel(path=str(folder)).layers()
    with pytest.raises(ValueError, match=r"model\.quantised=int8, and by quantization_config .* already \(nf4\)"):
        LocalModel(path=str(tmp_path), quantised="int8").check()


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize(("saved_in", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_files_that_are_quantised_already_compute_in_the_type_that_is_asked_for(
    folder, tmp_path, scheme, saved_in, dtype
):
    LocalModel(path=str(folder), quantised=scheme, dtype=saved_in).load().save_pretrained(tmp_path)
    model: Any = LocalModel(path=str(tmp_path), dtype=dtype).load()
    wanted = getattr(torch, dtype)
    rest = {
        name: value.dtype for name, value in model.named_parameters() if value.dtype not in (torch.int8, torch.uint8)
    }
    assert set(rest.values()) == {wanted}
    assert len(rest) == 9  # the embedding, the head, and the norms
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.dtype == wanted
    query = model.model.layers[0].self_attn.q_proj
    if scheme == "nf4":
        assert (query.compute_dtype, query.weight.quant_state.dtype) == (wanted, wanted)
    weight_OI = weight_in(query).to(wanted)
    x_TI = torch.randn(4, weight_OI.shape[1], dtype=wanted)
    torch.testing.assert_close(query(x_TI), x_TI @ weight_OI.T)
    with pytest.raises(ValueError, match=rf"model\.quantised={scheme} computes in float32 at best; use model\.dtype"):
        LocalModel(path=str(tmp_path), dtype="float64").check()


def test_files_of_another_format_compute_in_their_own_type():
    model = with_layers(FourBits).bfloat16()
    compute_in(model, torch.bfloat16, where="mine", scheme="gptq 4 bits")
    said = (
        r"model\.dtype=float32, and the files of 'mine' \(gptq 4 bits\) hold .* in bfloat16.*use model\.dtype=bfloat16"
    )
    with pytest.raises(ValueError, match=said):
        compute_in(model, torch.float32, where="mine", scheme="gptq 4 bits")


@pytest.mark.parametrize("is_in_files", [False, True])
def test_without_bitsandbytes_the_command_that_brings_it_is_given(folder, tmp_path, monkeypatch, is_in_files):
    LocalModel(path=str(folder), quantised="nf4" if is_in_files else "none").load().save_pretrained(tmp_path)
    model = LocalModel(path=str(tmp_path), quantised="none" if is_in_files else "nf4")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    for use in (model.check, model.load):
        with pytest.raises(ValueError, match=r"that needs bitsandbytes, .* pip install 'layerif\[quantised\]'"):
            use()


def test_a_type_that_bitsandbytes_does_not_compute_in_is_refused(folder):
    with pytest.raises(ValueError, match=r"model\.quantised=nf4 computes in float32 at best"):
        LocalModel(path=str(folder), quantised="nf4", dtype="float64")


@pytest.mark.parametrize("trained_on", ["none", "nf4"])
def test_an_adapter_of_another_quantisation_is_refused_before_anything_is_loaded(folder, tmp_path, trained_on):
    written = adapter_of(folder, trained_on, tmp_path)
    assert json.loads((written / "base.json").read_text()) == {"quantised": trained_on}
    for here in ("none", "nf4", "int8"):
        model = LocalModel(path=str(folder), adapter=str(written), quantised=here)
        if here == trained_on:
            model.check()
            continue
        with pytest.raises(
            ValueError, match=rf"trained on a base with quantised={trained_on}, and here it is {here}; use"
        ):
            model.check()


def test_an_adapter_that_does_not_say_what_it_was_trained_on_is_taken_with_a_warning(folder, tmp_path, recwarn):
    written = adapter_of(folder, "none", tmp_path)
    (written / "base.json").unlink()  # as PEFT writes it
    LocalModel(path=str(folder), adapter=str(written)).check()
    said = [str(each.message) for each in recwarn if "base.json" in str(each.message)]
    assert not said
    with pytest.warns(RuntimeWarning, match=r"does not say how its base was quantised .* here the base is nf4; check"):
        LocalModel(path=str(folder), adapter=str(written), quantised="nf4").check()


def adapter_of(folder: Path, quantised: Any, into: Path) -> Path:
    """Writes an adapter as a run does."""
    tuning = LoraAdapter()
    base: Any = LocalModel(path=str(folder), quantised=quantised).load()
    allocation = Allocation(layer_map(base).names, "rank", (1, 2, 3), 6)
    tuning.write(tuning.put_on(base, allocation), None, into)
    return into


def test_pruning_quantising_and_loss_curves_of_a_quantised_base_are_refused(quantised):
    with pytest.raises(ValueError, match=r"is quantised, and only floating-point weights are pruned or quantised"):
        layerif.prune(quantised, None, 0.5, calibration=ROWS, window=8, progress=False)
    with pytest.raises(ValueError, match="changes weights to see what that costs"):
        layerif.curves(quantised, None, ROWS, window=8, progress=False)
    with pytest.raises(ValueError, match="estimator=spider changes weights"):
        scored(quantised, estimator="spider")


# Formats of others.


class FourBits(nn.Module):
    """A linear layer as GPTQ and AWQ have it: whole numbers in a buffer, two of them in a byte, and no parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.data.abs().amax(1, keepdim=True) / 7
        whole = (linear.weight.data / scale).round().to(torch.int8) + 8
        self.register_buffer("qweight", (whole[:, ::2] + 16 * whole[:, 1::2]).to(torch.uint8))
        self.register_buffer("scales", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.numbers())

    def numbers(self) -> Tensor:
        halves = torch.stack([self.qweight % 16, self.qweight // 16], dim=-1).flatten(1)  # type: ignore[operator, call-overload, arg-type]
        return (halves.float() - 8) * self.scales  # type: ignore[operator]


class WithoutGradient(FourBits):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Rounding(FourBits):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def with_layers(kind: type[FourBits]) -> Any:
    model = tiny_model(**SIZES).requires_grad_(False)
    for block in model.model.layers:
        for name in ("q_proj", "o_proj"):
            setattr(block.self_attn, name, kind(getattr(block.self_attn, name)))
    return model


def test_a_format_of_others_is_measured_where_its_layers_behave_as_linear_ones():
    model = with_layers(FourBits)
    attention: Any = model.model.layers[1].self_attn
    torch.testing.assert_close(weight_in(attention.q_proj), attention.q_proj.numbers())
    assert "FourBits weights" in scored(model).notes[0]
    for estimator in ("datainf", "alpha"):
        found, expected = (scored(each, estimator=estimator).scores.values for each in (model, dense(model)))
        assert_alike(found, expected)
    adapted = get_peft_model(model, LoraMoeConfig(num_experts=2))  # type: ignore[arg-type]
    assert len([name for name, _ in adapted.named_parameters() if "router" in name]) == 3 * 7


@pytest.mark.parametrize(
    ("kind", "why"),
    [(WithoutGradient, "it passes no gradient to its input"), (Rounding, "the output of a sum is not the sum")],
)
def test_a_format_whose_layers_do_not_behave_as_linear_ones_is_refused_by_name(kind, why):
    with pytest.raises(
        ValueError,
        match=rf"0\.self_attn\.q_proj\.qweight \({kind.__name__}, torch\.uint8\) is quantised, and .*: {why}.*; give",
    ):
        layer_map(with_layers(kind))


def test_a_packed_matrix_that_is_not_a_linear_layer_is_refused_by_name():
    model = tiny_model()
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(4, 24, dtype=torch.int32))
    model.get_submodule("model.layers.1.self_attn").k_proj = packed  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"self_attn\.k_proj\.qweight \(Module, torch\.int32\) is quantised, and it is"
    ):
        layer_map(model)
    with pytest.raises(ValueError, match="only floating-point weights are pruned"):
        matrices(model)
