"""What experts add, and what leaving one out costs, against the same model with separate linear layers."""

from __future__ import annotations

import warnings

import pytest
import torch

from layerif.estimators.expert_output import ExpertOutput
from layerif.estimators.skip_curve import SkipCurve
from layerif.evidence import LayerExperts, LayerSkips
from layerif.models.blocks import layer_map
from layerif.models.loss import per_sample_loss
from layerif.models.stored import fused_experts
from layerif.probe.expert_outputs import expert_outputs
from layerif.probe.skips import measure_skips
from tests.families import each_family, model_of, separated
from tests.probe.test_skips import assert_same, loss_text, samples

pytestmark = pytest.mark.usefixtures("softmax_in_the_models_dtype", "all_in_the_models_dtype")
WITH_NORM = "mixtral with norms"
FAMILIES = [*each_family(["mixtral", "gpt_oss", "qwen3_next", "llama4_text"]), WITH_NORM]


def double(family: str):
    """A model of a family in float64, or one with a norm behind the second matrix of every expert (Muse Spark)."""
    if family != WITH_NORM:
        return model_of(family).double()
    model = model_of("mixtral").double()
    for number, holder in enumerate(fused_experts(model)):
        norm = torch.nn.RMSNorm(32, eps=1e-6, dtype=torch.float64)
        torch.nn.init.normal_(norm.weight, 1, 0.3, generator=torch.Generator().manual_seed(number))
        holder.has_post_expert_norm, holder.post_expert_norm = True, norm  # type: ignore[assignment]
    return model


def watched(model, name: str, look):
    """Hooks the second matrix of an expert in a model of separate linear layers."""
    return model.get_submodule(f"{name}.down_proj").register_forward_hook(look)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_the_separate_experts(family):
    model = double(family)
    experts = layer_map(model, scope="all").each_expert.names
    windows = list(torch.randint(3, 250, (3, 20), generator=torch.Generator().manual_seed(1)).split([2, 1]))
    found = expert_outputs(model, experts, windows)
    reference = separated(model)
    routed: dict[str, tuple] = {}
    sums, counts = torch.zeros(len(experts), dtype=torch.float64), torch.zeros(len(experts), dtype=torch.long)
    handles = []
    for number, name in enumerate(experts):
        holder, _, index = name.rpartition(".")

        def keep(module, args, holder=holder):
            routed[holder] = args

        def add(module, args, output, number=number, holder=holder, index=int(index)):
            if len(routed[holder]) == 3:
                weights_T = (routed[holder][2] * (routed[holder][1] == index)).sum(1)
                is_its_T = (routed[holder][1] == index).any(1)
            else:
                weights_T, is_its_T = 1.0, routed[holder][0].chunk(4)[index].any(1)
            sums[number] += (output.norm(dim=1) * weights_T * is_its_T).sum()
            counts[number] += is_its_T.sum()

        handles += [reference.get_submodule(holder).register_forward_pre_hook(keep), watched(reference, name, add)]
    with torch.no_grad():
        for ids in windows:
            reference(input_ids=ids, use_cache=False)
    torch.testing.assert_close(found["sums"], sums, rtol=1e-6, atol=1e-12)
    assert torch.equal(found["counts"], counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_price_of_an_expert_is_the_slope_of_a_gate_on_what_it_adds(family):
    model = double(family)
    experts = layer_map(model, scope="all").each_expert.names
    reference, expected = separated(model), {"first": [], "second": []}
    for ids_T in samples():
        gates_UT1 = torch.ones(len(experts), len(ids_T), 1, dtype=torch.float64, requires_grad=True)
        handles = [
            watched(reference, name, lambda module, args, output, gate=gates_UT1[number]: output * gate)
            for number, name in enumerate(experts)
        ]
        batch = {
            "input_ids": ids_T[None],
            "attention_mask": torch.ones_like(ids_T[None]),
            "labels": ids_T[None].clone(),
        }
        (slope_UT1,) = torch.autograd.grad(per_sample_loss(reference, batch).sum(), gates_UT1)
        for handle in handles:
            handle.remove()
        z_TU = -slope_UT1[:, :, 0].T
        expected["first"].append(z_TU.sum(0))
        expected["second"].append(0.5 * (len(ids_T) - 1) * z_TU.square().sum(0))
    theirs = {name: torch.stack(rows) for name, rows in expected.items()}
    assert_same(measure_skips(model, experts, loss_text(3)), theirs, 1e-5 if family == "qwen3_next" else 1e-8)


def test_scores_are_means_over_all_or_over_routed_tokens_and_an_unreached_expert_is_named():
    layers = layer_map(model_of("mixtral"), scope="all").each_expert
    sums, counts = torch.arange(8).double(), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    evidence = LayerExperts(layers, sums, counts, 10, "none")
    with pytest.warns(RuntimeWarning, match=r"reaches model\.layers\.0\.mlp\.experts\.0 \(1 of 8 experts\)"):
        found = ExpertOutput().score(evidence)
    assert found.values == pytest.approx([number / 10 for number in range(8)])
    assert found.higher_means == "important"
    with pytest.warns(RuntimeWarning):
        assert ExpertOutput(mean_over="routed").score(evidence).values == (0.0, *[1.0] * 7)
    with pytest.raises(ValueError, match="no calibration token is sent to any expert"):
        ExpertOutput().score(LayerExperts(layers, sums, counts * 0, 10, "none"))


def test_the_curves_name_an_expert_that_no_token_reaches():
    units = layer_map(model_of("mixtral"), scope="all").each_expert.names
    second = torch.ones(2, len(units), dtype=torch.float64)
    second[:, 3] = 0
    second[0, 4] = 0  # seen in one half of the windows
    evidence = LayerSkips(units, (10,) * len(units), "expert", second, second, {}, "none")
    for order in ("first", "second", "both"):
        with pytest.warns(RuntimeWarning, match=r"reaches model\.layers\.0\.mlp\.experts\.3 \(1 of 8 experts\), or"):
            SkipCurve(order=order, unit="expert").curves(evidence)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SkipCurve().curves(LayerSkips(units, (10,) * len(units), "block", second, second, {}, "none"))
