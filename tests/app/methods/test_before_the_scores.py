"""What cannot work is refused before anything is measured, in a dry run as well."""

from __future__ import annotations

import pytest

from tests.command import layerif_here

SPARSITY = ["allocator=sparsity", "allocator.smoothing=false"]


@pytest.fixture
def setup(setup_of):
    return setup_of


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_steps=0"], r"trainer\.max_steps=0 trains nothing"),
        (
            ["method=lora", "allocator=rank", "allocator.budget=1000000"],
            r"a rank of 333,\d+ is more .* lower alloc",
        ),
        (["allocator.budget=100000000000000"], r"parameters, whose training takes [\d,]+ GB"),
        (["method.r=100000"], r"a rank of 100,000 is more"),
        (
            ["method=diagnose", "method.r=100000", "method.num_train=8", "method.num_validation=4"],
            r"a rank of 100,000 .*; lower method\.r",
        ),
        (["data.drop_partial=true", "data.batch_size=400"], r"data\.drop_partial=true leaves none"),
        (
            [
                "method=prune",
                "pruner=magnitude",
                "allocator=sparsity",
                "allocator.smoothing=false",
                "method.recover=lora",
                "method.adapter.r=100000",
            ],
            r"a rank of 100,000 .*; lower method\.adapter\.r, or name fewer layers",
        ),
    ],
)
def test_a_method_refuses_what_it_could_not_do_after_the_scores(setup, overrides, message):
    made = setup(*overrides)
    with pytest.raises(ValueError, match=message):
        made.method.check(made)


@pytest.mark.parametrize("dry_run", [True, False])
def test_nothing_is_measured_before_a_refusal(tiny_overrides, tmp_path, dry_run):
    asked = [*tiny_overrides, "trainer.val_check_interval=100", f"dry_run={dry_run}"]
    done = layerif_here(asked, tmp_path)
    assert done.returncode == 1
    assert "layerif: trainer.val_check_interval=100 is not a number of batches of an epoch" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_model_is_checked_before_the_store_is_asked(setup):
    with pytest.raises(ValueError, match=r"model\.attention='nosuch' is not allowed; allowed: eager, "):
        setup("method=none", "model.attention=nosuch")


def test_an_infinity_ends_a_run_before_it_begins(tiny_overrides, tmp_path):
    done = layerif_here([*tiny_overrides, "trainer.gradient_clip_val=inf"], tmp_path)
    assert done.returncode == 1
    assert "layerif: trainer.gradient_clip_val=inf is not allowed; allowed: a finite number" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
