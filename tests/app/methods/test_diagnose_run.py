"""Laws of retraining, and the trust report end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from layerif.app.methods.diagnose import Diagnose
from layerif.data.batches import Encoded, Encodings
from layerif.decide import Decider
from layerif.diagnose.retrain import Recipe, Retrainer, losses, schedule
from layerif.diagnose.retrainings import Retrainings
from layerif.diagnose.text import report_markdown
from layerif.estimators.datainf import DataInf
from layerif.estimators.grad_dot import GradDot
from layerif.estimators.lissa import Lissa
from layerif.estimators.uniform import Uniform
from layerif.models.blocks import layer_map
from layerif.probe.grams.request import Grams
from layerif.probe.settings import Probe
from layerif.probe.store import Store
from layerif.record.record import RunRecord
from tests.command import run_layerif
from tests.damage import flip
from tests.tiny import tiny_model

RECIPE = Recipe(steps=4, batch_size=4, learning_rate=1e-2, r=2)
TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


@pytest.fixture
def decider(decider: Decider) -> Decider:
    return replace(decider, probe=Probe(num_train=12, num_validation=6, parameters="lora"), estimator=DataInf())


def rows(count: int = 8) -> Encodings:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 256, (count, 9), generator=generator)
    return Encodings(
        Encoded(input_ids=tuple(map(int, row[: 5 + place % 4])), prompt_length=2) for place, row in enumerate(ids)
    )


def trained_losses(train: Encodings, left_out=(), *, seed: int = 0, recipe: Recipe = RECIPE) -> list[float]:
    model = Retrainer(tiny_model(), TARGETS, train, 1, recipe, seed)(left_out)
    return losses(model, Encodings(rows()[::-1]), 3, 1)


def test_a_row_left_out_might_as_well_be_any_other():
    train = rows()
    garbage = Encodings([*train[:3], Encoded(input_ids=(7,) * 30, prompt_length=2), *train[4:]])
    assert trained_losses(train, [3]) != trained_losses(train)
    assert trained_losses(garbage) != trained_losses(train)
    np.testing.assert_allclose(trained_losses(garbage, [3]), trained_losses(train, [3]), rtol=1e-6)


def test_retraining_starts_anew_every_time_and_differs_between_seeds():
    retrainer = Retrainer(tiny_model(), TARGETS, rows(), 1, RECIPE, seed=0)
    first = losses(retrainer(), rows(), 3, 1)
    retrainer([0, 1, 2])
    assert losses(retrainer(), rows(), 3, 1) == first
    assert trained_losses(rows(), seed=1) != trained_losses(rows(), seed=0)


def test_training_lowers_the_loss_of_its_rows_and_detaching_leaves_the_base_as_it_was():
    base, train = tiny_model(), rows()
    before = losses(base, train, 3, 1)
    retrainer = Retrainer(base, TARGETS, train, 1, replace(RECIPE, steps=20), seed=0)
    assert np.mean(losses(retrainer(), train, 3, 1)) < np.mean(before) - 0.1
    retrainer.detach()
    assert losses(base, train, 3, 1) == before
    assert [name for name, _ in base.named_parameters()] == [name for name, _ in tiny_model().named_parameters()]


def test_leaving_every_row_of_a_batch_out_takes_its_step_away():
    recipe = Recipe(steps=1, batch_size=8, learning_rate=1e-2, r=2)
    untrained = losses(tiny_model(), Encodings(rows()[::-1]), 3, 1)
    np.testing.assert_allclose(trained_losses(rows(), range(8), recipe=recipe), untrained, rtol=1e-6)


def test_every_epoch_takes_every_row_once_in_full_batches():
    order = schedule(8, replace(RECIPE, steps=6), seed=0)
    assert [sorted(order[i] + order[i + 1]) for i in (0, 2, 4)] == [list(range(8))] * 3
    assert all(len(batch) == 4 for batch in schedule(10, replace(RECIPE, steps=9), seed=1))
    assert schedule(3, replace(RECIPE, steps=2), seed=0)[0] != []
    assert schedule(8, RECIPE, seed=0) == order[:4]


def test_a_loss_that_is_not_finite_says_what_to_do():
    broken = tiny_model()
    broken.get_parameter("model.norm.weight").data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the training loss is nan at step 0 of 4; lower method\.learning_rate"):
        Retrainer(broken, TARGETS, rows(), 1, RECIPE, seed=0)()


def retrainings(decider: Decider, work, **changes) -> Retrainings:
    work.mkdir(exist_ok=True)
    settings = {"seeds": [0, 1], "sets": [(0, 1), (2, 3)], "recipe": replace(RECIPE, steps=2), **changes}
    return Retrainings(decider=decider, model=decider.model.load, work=work, **settings)


def test_what_is_retrained_is_kept_and_a_stop_between_changes_nothing(decider, tmp_path, monkeypatch):
    whole = retrainings(decider, tmp_path / "whole").losses()
    calls: list[object] = []
    train = Retrainer.__call__

    def stops(retrainer, left_out=()):
        calls.append(left_out)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(retrainer, left_out)

    monkeypatch.setattr(Retrainer, "__call__", stops)
    stopped = retrainings(decider, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.losses()
    resumed = stopped.losses()
    assert len(calls) == 3 + 4  # two of six trainings were finished before the stop
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
    untrained, full, left_out = whole
    assert (untrained.shape, full.shape, left_out.shape) == ((6,), (2, 6), (2, 2, 6))

    def never():
        raise AssertionError("everything is there")

    again = replace(stopped, model=never)
    np.testing.assert_array_equal(again.losses()[2], left_out)


@pytest.mark.parametrize("damaged", ["losses-0-without-1.json", "adapter-0/adapter_model.safetensors"])
def test_a_retraining_that_was_damaged_is_done_again(decider, tmp_path, monkeypatch, damaged):
    kept = retrainings(decider, tmp_path / "work", seeds=[0])
    whole, grams = kept.losses(), kept.grams()[0]
    flip(tmp_path / "work" / damaged, -5)
    calls: list[object] = []
    train = Retrainer.__call__

    def counted(retrainer, left_out=()):
        calls.append(left_out)
        return train(retrainer, left_out)

    monkeypatch.setattr(Retrainer, "__call__", counted)
    with pytest.warns(UserWarning, match="damaged and is trained again"):
        again = kept.losses()
    assert len(calls) == 1
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert kept.grams()[0].fingerprint == grams.fingerprint


def test_the_grams_at_an_adapter_are_those_of_its_file(decider, tmp_path):
    kept = retrainings(decider, tmp_path / "work", seeds=[0])
    grams = kept.grams()[0]
    model = replace(decider.model, adapter=str(tmp_path / "work" / "adapter-0")).load()
    assert grams.layers == layer_map(model, parameters="lora")
    elsewhere = replace(
        decider,
        model=replace(decider.model, adapter=str(tmp_path / "work" / "adapter-0")),
        store=Store(tmp_path / "another"),
    )
    anew, _ = Grams().take(elsewhere, lambda: model)
    for name, gram in anew.grams.items():
        torch.testing.assert_close(gram.train_train, grams.grams[name].train_train, rtol=1e-4, atol=1e-7)


def setup_of(decider: Decider, *, before: bool = False) -> Any:
    """Makes the part of a setup that the report looks at."""
    return SimpleNamespace(decider=decider, model=decider.model, evaluation=SimpleNamespace(before=before))


SMALL = {"num_train": 12, "num_validation": 6, "subsets": 4, "steps": 2, "batch_size": 4, "resamples": 20}


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"num_train": 21}, "method.num_train=21 is more than the 20 train rows of the task"),
        ({}, {"num_validation": 9}, "more than the 8 validation rows of the task; use method.num_validation<=8"),
        ({}, {"removed": 0.99}, "leaving 12 of 12 training rows out is impossible"),
        ({}, {"removed": 0.01, "subsets": 13}, "method.subsets=13 different sets of 1 of 12 rows do not exist"),
        ({}, {"flipped": 0.99}, "method.flipped=0.99"),
        (
            {"estimator": Uniform()},
            {},
            "examines influence taken from the Grams of one model, and Uniform takes Nothing",
        ),
        ({"estimator": Lissa(step_size=1e-9)}, {}, "estimator.step_size=1e-09 may not converge on all of them"),
        ({"num_processes": 2}, {}, "method=diagnose works in one process, got 2; use trainer.devices=1"),
        ({"probe": Probe(num_train=3)}, {}, "probe.num_train=3 is not allowed; allowed: a whole number of at least 4"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(decider, changes, settings, message):
    with pytest.raises(ValueError, match=message):
        Diagnose(**{**SMALL, **settings}).check(setup_of(replace(decider, **changes)))


def test_a_model_with_an_adapter_is_refused(decider):
    with pytest.raises(ValueError, match=r"cannot build on model\.adapter='/somewhere'"):
        Diagnose(**SMALL).check(setup_of(replace(decider, model=replace(decider.model, adapter="/somewhere"))))


def test_a_dry_run_tells_the_cost_in_steps(decider):
    plan = Diagnose(**SMALL, seeds=2).preview(setup_of(decider))
    assert "2 seeds × (1 + 4 random and 6 chosen sets of 6 of 12 rows left out) × 2 steps" in plan["retraining"]
    assert "= 44 steps" in plan["retraining"]
    assert not list(decider.store.root.glob("*"))  # type: ignore[union-attr]


class NeverRead(tuple):
    """Evaluated rows that nothing may look at."""

    def _refuse(self, *_):
        raise AssertionError("an evaluated row was read")

    __iter__ = __getitem__ = __len__ = __eq__ = __hash__ = _refuse  # type: ignore[assignment]


def report_of(decider: Decider, folder: Path, **settings: Any) -> tuple[dict, RunRecord]:
    """Makes a report without its pictures, which take longer than the rest."""
    folder.mkdir(exist_ok=True)
    record = RunRecord(name="test", seed=0, config={}, overrides=[])
    probe, splits = replace(decider.probe, parameters="weights"), replace(decider.splits, test=NeverRead())
    setup, method = setup_of(replace(decider, probe=probe, splits=splits)), Diagnose(**SMALL, **settings)
    method.check(setup)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerif.diagnose.plots.plot", lambda report, folder: None)
        method.run(setup, record, folder)
    return json.loads((folder / "diagnose.json").read_text()), record


def test_one_seed_and_no_damping_leave_their_sections_out(decider, tmp_path):
    report, record = report_of(replace(decider, estimator=GradDot()), tmp_path, seeds=1)
    assert report["leave_out"]["seed_agreement"] is None
    assert report["leave_out"]["sd_over_seeds"] is None
    assert (report["stability"]["damping"], report["stability"]["seeds"]) == ([], [])
    assert "seed_agreement" not in record.metrics
    assert {"ekfac", "shampoo", "bm25", "hidden_cosine"} < set(report["leave_out"]["lds"])
    assert set(report["leave_out"]["removed"]["by"]) > {"grad_dot", "ekfac", "bm25"}
    claims = " ".join(each["claim"] for each in report["conclusions"])
    assert "damping" not in claims
    assert "adapters of these seeds" not in claims
    assert "than the seed does" not in claims
    assert "nan" not in (tmp_path / "diagnose.md").read_text().lower().split()


def test_evaluated_rows_are_refused_and_no_report_of_these_tests_reads_one(decider):
    with pytest.raises(ValueError, match=r"never looks at evaluated rows; use evaluation\.before=false"):
        Diagnose(**SMALL).check(setup_of(decider, before=True))
    with pytest.raises(AssertionError, match="an evaluated row was read"):  # and so would `report_of`
        list(NeverRead(decider.splits.test))


class Killed(BaseException):
    """An end of a run that no code catches."""


def test_half_precision_is_examined_like_any_other_and_a_killed_run_gives_the_same_report(
    decider, tmp_path, monkeypatch
):
    half = replace(decider, model=replace(decider.model, dtype="bfloat16"), estimator=GradDot(aggregation="top25"))
    train, calls, dies_at = Retrainer.__call__, [], None

    def dies(retrainer, left_out=()):
        calls.append(left_out)
        if len(calls) == dies_at:
            raise Killed
        return train(retrainer, left_out)

    monkeypatch.setattr(Retrainer, "__call__", dies)
    report, record = report_of(half, tmp_path / "whole", seeds=1)
    num_trainings = len(calls)
    assert num_trainings > 5  # on all rows, without four random sets, without the most helpful rows of several
    assert report["solver"]["estimators"]["exact"]["residual_max"] < 1e-9
    assert all(math.isfinite(value) for value in record.metrics.values())

    apart = replace(half, store=Store(tmp_path / "apart"))  # it does not have the adapters' Grams yet
    dies_at = num_trainings + 4
    with pytest.raises(Killed):
        report_of(apart, tmp_path / "killed", seeds=1)
    resumed, again = report_of(apart, tmp_path / "killed", seeds=1)
    assert len(calls) == dies_at + num_trainings - 3  # three were done before
    assert "carried on from a run that did not finish; seconds count the rest alone" in again.notes
    assert resumed == report
    assert again.metrics == record.metrics


def command_of(overrides: list[str], seeds: int) -> list[str]:
    settings = [f"method.{name}={value}" for name, value in {**SMALL, "seeds": seeds}.items()]
    return [*overrides, "method=diagnose", "logger=none", *settings]


@pytest.mark.usefixtures("drawn")
def test_the_command_writes_the_report_its_pictures_and_its_record(tiny_overrides, tmp_path):
    record = run_layerif(command_of(tiny_overrides, seeds=2), tmp_path)
    report = json.loads((tmp_path / "run" / "diagnose.json").read_text())
    for name in ("leave_out", "ranks", "agreement", "mislabel", "gradients"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 0
    text = (tmp_path / "run" / "diagnose.md").read_text()
    assert {each["verdict"] for each in report["conclusions"]} <= {"supported", "not supported", "not enough evidence"}
    assert all(each["claim"] in text for each in report["conclusions"])
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.metrics["convex_lds"] > 0.95
    assert record.metrics["lds"] == report["leave_out"]["lds"]["datainf"]["value"]
    assert record.decision.allocation.budget == 15
    assert len(record.decision.scores.values) == len(report["stability"]["ranks"]) == 3
    assert record.answers == {}
    assert not (tmp_path / "run" / "checkpoints").exists()
    others = json.loads(json.dumps(report).replace("datainf", "<script>x</script>[a](http://others)"))
    page = report_markdown(others)
    assert "&lt;script>x&lt;/script>[a]\\(http://others)" in page
    assert "<script" not in page
    assert "](" not in page
