"""Arms that learn from other rows are told apart, and compared as arms that differ in one thing."""

from __future__ import annotations

from typing import Any

from layerif.report.arms import comparable, runs_of
from tests.records import record


def job(choice: str, seed: int = 0, estimator: str = "", **selection: object) -> Any:
    choices = {"selection": choice} | ({"estimator@selection.estimator": estimator} if estimator else {})
    return record("uniform", [True], seed=seed, choices=choices, settings={"selection": {**selection, "seed": seed}})


def test_arms_are_called_after_their_selection_and_its_budget():
    jobs = [job("random", seed, budget=60) for seed in (0, 1)]
    jobs += [job("influence", estimator=name, budget=60, reversed=False) for name in ("grad_dot", "cosine")]
    jobs += [job("influence", estimator="grad_dot", budget=60, reversed=True), job("random", budget=240)]
    runs = runs_of(jobs)
    arms = [run.arm for run in runs]
    assert len({*arms}) == 5
    assert arms[0] == arms[1]
    for words in (["selection=influence grad_dot"], ["selection=influence cosine"], ["reversed=true"], ["budget=240"]):
        assert any(all(word in arm for word in words) for arm in arms), words
    assert all(comparable(runs[0], other) for other in runs[1:])


def test_a_job_of_a_version_without_selections_took_all_rows():
    old = record("uniform", [True])
    assert {run.arm for run in runs_of([old, job("all", seed=1)])} == {"uniform experts"}
