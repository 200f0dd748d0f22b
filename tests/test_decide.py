"""Decisions take the evidence their estimator needs, once, refuse a checkpoint of another model, and state fidelity."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from layerif import decide
from layerif.allocate.file import SavedAllocation
from layerif.estimators.alpha import Alpha
from layerif.estimators.avss import Avss
from layerif.estimators.avss_contrast import AvssContrast
from layerif.estimators.block_influence import BlockInfluence
from layerif.estimators.cca import Cca
from layerif.estimators.cluster_information import ClusterInformation
from layerif.estimators.datainf import DataInf
from layerif.estimators.dlp import Dlp
from layerif.estimators.ends import Ends
from layerif.estimators.expert_output import ExpertOutput
from layerif.estimators.file import SavedScores
from layerif.estimators.grad_norm import GradNorm
from layerif.estimators.ila import Ila
from layerif.estimators.linear_probe import LinearProbe
from layerif.estimators.lissa import Lissa, step_bound
from layerif.estimators.outlier import Outlier
from layerif.estimators.reversed import Reversed
from layerif.estimators.tracin import TracIn
from layerif.evidence import LayerGrams
from layerif.models.blocks import layer_map
from layerif.models.pretrained import LocalModel
from layerif.moe import LoraMoeConfig
from layerif.probe import activations
from layerif.probe.gates import Gates
from layerif.probe.grams import request
from layerif.probe.grams.request import Grams
from layerif.probe.store import Store
from layerif.scores import LayerScores
from tests.estimators.test_estimators import ESTIMATORS, LAYERS, gram_of, make
from tests.tiny import tiny_model


def test_all_forward_pass_estimators_share_one_pass(decider, monkeypatch):
    passes, observe = [], activations.observe
    monkeypatch.setattr(activations, "observe", lambda *args, **kwargs: passes.append(1) or observe(*args, **kwargs))
    found = []
    every = Outlier(multiple=2.0), Dlp(), BlockInfluence(), Avss(), AvssContrast(), Cca(sets=1), LinearProbe(folds=2)
    for estimator in every:
        decision = replace(decider, estimator=estimator)()
        assert decision.reused == bool(found)
        assert (decision.num_samples, decision.reliability) == ((8, 0), None)
        assert sum(decision.allocation.values) == 9
        found.append(decision.scores.fingerprint)
    assert len(passes) == 1
    assert len(set(found)) == 1
    assert replace(decider, estimator=Reversed(of=Avss(epsilon=0.5)))().scores.source.startswith("reversed(avss(")
    assert len(passes) == 2  # counted below another bound


# Settings that a test needs: checkpoints that exist, few steps and folds, outliers that a random model has.
TOLD = {
    TracIn: {"learning_rates": [0.5, 0.1]},
    Ila: {"num_steps": 3},
    LinearProbe: {"folds": 2},
    Cca: {"sets": 1, "regulariser": 0.1},
    ClusterInformation: {"sets": 1, "clusters": 4},
    Outlier: {"multiple": 2.0},
    Ends: {"number": 1},
}
OF_BLOCKS = [cls for cls in ESTIMATORS if cls is not ExpertOutput]  # which scores the experts of a mixture


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    """A folder of stores that all estimators take their evidence from: each kind is measured once in every store."""
    return tmp_path_factory.mktemp("stores")


@pytest.mark.parametrize("cls", OF_BLOCKS, ids=lambda cls: cls.__name__)
def test_every_estimator_is_a_function_of_the_seed_and_of_no_batch_size(decider, adapters, stores, cls):
    estimator = make(cls, **TOLD.get(cls, {}) | ({"checkpoints": adapters} if cls is TracIn else {}))
    model = replace(decider.model, dtype="float64", adapter=adapters[0] if isinstance(estimator.needs, Gates) else None)

    def measured(name: str, batch_size: int) -> LayerScores:
        probe = replace(decider.probe, batch_size=batch_size)
        return replace(decider, model=model, estimator=estimator, probe=probe, store=Store(stores / name))().scores

    first = measured("first", 3)
    assert measured("again", 3) == first
    assert measured("one by one", 1).values == pytest.approx(first.values, rel=1e-6)


def test_alpha_looks_at_weights_alone_and_says_what_it_cost(decider):
    first = replace(decider, estimator=Alpha())()
    again = replace(decider, estimator=Alpha(fit="peak"), probe=replace(decider.probe, num_train=2))()
    assert (first.reused, again.reused) == (False, True)
    assert first.scores.fingerprint == again.scores.fingerprint
    assert first.num_samples == (0, 0)
    assert "s a block" in first.notes[0]


def test_an_adapter_counts_as_part_of_the_weights(decider, adapters):
    adapted = replace(decider, model=replace(decider.model, adapter=adapters[0]))
    for estimator in (Alpha(), Dlp(), BlockInfluence()):
        of_bare, of_adapted = (replace(one, estimator=estimator)().scores for one in (decider, adapted))
        assert of_bare.layers == of_adapted.layers
        assert of_bare.values != of_adapted.values


def test_ila_needs_a_trained_adapter_and_learns_its_gates_once(decider, adapters):
    ila = replace(decider, estimator=Ila(num_steps=2))
    with pytest.raises(ValueError, match=r"estimator=ila .*model\.adapter=/run/adapter"):
        ila.preview()
    trained = replace(ila, model=replace(decider.model, adapter=adapters[0]))
    first, again = trained(), trained()
    assert (first.reused, again.reused) == (False, True)
    assert first.scores == again.scores
    assert not replace(trained, estimator=Ila(num_steps=3))().reused
    assert not replace(trained, seed=1)().reused


def saved_adapter(folder: Path, base: str, *, seed: int = 0, moe: bool = False, **overrides) -> str:
    """A random adapter, as one in training is."""
    model = tiny_model("llama", **overrides)
    model.name_or_path = base  # what PEFT writes down
    config = LoraMoeConfig(num_experts=2) if moe else LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [saved_adapter(folder / f"step-{seed}", str(model_folder), seed=seed) for seed in (1, 2)]


def tracin_of(checkpoints: list[str], *rates: float) -> TracIn:
    return TracIn(checkpoints=checkpoints, learning_rates=list(rates))


@pytest.mark.parametrize("parameters", ["weights", "lora"])
def test_tracin_sums_what_each_adapter_measures_alone_and_measures_it_once(decider, adapters, parameters):
    decider = replace(decider, probe=replace(decider.probe, parameters=parameters))
    alone = []
    for adapter in adapters:
        at = replace(decider, model=replace(decider.model, adapter=adapter))
        grams, reused = Grams().take(at, at.model.load)
        assert not reused
        alone.append({name: gram.val_train.double() for name, gram in grams.grams.items()})

    def never():
        raise AssertionError("the bare model is not needed")

    decision = replace(decider, estimator=tracin_of(adapters, 0.5, 0.1))(never)
    assert decision.reused
    assert len(list(decider.store.root.rglob("*.safetensors"))) == 2
    expected = [
        abs(sum(float((0.5 * alone[0][name] + 0.1 * alone[1][name]).sum()) for name in params))
        for params in grams.layers.params
    ]
    assert decision.scores.values == pytest.approx(expected, rel=1e-9)
    assert decision.scores.layers == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert decision.num_samples == (8, 4)
    assert decision.reliability is not None
    assert sum(decision.allocation.values) == 9
    other = replace(decider, estimator=tracin_of(adapters[:1], 0.5))()
    assert other.scores.fingerprint != decision.scores.fingerprint


def test_checkpoints_may_be_whole_models(decider, tmp_path):
    folders = [str(tmp_path / f"model-{seed}") for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        tiny_model("llama", seed=seed, attn_implementation="sdpa").save_pretrained(folder)
    decision = replace(decider, estimator=tracin_of(folders, 1.0, 1e-12))()
    assert not decision.reused
    alone = replace(decider, model=LocalModel(path=folders[0]))()
    assert alone.reused
    assert decision.scores.values == pytest.approx(alone.scores.values, rel=1e-6)


def test_an_adapter_with_experts_is_a_checkpoint_too(decider, model_folder, tmp_path):
    folder = saved_adapter(tmp_path / "moe", str(model_folder), moe=True)
    model = decider.model.at(folder)
    assert model == replace(decider.model, adapter=folder)
    params = {kind: layer_map(model.load(), parameters=kind).params[0] for kind in ("weights", "lora")}
    assert [name.rpartition("self_attn.")[2] for name in params["weights"]] == [
        f"{matrix}_proj.base_layer.weight" for matrix in "qkvo"
    ]
    assert [name.rpartition("self_attn.")[2] for name in params["lora"]] == [
        f"{matrix}_proj.lora_moe_{factor}.default.weight" for matrix in "qkvo" for factor in "AB"
    ]
    assert all(value > 0 for value in replace(decider, estimator=tracin_of([folder], 0.1))().scores.values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 40}, r"layers\.0\.self_attn\.q_proj\.lora_A\.weight is \(2, 40\) there and \(2, 32\) here"),
        # PEFT would load these two in silence.
        ({"num_hidden_layers": 4}, r"layers\.3\.self_attn\.q_proj\.lora_A\.weight is \(2, 32\) there and missing here"),
        ({"num_hidden_layers": 2}, r"layers\.2\.self_attn\.q_proj\.lora_A\.weight is missing there and \(2, 32\) here"),
    ],
)
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_checkpoint_of_another_model_is_refused_before_any_is_measured(
    decider, adapters, tmp_path, monkeypatch, kind, overrides, message
):
    other = tmp_path / "other"
    if kind == "adapter":
        saved_adapter(other, str(decider.model.path), **overrides)
    else:
        tiny_model("llama", **overrides).save_pretrained(other)
        message = "is .* there and .* here"
    monkeypatch.setattr(request, "measure", None)
    with pytest.raises(ValueError, match=f"'{other}' is of another model: .*{message}"):
        replace(decider, estimator=tracin_of([*adapters, str(other)], 0.1, 0.1, 0.1))()


def test_an_adapter_of_other_modules_and_a_folder_of_nothing_are_refused(decider, tmp_path):
    opt = tmp_path / "opt"
    get_peft_model(tiny_model("opt"), LoraConfig(target_modules=["fc1"])).save_pretrained(opt)
    with pytest.raises(ValueError, match=f"'{opt}' is of another model: .*fc1"):
        decider.model.at(str(opt))
    with pytest.raises(ValueError, match=r"neither adapter_config\.json nor config\.json"):
        decider.model.at(str(tmp_path / "nowhere"))


def test_adapters_and_whole_models_do_not_mix(decider, adapters, model_folder):
    with pytest.raises(ValueError, match="checkpoint 2 of 2 has other layers or matrices"):
        replace(decider, estimator=tracin_of([adapters[0], str(model_folder)], 0.1, 0.1))()


def test_an_adapter_trained_on_another_base_of_the_same_shape_is_told(decider, adapters, tmp_path):
    other = saved_adapter(tmp_path / "other", "org/another-base")
    with pytest.warns(RuntimeWarning, match=r"trained on 'org/another-base'.*check that their weights do"):
        decider.model.at(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        decider.model.at(adapters[0])


def test_half_precision_states_how_well_it_ranks_like_float32(decider):
    half = replace(
        decider,
        model=replace(decider.model, dtype="bfloat16"),
        probe=replace(decider.probe, fidelity_samples=6),
        estimator=DataInf(),
    )
    found = half().fidelity
    assert found is not None
    assert (found["train"], found["validation"]) == (6, 3)
    assert 0.9 < found["influences"] < 1
    assert -1 <= found["scores"] <= 1
    blind = replace(half, probe=replace(half.probe, fidelity_samples=0))()
    assert blind.fidelity is None
    assert blind.notes == ("probed in bfloat16; not compared with exact float32 (probe.fidelity_samples=0)",)
    assert replace(half, model=decider.model)().notes == ()
    sizes = replace(half, estimator=GradNorm())().fidelity
    assert sizes is not None
    assert set(sizes) == {"train", "validation", "scores"}  # it takes no influence of the Grams


def test_a_comparison_that_does_not_fit_says_so_and_no_other_reason(decider, monkeypatch):
    measured = request.measure

    def full(*args, **options):
        if options["projection"] is None:
            raise torch.cuda.OutOfMemoryError
        return measured(*args, **options)

    monkeypatch.setattr(request, "measure", full)
    found = replace(decider, probe=replace(decider.probe, projection=4))()
    assert found.fidelity is None
    assert found.notes == (
        "probed in a projection to 4 dimensions; not compared with exact float32 (a second model, in float32, does not "
        "fit the memory; probe.fidelity_samples=0 does not try)",
    )


def test_what_is_unconverged_of_the_comparison_is_not_said_of_the_scores(decider):
    grams, _ = Grams().take(decider, decider.model.load)
    estimator = Lissa(num_steps=1)
    with pytest.warns(RuntimeWarning, match="unconverged"):
        estimator.score(grams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decide.fidelity_of(estimator, grams, grams)["scores"] == pytest.approx(1)


def test_a_projection_as_wide_as_the_model_is_faithful_and_a_narrow_one_says_what_it_loses(decider):
    def fidelity(projection: int) -> dict[str, float]:
        probe = replace(decider.probe, projection=projection, fidelity_samples=8)
        found = replace(decider, probe=probe, estimator=DataInf())().fidelity
        assert found is not None
        return found

    wide, narrow = fidelity(64), fidelity(2)
    assert wide["scores"] == pytest.approx(1)
    assert wide["influences"] == pytest.approx(1)
    assert narrow["influences"] < 0.99


def test_a_fixed_step_that_diverges_on_part_of_the_samples_leaves_a_warning_and_no_figure():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 30, dtype=torch.float64, generator=generator)
    grams = LayerGrams(LAYERS, {name: gram_of(rows[:12], rows[12:]) for block in LAYERS.params for name in block}, "f")
    whole = next(iter(grams.grams.values()))
    estimator = Lissa(step_size=0.95 * step_bound(whole.train_train, numel=whole.numel, damping=0.1))
    estimator.score(grams)
    with pytest.warns(RuntimeWarning, match=r"no reliability: on a half of the samples estimator\.step_size="):
        assert decide.split_half(estimator, grams) is None
    with pytest.warns(RuntimeWarning, match=r"no fidelity: on the samples of the comparison estimator\.step_size="):
        assert decide.fidelity_of(estimator, grams, grams.halves[0]) == {}
    assert decide.fidelity_of(Lissa(), grams, grams)["influences"] == pytest.approx(1)


def test_a_single_sample_is_said_to_rank_nothing(decider):
    found = replace(decider, splits=replace(decider.splits, validation=decider.splits.validation[:1]))()
    assert "one validation sample ranks nothing reliably: give more validation rows" in found.notes
    assert not any("ranks nothing" in note for note in decider().notes)


def test_what_cannot_be_measured_is_refused_before_any_work(decider, tmp_path):
    of_lora = replace(decider, probe=replace(decider.probe, parameters="lora"))
    for estimator in (DataInf(), Reversed(of=DataInf())):
        with pytest.raises(ValueError, match=r"probe\.parameters=lora needs a LoRA adapter"):
            replace(of_lora, estimator=estimator).preview()
    replace(of_lora, estimator=Dlp()).preview()  # looks at weights alone
    with pytest.raises(ValueError, match=r"scores file .*cannot be read"):
        replace(decider, estimator=SavedScores(path=str(tmp_path / "none.json"))).preview()
    assert decider.preview().values == (3, 3, 3)


def test_a_decision_names_the_files_that_it_depends_on(decider, adapters, tmp_path):
    scores, given = tmp_path / "scores.json", tmp_path / "given.json"
    names = list(decider.layers().names)
    scores.write_text(json.dumps({"layers": names, "values": [1, 2, 3], "higher_means": "important"}))
    given.write_text("[2, 3, 4]")
    assert decider.inputs() == {}
    assert set(replace(decider, estimator=tracin_of(adapters, 0.5, 0.1)).inputs()) == set(adapters)
    both = replace(decider, estimator=SavedScores(path=str(scores)), allocator=SavedAllocation(path=str(given)))
    first = both.inputs()
    assert set(first) == {str(scores), str(given)}
    given.write_text("[2, 4, 4]")
    second = both.inputs()
    assert {path for path in first if first[path] != second[path]} == {str(given)}


def test_a_decision_is_recorded_in_one_shape_that_files_read_again(decider, tmp_path):
    decision = decider()
    record = decision.record()
    assert (record.source, record.samples) == (decision.source, {"train": 8, "validation": 4})
    assert record.reliability == decision.reliability
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"version": 2, "config": {}, "decision": asdict(record)}))
    again = replace(decider, estimator=SavedScores(path=str(file)))()
    assert again.scores.values == decision.scores.values
    assert (again.num_samples, again.reliability) == ((0, 0), None)
    given = replace(decider, allocator=SavedAllocation(path=str(file)))()
    assert (given.scores, given.allocation) == (None, decision.allocation)
    assert given.record().scores is None
    assert given.record().samples == {}
