"""Leaving experts out as a run: by what they add, by influence and by price; the folder is one for transformers."""

from __future__ import annotations

import pytest
from hydra.errors import InstantiationException
from transformers import AutoModelForCausalLM

from tests.app.methods.runs import pruned
from tests.families import model_of
from tests.tiny import tiny_tokenizer

DROP = [
    "method=drop", "allocator=blocks", "allocator.unit=expert", "allocator.keep=0.75", "method.speed=null",
    "method.calibration.num_windows=5", "method.calibration.window=40", "method.calibration.batch_size=2",
    "evaluation.metrics=[options]", "method.dense=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    model_of("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return f"model.path={folder}"


@pytest.mark.parametrize(
    "estimator",
    [["expert_output"], ["datainf", "probe.scope=mlp", "probe.num_train=6", "probe.num_validation=4"], ["skip_curve"]],
    ids=lambda given: given[0],
)
def test_every_block_keeps_as_many_experts_and_plain_transformers_loads_the_folder(
    setup_of, tmp_path, mixtral, estimator
):
    found = setup_of(mixtral, f"estimator={estimator[0]}", *DROP, *estimator[1:])
    record = pruned(found, tmp_path / "run")
    given = record.decision.allocation
    assert (len(given.units), given.budget, given.kind) == (8, 6, "blocks")
    by_block = [sum(given.values[start : start + 4]) for start in (0, 4)]
    assert by_block == [3, 3]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert reloaded.config.num_local_experts == 3
    assert record.parameters["dropped"] == 2 * (3 * 24 * 32 + 32)


def refused(setup_of, *overrides: str) -> str:
    with pytest.raises((ValueError, InstantiationException)) as raised:
        checked(setup_of(*DROP, *overrides))
    return str(raised.value)


def checked(setup) -> None:
    setup.method.check(setup)


def test_settings_that_do_not_fit_are_refused_before_anything_is_measured(setup_of, mixtral):
    for overrides, said in (
        (["estimator=datainf"], "use probe.scope=mlp"),
        (["estimator=block_influence"], "estimator=block_influence keeps blocks alone apart"),
        (["estimator=expert_output", "allocator.unit=block"], "method=drop allocator.unit=expert"),
        (["estimator=uniform", "method.search=greedy"], "without regard to their block"),
        (["estimator=expert_output", "allocator.keep=1"], "use allocator.keep>=2"),
    ):
        assert said in refused(setup_of, mixtral, *overrides)
    assert "this model has no fused experts; use allocator.unit=block" in refused(setup_of, "estimator=expert_output")
