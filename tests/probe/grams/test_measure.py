"""The probe against a batch-1 autograd loop in float64, and what must not change a Gram."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerif.estimators.datainf import DataInf
from layerif.evidence import LayerGrams
from layerif.models.blocks import Scope, blocks, layer_map
from layerif.models.loss import per_sample_loss
from layerif.probe.grams import gather as measurement
from layerif.probe.grams import products
from layerif.probe.grams.measure import measure
from layerif.probe.grams.products import FORMS
from layerif.probe.grams.projection import Projection
from tests.damage import flip
from tests.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.usefixtures("softmax_in_the_models_dtype")

LENGTHS = (9, 4, 7, 7, 2, 5, 8)
NUM_TRAIN = 4


def double(family: str):
    return tiny_model(family).double()


def samples(vocabulary: int = 64, lengths: Sequence[int] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


def batch(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for position, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[position, where], mask[position, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def batched(rows: list[torch.Tensor], size: int, side: str = "left", order: list[int] | None = None):
    order = order if order is not None else list(range(len(rows)))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [(chunk, batch([rows[index] for index in chunk], side)) for chunk in chunks]


def probe(model, scope: Scope = "attention", size: int = 3, side: str = "left", orders=(None, None), **options):
    rows = samples()
    layers = layer_map(model, scope=scope, parameters=options.pop("parameters", "weights"))
    train = batched(rows[:NUM_TRAIN], size, side, orders[0])
    return measure(model, layers, train, batched(rows[NUM_TRAIN:], size, side, orders[1]), **options)


def assert_equal(ours: LayerGrams, theirs: LayerGrams, tolerance: float) -> None:
    assert ours.layers == theirs.layers
    for param, gram in theirs.grams.items():
        for field in ("train_train", "val_train", "val_norms"):
            torch.testing.assert_close(
                getattr(ours.grams[param], field), getattr(gram, field), rtol=tolerance, atol=tolerance * 1e-3
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_batch_1_autograd_loop_in_float64(family):
    model = double(family)
    grams = probe(model, scope="all")
    gradients: dict[str, list[torch.Tensor]] = {param: [] for param in grams.grams}
    for row in samples():
        model.zero_grad()
        per_sample_loss(model, batch([row])).sum().backward()
        for param, rows in gradients.items():
            gradient = model.get_parameter(param).grad
            assert gradient is not None
            rows.append(gradient.flatten().clone())
    assert sum(len(params) for params in grams.layers.params) == len(gradients)
    for param, rows in gradients.items():
        train_NP, val_MP = torch.stack(rows[:NUM_TRAIN]), torch.stack(rows[NUM_TRAIN:])
        gram = grams.grams[param]
        torch.testing.assert_close(gram.train_train, train_NP @ train_NP.T, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(gram.val_train, val_MP @ train_NP.T, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(gram.val_norms, val_MP.norm(dim=1), rtol=1e-9, atol=1e-14)
        assert gram.numel == train_NP.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_padding_side_and_order_change_nothing(family):
    model = double(family)
    reference = probe(model, size=1)
    assert_equal(probe(model, size=7), reference, 1e-9)
    assert_equal(probe(model, size=7, side="right"), reference, 1e-9)
    assert_equal(probe(model, size=2, orders=([2, 0, 3, 1], [1, 2, 0])), reference, 1e-9)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(2, 12), min_size=3, max_size=7),
    num_train=st.integers(1, 6),
    size=st.integers(1, 7),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
def test_no_batching_of_any_samples_changes_a_gram(lengths, num_train, size, side, seed):
    """The Gram of each sample pair is the same when the two run alone, without any padding."""
    model, rows, num_train = double("llama"), samples(lengths=lengths), min(num_train, len(lengths) - 1)
    layers = layer_map(model)
    train, validation = rows[:num_train], rows[num_train:]
    order = torch.randperm(num_train, generator=torch.Generator().manual_seed(seed)).tolist()
    together = measure(model, layers, batched(train, size, side, order), batched(validation, size, side))
    assert_equal(together, measure(model, layers, batched(train, 1), batched(validation, 1)), 1e-9)


def least_memory(**options) -> float:
    """The gigabytes the error asks for."""
    with pytest.raises(ValueError, match=r"1e-09 GB for the probe .* are too few: model\.") as caught:
        probe(double("llama"), scope="all", memory_gb=1e-9, **options)
    return float(re.search(r"at least ([\d.e-]+)", str(caught.value))[1])  # type: ignore[index]


@pytest.mark.parametrize("form", FORMS)
def test_several_passes_equal_one(form, caplog):
    model = double("llama")
    with caplog.at_level(logging.INFO):
        grams = probe(model, scope="all", form=form, memory_gb=least_memory(form=form))
    passes = int(re.search(r"(\d+) passes", caplog.text)[1])  # type: ignore[index]
    assert 1 < passes <= 21
    assert_equal(grams, probe(model, scope="all"), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forms_agree(dtype):
    model = tiny_model("llama").to(dtype)
    materialised, pairwise = (probe(model, scope="all", form=form) for form in FORMS)
    assert_equal(pairwise, materialised, 1e-9 if dtype == torch.float64 else 2e-4)
    for first, second in zip(materialised.grams.values(), pairwise.grams.values(), strict=True):
        relative = (first.train_train - second.train_train).norm() / second.train_train.norm()
        assert relative < 1e-5
    scores = [torch.tensor(DataInf().score(grams).values) for grams in (materialised, pairwise)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=0)


def test_factors_on_disk_equal_those_in_memory(tmp_path):
    model = double("llama")
    assert_equal(probe(model, offload="disk", partial=tmp_path), probe(model), 1e-12)
    with pytest.raises(ValueError, match="needs a folder"):
        probe(model, offload="disk")


def test_an_interrupted_probe_resumes_from_its_finished_batches(tmp_path, monkeypatch):
    model, ran, dies_at = double("llama"), [], 2
    run = measurement.capture_factors

    def capture_factors(model, params, batch, *rest, **options):
        if len(ran) == dies_at:
            raise KeyboardInterrupt
        ran.append(batch)
        return run(model, params, batch, *rest, **options)

    monkeypatch.setattr(measurement, "capture_factors", capture_factors)
    with pytest.raises(KeyboardInterrupt):
        probe(model, size=1, offload="disk", partial=tmp_path)
    dies_at = 100
    resumed = probe(model, size=1, offload="disk", partial=tmp_path)
    assert len(ran) == len(LENGTHS)  # two before, five after
    assert_equal(resumed, probe(model, size=1), 0)


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(file.read_bytes()[:-100]), lambda file: flip(file, -9)]
)
def test_a_damaged_tile_is_measured_again(tmp_path, damage):
    model = double("llama")
    first = probe(model, offload="disk", partial=tmp_path)
    damaged = sorted(tmp_path.glob("tile-*"))[0]
    damage(damaged)
    with pytest.warns(UserWarning, match=f"{damaged} is damaged and its batch runs again"):
        assert_equal(probe(model, offload="disk", partial=tmp_path), first, 0)


def test_an_interrupted_probe_resumes_from_its_finished_passes_under_any_budget(tmp_path, monkeypatch):
    model, memory = double("llama"), least_memory()
    multiplied, run = [], products.gram

    def gram(*args):
        if len(multiplied) == 12:
            raise KeyboardInterrupt
        multiplied.append(args)
        return run(*args)

    monkeypatch.setattr(products, "gram", gram)
    with pytest.raises(KeyboardInterrupt):
        probe(model, scope="all", memory_gb=memory, partial=tmp_path)
    left = sorted(tmp_path.glob("grams-*"))
    assert len(left) > 3
    left[0].write_bytes(b"damaged")
    flip(left[1], -9)
    monkeypatch.setattr(products, "gram", lambda *args: [multiplied.append(args), run(*args)][1])
    with pytest.warns(UserWarning, match="is damaged and is measured again") as said:
        resumed = probe(model, scope="all", memory_gb=1, partial=tmp_path)  # all that is left in one pass
    assert [any(str(file) in str(each.message) for each in said) for file in left[:3]] == [True, True, False]
    assert 12 < len(multiplied) < 12 + 21
    assert_equal(resumed, probe(model, scope="all"), 1e-12)


def test_sdpa_and_eager_agree():
    eager, sdpa = tiny_model("llama"), tiny_model("llama", attn_implementation="sdpa")
    assert_equal(probe(sdpa), probe(eager), 1e-4)


def test_half_precision_is_accumulated_in_float32():
    gram = next(iter(probe(tiny_model("llama").bfloat16()).grams.values()))
    assert gram.train_train.dtype == torch.float32


def test_model_is_left_as_it_was():
    model = tiny_model("llama")
    model.train()
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    probe(model)
    assert model.training
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.embed_tokens.weight"
    ]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_projection_is_unbiased_seeded_and_exact_where_nothing_is_wider():
    model = double("llama")
    exact = probe(model)
    assert_equal(probe(model, projection=Projection(56)), exact, 1e-9)
    assert_equal(probe(model, projection=Projection(4, seed=1)), probe(model, projection=Projection(4, seed=1)), 1e-12)
    draws = [probe(model, projection=Projection(16, seed=seed)) for seed in range(40)]
    for param, gram in exact.grams.items():
        mean = torch.stack([draw.grams[param].train_train for draw in draws]).mean(0)
        assert (mean - gram.train_train).norm() / gram.train_train.norm() < 0.2, param
        assert draws[0].grams[param].numel == gram.numel
        assert not torch.allclose(draws[0].grams[param].train_train, draws[1].grams[param].train_train)


def test_lora_parameters_are_measured_and_unused_a_is_zero():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    grams = probe(model, parameters="lora")
    assert len(grams.grams) == 3 * 2 * 2
    assert grams.layers.names == layer_map(tiny_model("llama")).names
    for param, gram in grams.grams.items():
        assert bool((gram.train_train == 0).all()) == (".lora_A." in param)


def test_scopes_part_the_block():
    model = tiny_model("llama")
    counts = {scope: sum(layer_map(model, scope=scope).numel) for scope in ("attention", "mlp", "all")}
    assert counts["attention"] + counts["mlp"] == counts["all"] > counts["mlp"] > 0


def test_non_finite_loss_names_the_sample():
    model = tiny_model("llama")
    row = samples()[2]
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[int(row[0])] = float("inf")
    with pytest.raises(ValueError, match=r"loss of train sample 2 is not finite, from block model\.layers\.0 on"):
        probe(model)
    with pytest.raises(ValueError, match="loss of my row is not finite"):
        probe(model, names=["my row"] * len(LENGTHS))


def test_non_finite_gradient_names_matrix_and_sample():
    model = tiny_model("llama")
    block = blocks(model)["model.layers.1"]

    def spoil(_module, _inputs, output):
        if output.requires_grad:
            output.register_hook(lambda delta: delta * float("nan"))

    block.get_submodule("self_attn.o_proj").register_forward_hook(spoil)
    with pytest.raises(
        ValueError, match=r"gradient of model\.layers\.\d\.self_attn\.\w+\.weight is not finite for train sample 0"
    ):
        probe(model, size=1)


def test_no_linear_layer_in_scope():
    with pytest.raises(ValueError, match=r"parameters=lora found no LoRA matrix in block 'model\.layers\.0'"):
        layer_map(tiny_model("llama"), parameters="lora")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"form": "pairwise"}, {"offload": "cpu"}, {"projection": Projection(8)}], ids=str
)
def test_a_gpu_gives_the_grams_of_the_cpu(options):
    model = double("llama")
    reference = probe(model, scope="all", **{**options, "offload": "none"})
    assert_equal(probe(torch.nn.Module.cuda(model), scope="all", **options), reference, 1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_multiplies_in_full_float32_even_where_tf32_is_allowed(form):
    generator = torch.Generator().manual_seed(0)
    input_STI, delta_SOT = (torch.randn(shape, generator=generator) for shape in ((40, 64, 128), (40, 256, 64)))
    exact, _ = products.gram(form, input_STI.double(), delta_SOT.double(), 30, 1e8)
    torch.set_float32_matmul_precision("high")
    try:
        found, _ = products.gram(form, input_STI.cuda(), delta_SOT.cuda(), 30, 1e8)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (found.cpu().double() - exact).norm() / exact.norm() < 1e-5
